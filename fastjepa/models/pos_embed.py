"""Fixed sin-cos position tables and their interpolation to other grids.

Tables are computed in float64 and stored as float32, like the published ones. Token order is time, row, column.
"""

from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def sincos_1d(dim: int, positions: np.ndarray) -> np.ndarray:
    """[M] positions -> [M, dim] float64: all sines, then all cosines, at frequencies 10000 ** (-j / (dim/2)).

    Errors: ValueError for an odd `dim`. Source: "Attention is all you need" (arXiv 1706.03762, section 3.5).
    """
    if dim % 2:
        raise ValueError(f"a sin-cos table needs an even width, got {dim}")
    frequencies = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = np.outer(positions.astype(np.float64), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _with_cls(table: np.ndarray, cls_token: bool) -> np.ndarray:
    return np.concatenate([np.zeros((1, table.shape[1])), table]) if cls_token else table


def get_1d_sincos_pos_embed(embed_dim: int, grid_size: int, cls_token: bool = False) -> np.ndarray:
    """[grid_size, embed_dim] float64 (one zero row more in front with `cls_token`)."""
    return _with_cls(sincos_1d(embed_dim, np.arange(grid_size)), cls_token)


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False) -> np.ndarray:
    """[h*w, embed_dim] float64: half of the channels for the row, half for the column. An int is a square grid."""
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    table = np.concatenate(
        [sincos_1d(embed_dim // 2, rows.ravel()), sincos_1d(embed_dim // 2, columns.ravel())], axis=1
    )
    return _with_cls(table, cls_token)


def get_3d_sincos_pos_embed(
    embed_dim: int,
    grid_size: int | tuple[int, int],
    grid_depth: int,
    cls_token: bool = False,
    uniform_power: bool = False,
) -> np.ndarray:
    """[t*h*w, embed_dim] float64: channels for the time slot, then the row, then the column.

    `uniform_power` gives the three axes equal even widths (rounded up) and cuts the end off, as the published models
    do; otherwise time has half of the channels and row and column a quarter each.
    """
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    times, rows, columns = np.meshgrid(np.arange(grid_depth), np.arange(height), np.arange(width), indexing="ij")
    if uniform_power:
        dim_t = dim_h = dim_w = 2 * ceil(embed_dim / 6)
    else:
        dim_t, dim_h, dim_w = embed_dim // 2, embed_dim // 4, embed_dim // 4
    table = np.concatenate(
        [sincos_1d(dim_t, times.ravel()), sincos_1d(dim_h, rows.ravel()), sincos_1d(dim_w, columns.ravel())], axis=1
    )
    return _with_cls(table[:, :embed_dim], cls_token)


def position_table(dim: int, grid: tuple[int, int, int] | tuple[int, int], uniform_power: bool) -> Tensor:
    """The [1, tokens, dim] float32 table of a network with a (t, h, w) or (h, w) grid of tokens."""
    if len(grid) == 2:
        table = get_2d_sincos_pos_embed(dim, grid)
    else:
        table = get_3d_sincos_pos_embed(dim, grid[1:], grid[0], uniform_power=uniform_power)
    return torch.from_numpy(table).float().unsqueeze(0)


def interpolate_pos_embed(table: Tensor, old_grid: tuple[int, ...], new_grid: tuple[int, ...]) -> Tensor:
    """Resample a [1, tokens, D] table from one token grid to another: trilinear in 3-D, bicubic in 2-D.

    The output size is given exactly and the factors are the true ratios, so no grid comes out one token short (which
    the published `scale_factor` form does for some pairs).
    """
    if old_grid == new_grid:
        return table
    if len(old_grid) == 3:
        volume = rearrange(table, "1 (t h w) d -> 1 d t h w", t=old_grid[0], h=old_grid[1], w=old_grid[2])
        resized = F.interpolate(volume, size=new_grid, mode="trilinear", align_corners=False)
        return rearrange(resized, "1 d t h w -> 1 (t h w) d")
    plane = rearrange(table, "1 (h w) d -> 1 d h w", h=old_grid[0], w=old_grid[1])
    resized = F.interpolate(plane, size=new_grid, mode="bicubic", align_corners=False)
    return rearrange(resized, "1 d h w -> 1 (h w) d")
