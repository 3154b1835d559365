"""timm: classes by their full names, so that it need not be installed."""

from typing import Any

import torch
from torch import Tensor, nn

from fastjepa_kernels.functional import gather_tokens
from fastjepa_kernels.integrations import attention
from fastjepa_kernels.integrations.swap import Match, Swap, Swapped, subclass
from fastjepa_kernels.modules import FusedLayerNorm, norm_dtype


class Norm(Swapped):
    """timm's `LayerNorm`; its fast form computes in the dtype of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        kind = x.device.type
        if module._fast_norm and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
            return FusedLayerNorm.normalise(module, x, x.dtype)
        return FusedLayerNorm.normalise(module, x, norm_dtype(x))


class NarrowNorm(Swapped):
    """timm's `LayerNorm` with the result in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        return FusedLayerNorm.normalise(module, x, x.dtype)


class PatchDropout(Swapped):
    """timm's `PatchDropout`: the same draw of random numbers, kept tokens gathered without an expanded index."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if not module.training or module.prob == 0:
            return x
        prefix, x = x[:, : module.num_prefix_tokens], x[:, module.num_prefix_tokens :]
        kept = max(1, int(x.shape[1] * (1.0 - module.prob)))
        index = torch.argsort(torch.randn(x.shape[:2], device=x.device), dim=-1)[:, :kept]
        if module.ordered:
            index = index.sort(dim=-1)[0]
        x = gather_tokens(x, index)
        return torch.cat((prefix, x), dim=1) if module.num_prefix_tokens else x


def _plan_norm(module: nn.Module, wanted: frozenset[str], out_dtype: str) -> Swap | str:
    return Swap(subclass(Norm if out_dtype == "same" else NarrowNorm, type(module)), {"layer_norm": "layer_norm"})


def _plan_dropout(module: nn.Module, wanted: frozenset[str], out_dtype: str) -> Swap | str:
    return Swap(subclass(PatchDropout, type(module)), {"patch_dropout": "gather_tokens"})


KNOWN = {
    "timm.layers.norm.LayerNorm": Match(("layer_norm",), _plan_norm),
    "timm.layers.patch_dropout.PatchDropout": Match(("patch_dropout",), _plan_dropout),
    "timm.layers.attention.Attention": Match(("attention",), attention.plan_packed),
    "timm.models.vision_transformer.Attention": Match(("attention",), attention.plan_packed),
}


def find(module: nn.Module) -> Match | None:
    """The classes above and no others."""
    return KNOWN.get(f"{type(module).__module__}.{type(module).__qualname__}")
