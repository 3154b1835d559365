"""The operations as modules. Each holds the parameters of the module it stands for and no others.

B clips, C channels, T H W frames and pixels, M masks of a clip, N tokens, K kept tokens, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa_kernels.functional import gather_tokens
from fastjepa_kernels.integrations import seams
from fastjepa_kernels.losses import target_loss
from fastjepa_kernels.norms import layer_norm
from fastjepa_kernels.updates import ema_update_


def norm_dtype(x: Tensor) -> torch.dtype:
    """What `F.layer_norm` gives for `x`: autocast of CUDA makes it float32, that of a CPU leaves it alone."""
    widened = x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if widened else x.dtype


class FusedLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dim through `layer_norm`: same arguments, parameters and state-dict keys.

    Dtypes are those of `nn.LayerNorm`, autocast included. There is no second derivative. Errors: ValueError for several
    normalised dims or an input of another width.
    """

    fastjepa_swapped = True

    def __init__(self, normalized_shape: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(normalized_shape, *arguments, **named)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"FusedLayerNorm: expected one normalised dim, got {list(self.normalized_shape)}")

    def forward(self, input: Tensor) -> Tensor:
        return self.normalise(input, norm_dtype(input))

    def normalise(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """x [..., D] -> normalised [..., D] of `out_dtype`."""
        if tuple(x.shape[-1:]) != self.normalized_shape:
            raise ValueError(f"layer_norm: expected x [..., {self.normalized_shape[0]}], got {list(x.shape)}")
        return layer_norm(x, self.weight, self.bias, self.eps, out_dtype=out_dtype)


class NarrowLayerNorm(FusedLayerNorm):
    """`FusedLayerNorm` whose result has the dtype of its input under autocast too: half the bytes written."""

    def forward(self, input: Tensor) -> Tensor:
        return self.normalise(input, input.dtype)


class MaskedPatchEmbed3D(nn.Module):
    """Patches of clips, embedded where they are kept: arguments and state-dict keys of the public `PatchEmbed3D`.

    video [B, C, T, H, W] of the dtype of the weights and index [B, K] or [M, B, K] of patches in time-major order ->
    [B, K, D] or [M * B, K, D]; all N patches without an index. `of` shares the weights of a convolution that is there.
    """

    def __init__(
        self, patch_size: int = 16, tubelet_size: int = 2, in_chans: int = 3, embed_dim: int = 768, bias: bool = True
    ) -> None:
        super().__init__()
        size = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=size, stride=size, bias=bias)

    @classmethod
    def of(cls, conv: nn.Conv3d) -> "MaskedPatchEmbed3D":
        """Errors: ValueError for a convolution whose patches overlap, leave gaps or are padded."""
        plain = conv.stride == conv.kernel_size and set(conv.dilation) == {1} and conv.groups == 1
        if not plain or (conv.padding != "valid" and any(conv.padding)):
            raise ValueError(
                f"MaskedPatchEmbed3D: expected stride = kernel and no padding, dilation or groups, got {conv}"
            )
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.proj = conv
        return made

    def forward(self, video: Tensor, index: Tensor | None = None) -> Tensor:
        out = seams.embed(video, self.proj.weight, self.proj.bias, index)
        return out.flatten(1, 3) if index is None else out


class TokenGather(nn.Module):
    """`gather_tokens` as a module: x [B, N, D], index [B, K] or [M, B, K] -> [B, K, D] or [M * B, K, D]."""

    def __init__(self, assume_unique: bool = True) -> None:
        super().__init__()
        self.assume_unique = assume_unique

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return gather_tokens(x, index, assume_unique=self.assume_unique)


class TargetLoss(nn.Module):
    """`target_loss` as a module: predictions [M * B, K, D], features [B, N, D] and index [M, B, K] -> a scalar."""

    def __init__(self, exponent: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.exponent, self.eps = exponent, eps

    def forward(self, prediction: Tensor, target: Tensor, index: Tensor) -> Tensor:
        return target_loss(prediction, target, index, exponent=self.exponent, eps=self.eps)


class EMA:
    """Moving averages of weights, each pair of them held by reference: `step(momentum)` moves the targets.

    `targets` and `onlines` are modules, whose parameters are paired by name, or lists of tensors in one order. Targets
    are float32; buffers are not averaged. It keeps no weights of its own: save the target module. Errors: ValueError
    where the two do not pair.
    """

    def __init__(self, targets: nn.Module | Sequence[Tensor], onlines: nn.Module | Sequence[Tensor]) -> None:
        if isinstance(targets, nn.Module) and isinstance(onlines, nn.Module):
            names, others = (dict(module.named_parameters()) for module in (targets, onlines))
            if alone := sorted(names.keys() ^ others.keys()):
                raise ValueError(f"EMA: {alone[0]} is a parameter of one module alone")
            onlines = [others[name] for name in names]
        self.targets, self.onlines = (
            list(given.parameters() if isinstance(given, nn.Module) else given) for given in (targets, onlines)
        )
        if len(self.targets) != len(self.onlines):
            raise ValueError(f"EMA: {len(self.targets)} targets and {len(self.onlines)} onlines")

    def step(self, momentum: float | Tensor) -> None:
        """target <- momentum * target + (1 - momentum) * online; see `ema_update_` for a momentum on the device."""
        ema_update_(self.targets, self.onlines, momentum)
