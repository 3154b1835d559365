"""A persistent matrix product whose epilogue adds the bias and applies the exact GELU."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.launch import Shipped, combinations, on_device_of, pinned
from fastjepa_kernels._triton.mlp import gelu
from fastjepa_kernels._triton.product import processors, product_of, tile_of
from fastjepa_kernels.config import lookup


@triton.jit
def linear_gelu_kernel(
    x, weight, bias, out, before, rows, tiles, programs,
    BIAS: tl.constexpr, KEEP: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles program, program + programs, ... of [rows, OUT]; GROUP rows of tiles share their columns of weights."""
    columns: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tile_rows = tl.cdiv(rows, BLOCK_M)
    for tile in range(tl.program_id(0), tiles, programs):
        down, across = tile_of(tile, tile_rows, columns, GROUP)
        row = down.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = across * BLOCK_N + tl.arange(0, BLOCK_N)
        present, used = row < rows, column < OUT
        total = product_of(x, weight, row, column, present, used, IN, 1, IN, BLOCK_M, BLOCK_N, BLOCK_K)
        if BIAS:
            total += tl.load(bias + column, mask=used, other=0.0).to(tl.float32)[None, :]
        inside = present[:, None] & used[None, :]
        target = row[:, None] * OUT + column[None, :]
        # The backward pass reads the rounded sum, so this one does as well.
        rounded = total.to(out.dtype.element_ty)
        if KEEP:
            tl.store(before + target, rounded, mask=inside)
        tl.store(out + target, gelu(rounded.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """x [R, I], weight [O, I], bias [O] -> gelu(x weight^T + bias) [R, O], and the sum before, [0] without `keep`."""
    x, weight = x.contiguous(), weight.contiguous()
    shape = len(x), len(weight)
    out = x.new_empty(shape)
    before = x.new_empty(shape if keep else 0)
    if out.numel():
        tile = lookup("linear_gelu", device=x.device, dtype=x.dtype, width=x.shape[1], length=len(x))
        tiles = triton.cdiv(len(x), tile["BLOCK_M"]) * triton.cdiv(len(weight), tile["BLOCK_N"])
        programs = min(tiles, processors(x.device))
        with on_device_of(x):
            linear_gelu_kernel[(programs,)](
                x, weight, x if bias is None else bias.contiguous(), out, before, len(x), tiles, programs,
                BIAS=bias is not None, KEEP=keep, IN=x.shape[1], OUT=len(weight), **tile,
            )  # fmt: skip
    return out, before


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """The product of a predictor, of ViT-L and of ViT-H."""
    for width in (384, 1280):
        for dtype in ("bf16", "fp32"):
            types = {
                **dict.fromkeys(("x", "weight", "bias", "out", "before"), f"*{dtype}"),
                **dict.fromkeys(("rows", "tiles", "programs"), "i32"),
            }
            tile = lookup("linear_gelu", architecture=architecture, dtype=dtype, width=width)
            fixed = {"BIAS": True, "KEEP": True, "IN": width, "OUT": 4 * width, **tile}
            yield pinned(f"linear gelu {dtype} {width}", linear_gelu_kernel, types, fixed)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries."""
    blocks = {"BLOCK_M": (64, 128, 256), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64), "GROUP": (8,)}
    tiles = combinations(**blocks, num_warps=(4, 8), num_stages=(2, 3, 4))
    return {"linear_gelu": [one for one in tiles if one["BLOCK_M"] * one["BLOCK_N"] <= 128 * 256]}
