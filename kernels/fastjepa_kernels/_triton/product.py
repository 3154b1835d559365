"""What the matrix products share: the order of their tiles, and how many programs walk through them."""

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def tile_of(number, down, across, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP tiles down, then one across, so that neighbours in time share their inputs."""
    group = number // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = number % (GROUP * across)
    return group * GROUP + within % height, within // height


@triton.jit
def product_of(
    left, right, row, column, present, used, IN: tl.constexpr, RIGHT_IN: tl.constexpr, RIGHT_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of left [rows, IN] times right, whose values lie RIGHT_IN and RIGHT_OUT apart, in float32."""
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, IN, BLOCK_K):
        within = inner < IN - first
        x = tl.load(
            left + row[:, None] * IN + (first + inner)[None, :], mask=present[:, None] & within[None, :], other=0.0
        )
        there = used[None, :] & within[:, None]
        y = tl.load(right + column[None, :] * RIGHT_OUT + (first + inner)[:, None] * RIGHT_IN, mask=there, other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    return total


@cache
def processors(device: torch.device) -> int:
    """Programs that run at once: one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
