"""The seam between the packed pass and kernels: what the pass asks for, here in torch's own functions.

`Operations` is complete by itself; `fastjepa.fused` overrides its methods with those of `fastjepa_kernels`, which
compute the same numbers in fewer passes over memory. R rows of D channels, clips one after another; `Stretch` says how
rows fall into clips.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastjepa.masks.tokens import Ragged, TokenSet, flat_rows, flat_tokens, gather_tokens, split_runs
from fastjepa.models.layers import MLP, Attention
from fastjepa.models.predictor import Draw, VisionTransformerPredictor, draw_of_run
from fastjepa.models.vision_transformer import VisionTransformer


class Stretch(NamedTuple):
    """Neighbouring clips that keep equally many rows."""

    clips: int
    length: int


@dataclass(frozen=True)
class Patches:
    """A batch made ready for all passes of a step: the token grid, and `pixels` in the form `Operations.cut` gives."""

    pixels: Tensor
    grid: tuple[int, ...]


class Targets:
    """Target features of every token [B, N, E], normalised without affine, and what is asked of them."""

    def __init__(self, features: Tensor) -> None:
        wide = widened(features)
        self._features = F.layer_norm(wide, wide.shape[-1:], eps=1e-5)

    def every(self) -> Tensor:
        """The features of all tokens: [B, N, E]."""
        return self._features

    def rows(self, token_set: TokenSet) -> Tensor:
        """The features of a mask set: [B, K, E], or [R, E] rows where lengths differ."""
        return gather_tokens(self._features, token_set)

    def error(self, prediction: Tensor, token_set: TokenSet, exponent: float) -> Tensor:
        """Mean over clips of each clip's mean of |p - t| ** q / q, q the exponent; `prediction` has the form of `rows`.

        The result is 0-dim, float32 at least.
        """
        difference = (widened(prediction) - self.rows(token_set)).abs()
        if exponent != 1.0:
            difference = difference**exponent
        if isinstance(token_set, Tensor):
            return difference.mean() / exponent
        return (difference.mean(dim=-1) * token_set.weights().to(difference.dtype)).sum() / exponent


class Operations:
    """Every piece of the packed pass that has a kernel.

    `keyed_noise` says whether `assemble` takes `RowNoise` in its draws and makes the noise where it is used.
    """

    keyed_noise = False

    def check(self, network: nn.Module) -> None:
        """Errors: ValueError where a network has pieces that these operations would not compute as it does."""

    def cut(self, encoder: VisionTransformer, clips: Tensor) -> Patches:
        """[B, C, T, H, W] (or [B, C, H, W]): here into the pixels of every token, [B, N, C * tubelet * patch ** 2]."""
        grid = encoder.token_grid(clips)
        video = clips if encoder.is_video else clips.unsqueeze(2)
        frames, side = (encoder.tubelet_size if encoder.is_video else 1), encoder.patch_size
        pattern = "b c (t f) (h p) (w q) -> b (t h w) (c f p q)"
        return Patches(rearrange(video, pattern, f=frames, p=side, q=side), grid)

    def embed_all(self, encoder: VisionTransformer, patches: Patches) -> Tensor:
        """Embedded tokens of whole clips, positions added: [B * N, E]."""
        return _embed(encoder, patches.pixels, encoder.positions(patches.grid)).flatten(0, 1)

    def embed_sets(self, encoder: VisionTransformer, patches: Patches, sets: Sequence[TokenSet]) -> Tensor:
        """Embedded kept tokens of all sets, positions added: [R, E], set after set."""
        index = torch.cat([flat_rows(token_set, patches.pixels.shape[1]) for token_set in sets])
        token = torch.cat([flat_tokens(token_set) for token_set in sets])
        kept = patches.pixels.flatten(0, 1).index_select(0, index)
        return _embed(encoder, kept, encoder.positions(patches.grid)[0].index_select(0, token))

    def assemble(
        self,
        predictor: VisionTransformerPredictor,
        embedded: Tensor,
        masks_context: Sequence[TokenSet],
        masks_target: Sequence[TokenSet],
        goal: Tensor | None,
        draws: Sequence[Draw] | None,
    ) -> Tensor:
        """What the predictor's blocks read, clip by clip its context rows and then its target rows: [R, P].

        `embedded` [Rc, P] are the projected context features of all sets, `goal` [Rt, P] those of the targets where the
        predictor has no mask tokens. Each row gets the position of its token.
        """
        table = predictor.predictor_pos_embed[0]
        runs = [
            (number, rows, c_index, t_index)
            for number, pair in enumerate(zip(masks_context, masks_target))
            for rows, (c_index, t_index) in split_runs(pair)
        ]
        seen = split(embedded, [c_index.shape for *_, c_index, _ in runs])
        goals = [None] * len(runs) if goal is None else split(goal, [t_index.shape for *_, t_index in runs])
        parts, start, before = [], 0, 0
        for context, features, (number, rows, c_index, t_index) in zip(seen, goals, runs):
            start, before = (start if number == before else 0), number
            if features is None:
                asked = predictor.mask_token(number)
            else:
                draw = None if draws is None else draw_of_run(draws[number], rows, start, t_index.shape)
                asked = predictor.diffuse(features, *(draw or (None, None)))
            start += t_index.numel()
            parts.append(torch.cat([context + table[c_index], asked + table[t_index]], dim=1).flatten(0, 1))
        return torch.cat(parts)

    def targets(self, features: Tensor) -> Targets:
        """What the target encoder gives [B, N, E], made ready for the loss."""
        return Targets(features)

    def norm(self, norm: nn.Module, x: Tensor, *, kept: bool = False) -> Tensor:
        """Layer normalisation: [..., D] -> [..., D]; `kept` where no matrix product reads the result next."""
        return norm(x)

    def add_norm(
        self, norm: nn.Module, projection: nn.Linear, y: Tensor, x: Tensor, drop: nn.Dropout, *, kept: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What ends one half of a block and begins the next: (norm(total), total = x + drop(projection(y))).

        `kept` as for `norm`.
        """
        total = x + drop(projection(y))
        return norm(total), total

    def hidden(self, mlp: MLP, x: Tensor) -> Tensor:
        """The first half of the feed-forward layer: [R, D] -> [R, hidden features]."""
        return mlp.drop(mlp.act(mlp.fc1(x)))

    def layout(self, stretches: list[Stretch], device: torch.device) -> Any:
        """What `attend` needs to know of how rows fall into clips, made once a pass."""
        return stretches

    def attend(self, attention: Attention, x: Tensor, layout: Any) -> Tensor:
        """Self-attention inside each clip, before the output projection: [R, D] -> [R, D]."""
        rows = split(attention.qkv(x), layout)
        return torch.cat([self.mix(attention, *part.chunk(3, dim=-1)) for part in rows])

    def mix(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, M, D] queries over [b, N, D] keys and values -> [b * M, D]."""
        heads = (attention.num_heads, attention.head_dim)
        q, k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in (query, key, value))
        return attention.mix(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)

    @torch.no_grad()
    def move_(self, targets: list[Tensor], onlines: list[Tensor], momentum: float | Tensor) -> None:
        """target <- m * target + (1 - m) * online, in place, pair by pair."""
        # 1 - m in double precision: momenta come within 1e-5 of 1, where float32 would lose most of its digits.
        move = (1.0 - torch.as_tensor(momentum, dtype=torch.float64, device=targets[0].device)).float()
        # In slices, so that the temporary differences stay small beside a large encoder.
        for start in range(0, len(targets), 32):
            part = targets[start : start + 32]
            differences = torch._foreach_sub(onlines[start : start + 32], part)
            torch._foreach_mul_(differences, move)
            torch._foreach_add_(part, differences)


LIBRARY = Operations()


def split(rows: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """[R, D] as one [clips, length, D] for each stretch. One split: its gradient is one concatenation, no zeros."""
    return [
        part.unflatten(0, (clips, length))
        for part, (clips, length) in zip(rows.split([clips * length for clips, length in shapes]), shapes)
    ]


def stretches_of(token_set: TokenSet) -> list[Stretch]:
    """How the rows of a mask set fall into clips."""
    if isinstance(token_set, Ragged):
        return [Stretch(*index.shape) for _, index in token_set.runs()]
    return [Stretch(*token_set.shape)]


def run_shapes(context: TokenSet, target: TokenSet) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(clips, context rows) and (clips, target rows) of every run of clips with equally many of both."""
    return [(c_index.shape, t_index.shape) for _, (c_index, t_index) in split_runs([context, target])]


def widened(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays, so that a float64 model is float64 throughout."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _embed(encoder: VisionTransformer, pixels: Tensor, positions: Tensor) -> Tensor:
    """The patch embedding as a matrix product, positions added: [..., pixels] -> [..., E]."""
    projection = encoder.patch_embed.proj
    assert isinstance(projection, nn.Conv2d | nn.Conv3d)
    tokens = F.linear(pixels, projection.weight.flatten(1), projection.bias)
    return (tokens + positions).to(tokens.dtype)
