"""Philox-4x32-10 and normal numbers inside a kernel; the words are those of the reference bit by bit.

The functions without a grid are for other kernels: noise is made where it is used, and never stored.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.launch import Shipped, combinations, on_device_of, pinned, power_of_two
from fastjepa_kernels.config import lookup


@triton.jit
def product(x, FACTOR: tl.constexpr):
    """High and low word of uint32 x * FACTOR; the wide product is one instruction of the GPU."""
    wide = x.to(tl.uint64) * FACTOR
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Counter of four and key of two uint32 blocks that fit together -> four random uint32 blocks."""
    for turn in tl.static_range(10):
        # The key is raised in 64 bits and cut: a sum of 32 bits that wraps is an error under Triton's debug switch.
        raised0 = (k0.to(tl.uint64) + (0x9E3779B9 * turn & 0xFFFFFFFF)).to(tl.uint32)
        raised1 = (k1.to(tl.uint64) + (0xBB67AE85 * turn & 0xFFFFFFFF)).to(tl.uint32)
        high0, low0 = product(c0, 0xD2511F53)
        high1, low1 = product(c2, 0xCD9E8D57)
        c0 = high1 ^ c1 ^ raised0
        c2 = high0 ^ c3 ^ raised1
        c1 = low1
        c3 = low0
    return c0, c1, c2, c3


@triton.jit
def words(row_key, seed, group):
    """row_key int64 [ROWS], seed a scalar int64, group int32 [GROUPS] -> four uint32 blocks [ROWS, GROUPS]."""
    row = row_key[:, None]
    c0 = group[None, :].to(tl.uint32)
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    high = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return philox(c0, c0 ^ c0, low, high, key0, key1)


@triton.jit
def pair_of_normals(first, second):
    """Box-Muller of two uint32 words: radius from the first, a signed part of a turn from the second.

    The angle is reduced to a quarter turn in integers, exactly; sine and cosine of what is left are least-squares
    polynomials with an error below 3e-9, and so need no slow path for large angles.
    """
    uniform = (first.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    radius = tl.sqrt(tl.maximum(-2.0 * tl.log(uniform), 0.0))
    quarters = ((second.to(tl.uint64) + 0x20000000) >> 30).to(tl.int32)
    rest = (second & 0x3FFFFFFF).to(tl.int32)
    rest = tl.where(rest >= 0x20000000, rest - 0x40000000, rest)
    angle = (rest.to(tl.float32) + 0.5) * 1.4629180792671596e-09
    square = angle * angle
    sine = angle + angle * square * (
        -0.16666650191106883 + square * (0.008331957897973119 + square * -0.00019493486762454286)
    )
    cosine = 1.0 + square * (
        -0.5 + square * (0.041666646235067197 + square * (-0.0013887341404531079 + square * 2.4435842067675743e-05))
    )
    odd = (quarters & 1) == 1
    across = tl.where(odd, sine, cosine)
    along = tl.where(odd, cosine, sine)
    # Quarter turns: (c, s), (-s, c), (-c, -s), (s, -c).
    across = tl.where(((quarters + 1) & 2) != 0, -across, across)
    along = tl.where((quarters & 2) != 0, -along, along)
    return radius * across, radius * along


@triton.jit
def noise_tile(row_key, seed, LANES: tl.constexpr):
    """Standard normal [ROWS, LANES], channel by channel; row_key int64 [ROWS], seed a scalar int64."""
    w0, w1, w2, w3 = words(row_key, seed, tl.arange(0, LANES // 4))
    z0, z1 = pair_of_normals(w0, w1)
    z2, z3 = pair_of_normals(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def normal_kernel(row_key, seed, out, rows, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of normal numbers a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    inside = (row < rows)[:, None] & (lane < WIDTH)[None, :]
    values = noise_tile(tl.load(row_key + row, mask=row < rows, other=0), tl.load(seed), LANES)
    tl.store(out + row[:, None] * WIDTH + lane[None, :], values, mask=inside)


def tiles(width: int, **where: Any) -> dict[str, int]:
    """Launch settings of every kernel that makes noise; a row of channels is held whole."""
    return {"LANES": max(4, power_of_two(width)), **lookup("philox_normal", width=width, **where)}


def normal(row_key: Tensor, width: int, seed: Tensor) -> Tensor:
    """row_key int64 [...] -> float32 [..., width]."""
    out = row_key.new_empty((*row_key.shape, width), dtype=torch.float32)
    if out.numel():
        fixed = tiles(width, device=out.device, dtype=out.dtype, length=row_key.numel())
        with on_device_of(row_key):
            normal_kernel[(triton.cdiv(row_key.numel(), fixed["ROWS"]),)](
                row_key.contiguous(), seed, out, row_key.numel(), WIDTH=width, **fixed
            )
    return out


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """At a predictor's, an odd and the largest width."""
    types = {"row_key": "*i64", "seed": "*i64", "out": "*fp32", "rows": "i32"}
    for width in (384, 1000, 8192):
        fixed = {"WIDTH": width, **tiles(width, architecture=architecture, dtype="fp32")}
        yield pinned(f"philox normal {width}", normal_kernel, types, fixed)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries: tiles of up to 4096 values, 2 to 32 of them a thread."""
    lanes = max(4, power_of_two(width))
    tiles = [
        one
        for one in combinations(ROWS=(1, 2, 4, 8, 16), num_warps=(2, 4, 8, 16))
        if (one["ROWS"] == 1 or one["ROWS"] * lanes <= 4096) and 2 <= one["ROWS"] * lanes / one["num_warps"] / 32 <= 32
    ]
    return {"philox_normal": tiles}
