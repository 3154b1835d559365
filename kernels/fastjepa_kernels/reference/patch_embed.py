"""Embedding of kept patches in plain PyTorch: cut, normalise, one matrix product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels.precision import as_given


def cut(
    video: Tensor,
    index: Tensor | None,
    mean: list[float],
    std: list[float],
    tubelet: int,
    patch: int,
    dtype: torch.dtype,
) -> Tensor:
    """video [B, C, T, H, W], index [M, B, K] or None -> kept patches [M * B, K, C * t * p * p] in `dtype`."""
    clips, channels, frames, height, width = video.shape
    grid = frames // tubelet, height // patch, width // patch
    cells = video.reshape(clips, channels, grid[0], tubelet, grid[1], patch, grid[2], patch)
    patches = cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(clips, grid[0] * grid[1] * grid[2], channels, -1)
    if index is not None:
        clip = torch.arange(clips, device=video.device).unsqueeze(-1)
        patches = patches[clip, index.long()].flatten(0, 1)
    wide = torch.promote_types(dtype, torch.float32)
    if video.dtype.is_floating_point:
        wide = torch.promote_types(video.dtype, wide)
    values = patches.to(wide)
    if not video.dtype.is_floating_point:
        values = values / 255
    if mean:
        # Filled in on the device, where a copy from the host would wait for it.
        level, spread = (
            torch.stack([torch.full((1,), value, dtype=wide, device=video.device) for value in x]) for x in (mean, std)
        )
        values = (values - level) / spread
    return values.flatten(-2).to(dtype)


def patch_embed_gather(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    position: Tensor | None,
    mean: list[float],
    std: list[float],
    tubelet: int,
    patch: int,
    out_dtype: torch.dtype,
    fused: bool,
) -> Tensor:
    """-> [M * B, K, D], weight [D, C * t * p * p]; bias and position [N, D] are added in the wide dtype."""
    patches = cut(video, index, mean, std, tubelet, patch, weight.dtype)
    with as_given(video):
        product = F.linear(patches, weight)
    out = product.to(torch.promote_types(weight.dtype, torch.float32))
    if bias is not None:
        out = out + bias.to(out.dtype)
    if position is not None:
        rows = position if index is None else position[index.long()].flatten(0, 1)
        out = out + rows.to(out.dtype)
    return out.to(out_dtype)


def patch_embed_gather_backward(
    gradient: Tensor,
    video: Tensor,
    index: Tensor | None,
    mean: list[float],
    std: list[float],
    tubelet: int,
    patch: int,
    dtype: torch.dtype,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [D, C * t * p * p] in its `dtype` and of bias [D] in the wide dtype, [0] where not wanted."""
    wide = torch.promote_types(dtype, torch.float32)
    rows = gradient.reshape(-1, gradient.shape[-1])
    dweight, dbias = gradient.new_empty(0, dtype=dtype), gradient.new_empty(0, dtype=wide)
    if weight_gradient:
        patches = cut(video, index, mean, std, tubelet, patch, dtype).flatten(0, 1)
        with as_given(video):
            dweight = rows.to(dtype).T @ patches
    if bias_gradient:
        dbias = rows.sum(0, dtype=wide)
    return dweight, dbias
