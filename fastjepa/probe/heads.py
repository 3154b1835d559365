"""Many attentive classifiers over one read of the tokens: a grid of learning rates and weight decays in one pass.

G classifiers, B clips, N tokens, E width, H attention heads, K classes.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.models import AttentiveClassifier

BLOCK = "pooler.cross_attention_block"


class Heads(nn.Module):
    """G copies of an `AttentiveClassifier` of depth 1, computed together: normalised tokens [B, N, E] -> [G, B, K].

    `first` gives the first weights of all, `heads` is H. The tokens come as the pooler's first norm makes them before
    its affine part (epsilon 1e-5). The one query of a classifier is the same for every clip, so keys and values of
    single tokens need not be computed: query . (W x) is (query W) . x, and the values are projected after they are
    averaged. That is H columns a classifier and token instead of 2 E, with the same result up to rounding.
    """

    def __init__(self, first: AttentiveClassifier, count: int, heads: int) -> None:
        super().__init__()
        self.count, self.heads = count, heads
        parameters = dict(first.named_parameters())
        self.shapes = {name: p.shape for name, p in parameters.items()}
        # Matrices decay; biases and other one-dimensional tensors do not (the published groups).
        self.matrices = [name for name, p in parameters.items() if p.ndim > 1]
        self.vectors = [name for name, p in parameters.items() if p.ndim == 1]
        # Two flat parameters a classifier instead of thirteen: the optimizer's time is in their number.
        self.decayed, self.plain = (
            nn.ParameterList(torch.cat([parameters[name].detach().flatten() for name in names]) for _ in range(count))
            for names in (self.matrices, self.vectors)
        )

    def weights(self) -> dict[str, Tensor]:
        """Parameters under the names of `AttentiveClassifier`, those of all classifiers stacked: [G, ...]."""
        found: dict[str, Tensor] = {}
        for flat, names in ((self.decayed, self.matrices), (self.plain, self.vectors)):
            parts = torch.stack(list(flat)).split([self.shapes[name].numel() for name in names], dim=1)
            found |= {name: part.view(self.count, *self.shapes[name]) for name, part in zip(names, parts)}
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Normalised tokens [B, N, E] -> logits [G, B, K]."""
        w = self.weights()
        pooled = self._attend(x, w)
        normal = F.layer_norm(pooled, pooled.shape[-1:], eps=1e-5)
        normal = normal * w[f"{BLOCK}.norm2.weight"][:, None] + w[f"{BLOCK}.norm2.bias"][:, None]
        hidden = F.gelu(_linear(normal, w, f"{BLOCK}.mlp.fc1"))
        return _linear(pooled + _linear(hidden, w, f"{BLOCK}.mlp.fc2"), w, "linear")

    def _attend(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        """The pooled queries [G, B, E], with their residual, before the MLP."""
        queries = w["pooler.query_tokens"][:, 0]
        width = queries.shape[-1]
        sizes = (self.count, self.heads, width // self.heads)
        scale, shift = w[f"{BLOCK}.norm1.weight"], w[f"{BLOCK}.norm1.bias"]
        keys, values = w[f"{BLOCK}.xattn.kv.weight"].unflatten(1, (2, *sizes[1:])).unbind(dim=1)
        value_bias = w[f"{BLOCK}.xattn.kv.bias"][:, width:]
        # The biases of norm and keys add the same to every token, which softmax does not see.
        wanted = torch.einsum("ghd,ghde->ghe", _linear(queries, w, f"{BLOCK}.xattn.q").view(sizes), keys)
        wanted = wanted * scale[:, None] / sqrt(sizes[2])
        share = (wanted.flatten(0, 1) @ x.transpose(1, 2)).softmax(dim=-1)
        mean = (share @ x).unflatten(1, sizes[:2]) * scale[:, None] + shift[:, None]
        return queries + torch.einsum("bghe,ghde->gbhd", mean, values).flatten(2) + value_bias[:, None]


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """[G, B, i] -> [G, B, o], each classifier with its own weights."""
    return torch.baddbmm(w[f"{name}.bias"][:, None], x, w[f"{name}.weight"].transpose(1, 2))
