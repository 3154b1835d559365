"""Bias and exact GELU in one pass over a product, and its gradient with that of the bias riding in it."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.launch import Shipped, combinations, on_device_of, pinned
from fastjepa_kernels._triton.norms import sum_parts
from fastjepa_kernels.config import lookup


@triton.jit
def gelu(u):
    """u * Phi(u)."""
    return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit
def gelu_slope(u):
    """Its derivative, Phi(u) + u * phi(u)."""
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327


@triton.jit
def bias_gelu_kernel(
    product, bias, out, rows, BIAS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """A tile of ROWS x LANES values a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = (row < rows)[:, None] & (lane < WIDTH)[None, :]
    place = row[:, None] * WIDTH + lane[None, :]
    u = tl.load(product + place, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        u += tl.load(bias + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, gelu(u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def bias_gelu_backward_kernel(
    gradient, product, bias, dproduct, parts, rows, tiles,
    BIAS: tl.constexpr, BIAS_GRADIENT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles one below the other a program, and one row of partial sums of the bias's gradient."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    used = lane < WIDTH
    total = tl.zeros([ROWS, LANES], dtype=tl.float32)
    if BIAS:
        shift = tl.load(bias + lane, mask=used, other=0.0).to(tl.float32)[None, :]
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & used[None, :]
        place = row[:, None] * WIDTH + lane[None, :]
        u = tl.load(product + place, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            u += shift
        slope = gelu_slope(u)
        # Rows beyond the end have no gradient, whatever the bias makes of them.
        result = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * slope
        total += result
        tl.store(dproduct + place, result.to(dproduct.dtype.element_ty), mask=inside)
    if BIAS_GRADIENT:
        tl.store(parts + program * WIDTH + lane, tl.sum(total, axis=0), mask=used)


def bias_gelu(product: Tensor, bias: Tensor | None) -> Tensor:
    """product [R, O], bias [O] -> gelu(product + bias) in the dtype of the product."""
    product = product.contiguous()
    out = product.new_empty(product.shape)
    rows, width = product.shape
    if out.numel():
        tile = lookup("bias_gelu", device=product.device, dtype=product.dtype, width=width, length=rows)
        grid = triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["LANES"])
        with on_device_of(product):
            bias_gelu_kernel[grid](
                product, product if bias is None else bias.contiguous(), out, rows, BIAS=bias is not None,
                WIDTH=width, **tile,
            )  # fmt: skip
    return out


def bias_gelu_backward(
    gradient: Tensor, product: Tensor, bias: Tensor | None, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of product [R, O] in its dtype, and of bias [O] in float32, or [0]."""
    gradient, product = gradient.contiguous(), product.contiguous()
    rows, width = product.shape
    dproduct = product.new_empty(product.shape)
    dbias = product.new_empty(width if bias_gradient else 0, dtype=torch.float32)
    if not rows:
        return dproduct, dbias.zero_()
    tile = lookup("bias_gelu_backward", device=product.device, dtype=product.dtype, width=width, length=rows)
    # Programs along the rows, and so rows of partial sums.
    most_programs = tile.pop("PROGRAMS")
    tiles = triton.cdiv(triton.cdiv(rows, tile["ROWS"]), most_programs) if bias_gradient else 1
    programs = triton.cdiv(rows, tile["ROWS"] * tiles)
    parts = dbias.new_empty(programs, len(dbias))
    with on_device_of(product):
        bias_gelu_backward_kernel[(programs, triton.cdiv(width, tile["LANES"]))](
            gradient, product, product if bias is None else bias.contiguous(), dproduct, parts, rows, tiles,
            BIAS=bias is not None, BIAS_GRADIENT=bias_gradient, WIDTH=width, **tile,
        )  # fmt: skip
        if bias_gradient:
            sum_parts(parts, dbias, programs)
    return dproduct, dbias


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Both passes at the widths of a predictor, of ViT-L and of ViT-H."""
    counts = {"rows": "i32", "tiles": "i32", "parts": "*fp32"}
    for width in (1536, 5120):
        for dtype in ("bf16", "fp32"):
            where: dict[str, Any] = {"architecture": architecture, "dtype": dtype, "width": width}
            values = ("product", "bias", "out", "gradient", "dproduct")
            types = {**counts, **dict.fromkeys(values, f"*{dtype}")}
            fixed = {"BIAS": True, "WIDTH": width, **lookup("bias_gelu", **where)}
            yield pinned(f"bias gelu {dtype} {width}", bias_gelu_kernel, types, fixed)
            back = {"BIAS": True, "WIDTH": width, "BIAS_GRADIENT": True, **lookup("bias_gelu_backward", **where)}
            del back["PROGRAMS"]
            yield pinned(f"bias gelu back {dtype} {width}", bias_gelu_backward_kernel, types, back)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries: 4 to 32 values a thread."""
    tiles = [
        one
        for one in combinations(ROWS=(1, 2, 4, 8, 16), LANES=(128, 256, 512, 1024), num_warps=(2, 4, 8))
        if 4 <= one["ROWS"] * one["LANES"] / one["num_warps"] / 32 <= 32
    ]
    backward = [{**one, "PROGRAMS": programs} for one in tiles for programs in (256, 512, 1024)]
    return {"bias_gelu": tiles, "bias_gelu_backward": backward}
