"""Where the swapped modules leave for the operations: one function each, and the name that the report gives."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels.attention_dispatch import attention
from fastjepa_kernels.functional import gather_tokens
from fastjepa_kernels.patch_embed import patch_embed_gather
from fastjepa_kernels.positions import Rope
from fastjepa_kernels.rope import rope3d

ATTENTION = "attention"
PATCH_EMBED = "patch_embed_gather"
ROPE = "rope3d"


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """q [B, M, H, d], k and v [B, N, H, d] of any strides -> [B, M, H, d]; the default scale is d ** -0.5."""
    return attention(q, k, v, scale=scale)


def embed(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None = None) -> Tensor:
    """x [B, C, *sizes], weight [D, C, *patch] -> [B, *grid, D]; pixels that fill no patch are left out.

    With an index [B, K] or [M, B, K] of patches in row order it is those alone, [B, K, D] or [M * B, K, D]. Under
    autocast all is of its dtype, as for a convolution.
    """
    sides = weight.shape[2:]
    grid = [size // side for size, side in zip(x.shape[2:], sides)]
    for dim, (count, side) in enumerate(zip(grid, sides), start=2):
        x = x.narrow(dim, 0, count * side)
    if x.ndim == 4:
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
    tubelet, patch, across = weight.shape[2:]
    if patch == across:
        out = patch_embed_gather(x, weight, bias, index, tubelet=tubelet, patch=patch)
    else:
        out = _oblong(x, weight, bias, index)
    return out if index is not None else out.unflatten(1, grid)


def _oblong(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
    """Patches that are no squares, which the operation does not take: cut, gathered, multiplied."""
    kind, sides = x.device.type, weight.shape[2:]
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for dim, side in enumerate(sides):
        x = x.unflatten(2 + 2 * dim, (-1, side))
    cut = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
    if index is not None:
        cut = gather_tokens(cut, index)
    return F.linear(cut, weight.flatten(1), bias)


def rotate(x: Tensor, ids: Tensor, grid: tuple[int, int, int], compat: bool) -> Tensor:
    """Rotary positions on three axes: x [B, K, H, d], token numbers ids [K], [1, K] or [B, K] in a grid (T, H, W).

    Angles are float32 (float64 for float64), where the public code takes the dtype of the tokens.
    """
    shared = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    return rope3d(x, shared, Rope(grid, compat=compat))
