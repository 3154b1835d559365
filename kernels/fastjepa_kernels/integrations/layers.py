"""torch's own modules: layer normalisation, and convolutions that cut patches."""

import math

import torch
from torch import Tensor, nn

from fastjepa_kernels.integrations import seams
from fastjepa_kernels.integrations.swap import Swap
from fastjepa_kernels.modules import FusedLayerNorm, NarrowLayerNorm


def plan_norm(module: nn.Module, wanted: frozenset[str], out_dtype: str) -> Swap | str:
    """For an `nn.LayerNorm` of exactly that class."""
    assert isinstance(module, nn.LayerNorm)
    if len(module.normalized_shape) != 1:
        return f"normalises {len(module.normalized_shape)} dims, the kernel one"
    return Swap(FusedLayerNorm if out_dtype == "same" else NarrowLayerNorm, {"layer_norm": "layer_norm"})


class _PatchConv:
    """x [B, C, *sizes] -> [B, D, *grid] as a product of matrices. Its memory is that of [B, *grid, D].

    So the usual `flatten(2).transpose(1, 2)` after it copies nothing. What is no batch of pictures, and an input with a
    gradient of its own, goes the way of the convolution.
    """

    fastjepa_swapped = True
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim != self.weight.ndim or (input.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)  # type: ignore[misc]
        return seams.embed(input, self.weight, self.bias).movedim(-1, 1)


class PatchConv2d(_PatchConv, nn.Conv2d):
    """A `nn.Conv2d` whose stride is its kernel."""


class PatchConv3d(_PatchConv, nn.Conv3d):
    """A `nn.Conv3d` whose stride is its kernel."""


def cuts_patches(module: nn.Module) -> bool:
    """Whether this is a convolution over patches that neither overlap nor leave gaps."""
    return (
        isinstance(module, nn.Conv2d | nn.Conv3d)
        and module.stride == module.kernel_size
        and math.prod(module.kernel_size) > 1
        and not isinstance(module, nn.modules.lazy.LazyModuleMixin)
    )


def plan_patches(module: nn.Module, wanted: frozenset[str], out_dtype: str) -> Swap | str:
    """For a convolution of `cuts_patches` of exactly torch's class."""
    assert isinstance(module, nn.Conv2d | nn.Conv3d)
    padded = module.padding != "valid" and any(module.padding)
    if padded or set(module.dilation) != {1} or module.groups != 1:
        return "a convolution with padding, dilation or groups"
    becomes = PatchConv2d if isinstance(module, nn.Conv2d) else PatchConv3d
    return Swap(becomes, {"patch_embed": seams.PATCH_EMBED})
