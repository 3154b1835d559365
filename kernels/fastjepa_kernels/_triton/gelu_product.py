"""The gradient of a GELU as the epilogue of the persistent matrix product that feeds it."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.launch import Shipped, combinations, on_device_of, pinned
from fastjepa_kernels._triton.linear_gelu import linear_gelu
from fastjepa_kernels._triton.mlp import gelu_slope
from fastjepa_kernels._triton.norms import sum_parts
from fastjepa_kernels._triton.product import processors, product_of, tile_of
from fastjepa_kernels.config import lookup


@triton.jit
def halves(tile):
    """The left and the right half of its columns."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def finish(
    total, before, dsum, parts, row, column, present, down, OUT: tl.constexpr, BIAS_GRADIENT: tl.constexpr
):  # fmt: skip
    """Some columns of a tile of the product: times the slope, rounded and stored, and summed over their rows."""
    used = column < OUT
    inside = present[:, None] & used[None, :]
    place = row[:, None] * OUT + column[None, :]
    result = total * gelu_slope(tl.load(before + place, mask=inside, other=0.0).to(tl.float32))
    tl.store(dsum + place, result.to(dsum.dtype.element_ty), mask=inside)
    if BIAS_GRADIENT:
        # Rows beyond the end are products of zeros.
        tl.store(parts + down.to(tl.int64) * OUT + column, tl.sum(result, axis=0), mask=used)


@triton.jit
def gelu_product_backward_kernel(
    gradient, weight, before, dsum, parts, rows, tiles, programs,
    BIAS_GRADIENT: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles program, program + programs, ... of [rows, OUT], and a row of partial column sums for each row of tiles."""
    columns: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tile_rows = tl.cdiv(rows, BLOCK_M)
    for tile in range(tl.program_id(0), tiles, programs):
        down, across = tile_of(tile, tile_rows, columns, GROUP)
        row = down.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = across * BLOCK_N + tl.arange(0, BLOCK_N)
        present, used = row < rows, column < OUT
        total = product_of(gradient, weight, row, column, present, used, IN, OUT, 1, BLOCK_M, BLOCK_N, BLOCK_K)
        # The slope needs registers of its own: for a whole tile at once, beside the product, they would spill.
        quarter: tl.constexpr = BLOCK_N // 4
        left_half, right_half = halves(total)
        first_part, second_part = halves(left_half)
        third_part, fourth_part = halves(right_half)
        column = across * BLOCK_N + tl.arange(0, quarter)
        finish(first_part, before, dsum, parts, row, column, present, down, OUT, BIAS_GRADIENT)
        finish(second_part, before, dsum, parts, row, column + quarter, present, down, OUT, BIAS_GRADIENT)
        finish(third_part, before, dsum, parts, row, column + 2 * quarter, present, down, OUT, BIAS_GRADIENT)
        finish(fourth_part, before, dsum, parts, row, column + 3 * quarter, present, down, OUT, BIAS_GRADIENT)


def gelu_product_backward(
    gradient: Tensor, weight: Tensor, before: Tensor, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """gradient [R, D], weight [D, O], before [R, O] -> (gradient weight) * gelu'(before) [R, O], its column sums [O].

    The sums are float32, or [0] without `bias_gradient`.
    """
    gradient, weight, before = gradient.contiguous(), weight.contiguous(), before.contiguous()
    (rows, inner), outer = gradient.shape, weight.shape[1]
    dsum = before.new_empty(before.shape)
    dbias = before.new_empty(outer if bias_gradient else 0, dtype=torch.float32)
    if not rows:
        return dsum, dbias.zero_()
    tile = lookup("gelu_product_backward", device=before.device, dtype=before.dtype, width=inner, length=rows)
    tile_rows = triton.cdiv(rows, tile["BLOCK_M"])
    tiles = tile_rows * triton.cdiv(outer, tile["BLOCK_N"])
    programs = min(tiles, processors(before.device))
    parts = dbias.new_empty(tile_rows, len(dbias))
    with on_device_of(before):
        gelu_product_backward_kernel[(programs,)](
            gradient, weight, before, dsum, parts, rows, tiles, programs,
            BIAS_GRADIENT=bias_gradient, IN=inner, OUT=outer, **tile,
        )  # fmt: skip
        if bias_gradient:
            sum_parts(parts, dbias, tile_rows)
    return dsum, dbias


def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [R, I], w1 [O, I], b1 [O], w2 [D, O] -> gelu(x w1^T + b1) w2^T [R, D]; the sum before the GELU, its result.

    The last two are [R, O], or [0] without `keep`.
    """
    activation, before = linear_gelu(x, w1, b1, keep)
    return F.linear(activation, w2), before, activation if keep else activation.new_empty(0)


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """The product of a predictor, of ViT-L and of ViT-H."""
    for width in (384, 1024, 1280):
        for dtype in ("bf16", "fp32"):
            types = {
                **dict.fromkeys(("gradient", "weight", "before", "dsum"), f"*{dtype}"),
                "parts": "*fp32",
                **dict.fromkeys(("rows", "tiles", "programs"), "i32"),
            }
            tile = lookup("gelu_product_backward", architecture=architecture, dtype=dtype, width=width)
            fixed = {"BIAS_GRADIENT": True, "IN": width, "OUT": 4 * width, **tile}
            name = f"gelu product back {dtype} {width}"
            yield pinned(name, gelu_product_backward_kernel, types, fixed)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries."""
    blocks = {"BLOCK_M": (64, 128, 256), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64), "GROUP": (8,)}
    tiles = combinations(**blocks, num_warps=(4, 8), num_stages=(2, 3, 4))
    return {"gelu_product_backward": [one for one in tiles if one["BLOCK_M"] * one["BLOCK_N"] <= 128 * 256]}
