"""Layer normalisation, alone and after the addition of a residual: a row is read once and stays in registers.

The backward pass is one pass over the rows. A fixed number of programs share them, independent of the GPU; each sums
the gradients of weight and bias of its own rows into one row of float32, and a second kernel adds those rows in order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.launch import Shipped, on_device_of, power_of_two, rows_in_place

# Values of a tile that are held at once; a longer row is a tile of its own.
TILE = 2048
# Programs of the backward pass, and so rows of partial sums.
MOST_PROGRAMS = 512


@triton.jit
def forward_kernel(
    x, residual, weight, bias, out, total, mean, rstd, rows, inner, x_outer, x_inner, residual_outer, residual_inner,
    EPS: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program; with ADD it is x + residual that is stored in `total` and normalised."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    present = row < rows
    used = lane < WIDTH
    inside = present[:, None] & used[None, :]
    outer, place = row // inner, row % inner
    source = (outer * x_outer + place * x_inner)[:, None] + lane[None, :]
    target = row[:, None] * WIDTH + lane[None, :]
    values = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        second = (outer * residual_outer + place * residual_inner)[:, None] + lane[None, :]
        values += tl.load(residual + second, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + target, rounded, mask=inside)
        # The backward pass sees the rounded sum, so this one does as well.
        values = rounded.to(tl.float32)
    centre = tl.sum(values, axis=1) / WIDTH
    centred = tl.where(inside, values - centre[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / WIDTH + EPS)
    result = centred * scale[:, None]
    if WEIGHT:
        result *= tl.load(weight + lane, mask=used, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        result += tl.load(bias + lane, mask=used, other=0.0).to(tl.float32)[None, :]
    tl.store(out + target, result.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + row, centre, mask=present)
    tl.store(rstd + row, scale, mask=present)


@triton.jit
def backward_kernel(
    gradient, extra, x, weight, mean, rstd, dx, weight_parts, bias_parts, rows, inner, x_outer, x_inner, tiles,
    EXTRA: tl.constexpr, WEIGHT: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`tiles` neighbouring tiles of ROWS rows a program: dx of each row, and one row of partial sums of the program."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    used = lane < WIDTH
    if WEIGHT:
        factor = tl.load(weight + lane, mask=used, other=0.0).to(tl.float32)[None, :]
    weight_sum = tl.zeros([ROWS, LANES], dtype=tl.float32)
    bias_sum = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        present = row < rows
        inside = present[:, None] & used[None, :]
        source = ((row // inner) * x_outer + (row % inner) * x_inner)[:, None] + lane[None, :]
        target = row[:, None] * WIDTH + lane[None, :]
        scale = tl.load(rstd + row, mask=present, other=0.0)
        centre = tl.load(mean + row, mask=present, other=0.0)
        values = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
        unit = tl.where(inside, (values - centre[:, None]) * scale[:, None], 0.0)
        scaled = tl.load(gradient + target, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT_GRADIENT:
            weight_sum += scaled * unit
        if BIAS_GRADIENT:
            bias_sum += scaled
        if WEIGHT:
            scaled *= factor
        along = tl.sum(scaled * unit, axis=1) / WIDTH
        level = tl.sum(scaled, axis=1) / WIDTH
        result = (scaled - level[:, None] - unit * along[:, None]) * scale[:, None]
        if EXTRA:
            result += tl.load(extra + target, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + target, result.to(dx.dtype.element_ty), mask=inside)
    if WEIGHT_GRADIENT:
        tl.store(weight_parts + program * WIDTH + lane, tl.sum(weight_sum, axis=0), mask=used)
    if BIAS_GRADIENT:
        tl.store(bias_parts + program * WIDTH + lane, tl.sum(bias_sum, axis=0), mask=used)


@triton.jit
def sum_kernel(parts, out, count, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """out[d] = sum of the `count` rows parts[:, d], LANES columns a program."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    total = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (lane < WIDTH)[None, :]
        total += tl.load(parts + row.to(tl.int64)[:, None] * WIDTH + lane[None, :], mask=inside, other=0.0)
    tl.store(out + lane, tl.sum(total, axis=0), mask=lane < WIDTH)


def _sizes(width: int) -> dict[str, int]:
    lanes = power_of_two(width)
    return {"WIDTH": width, "LANES": lanes, "ROWS": max(1, TILE // max(lanes, 64))}


def _warps(width: int) -> int:
    """16 values of a tile a thread."""
    return max(4, power_of_two(width) // 512)


SUM = {"LANES": 32, "ROWS": 64}


def _rows(x: Tensor) -> Tensor:
    """x [..., D] -> [outer, inner, D]: two strides are read in place, of more dims where they fold into two."""
    x = rows_in_place(x)
    return x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] -> normalised [..., D], mean [...], 1 / standard deviation [...]."""
    out, _, mean, rstd = _forward(x, None, weight, bias, eps, out_dtype)
    return out, mean, rstd


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + residual in the dtype of the residual, its normalised form in that of x before it, mean and 1 / std after."""
    return _forward(x, residual, weight, bias, eps, x.dtype)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=out_dtype)
    total = out if residual is None else residual.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if out.numel():
        first = _rows(x)
        second = first if residual is None else _rows(residual)
        sizes = _sizes(x.shape[-1])
        with on_device_of(x):
            forward_kernel[(triton.cdiv(mean.numel(), sizes["ROWS"]),)](
                first, second, first if weight is None else weight.contiguous(),
                first if bias is None else bias.contiguous(), out, total, mean, rstd, mean.numel(), first.shape[1],
                first.stride(0), first.stride(1), second.stride(0), second.stride(1), EPS=eps,
                ADD=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None, **sizes,
                num_warps=_warps(x.shape[-1]),
            )  # fmt: skip
    return out, total, mean, rstd


def layer_norm_backward(
    gradient: Tensor,
    extra: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [..., D] in its dtype, plus `extra`; of weight and bias [D] in float32, or [0] each."""
    rows, width = mean.numel(), x.shape[-1]
    dx = x.new_empty(x.shape)
    dweight, dbias = (mean.new_empty(width if wanted else 0) for wanted in (weight_gradient, bias_gradient))
    if not rows:
        return dx, dweight.zero_(), dbias.zero_()
    gradient, mean, rstd, source = gradient.contiguous(), mean.contiguous(), rstd.contiguous(), _rows(x)
    sizes = _sizes(width)
    tiles = 1
    if weight_gradient or bias_gradient:
        tiles = triton.cdiv(triton.cdiv(rows, sizes["ROWS"]), MOST_PROGRAMS)
    programs = triton.cdiv(rows, sizes["ROWS"] * tiles)
    parts = [mean.new_empty(programs, len(d)) for d in (dweight, dbias)]
    with on_device_of(x):
        backward_kernel[(programs,)](
            gradient, gradient if extra is None else extra.contiguous(), source,
            source if weight is None else weight.contiguous(), mean, rstd, dx, *parts, rows, source.shape[1],
            source.stride(0), source.stride(1), tiles, EXTRA=extra is not None, WEIGHT=weight is not None,
            WEIGHT_GRADIENT=weight_gradient, BIAS_GRADIENT=bias_gradient, **sizes, num_warps=_warps(width),
        )  # fmt: skip
        for part, out in zip(parts, (dweight, dbias)):
            if len(out):
                sum_kernel[(triton.cdiv(width, SUM["LANES"]),)](part, out, programs, WIDTH=width, **SUM)
    return dx, dweight, dbias


def shipped() -> Iterator[Shipped]:
    """Every kernel at a predictor's, an encoder's, an odd and the largest width."""
    names = ("rows", "inner", "x_outer", "x_inner", "residual_outer", "residual_inner", "tiles", "count")
    sums = dict.fromkeys(("mean", "rstd", "weight", "bias", "weight_parts", "bias_parts", "parts"), "*fp32")
    for width in (384, 1000, 1280, 8192):
        types = {**dict.fromkeys(names, "i32"), **sums}
        yield Shipped(f"norm sum {width}", sum_kernel, {**types, "out": "*fp32"}, {"WIDTH": width, **SUM})
        for dtype in ("bf16", "fp32"):
            types.update(dict.fromkeys(("x", "residual", "out", "total", "gradient", "extra", "dx"), f"*{dtype}"))
            fixed = {**_sizes(width), "WEIGHT": True}
            forward = {**fixed, "EPS": 1e-6, "BIAS": True}
            backward = {**fixed, "WEIGHT_GRADIENT": True, "BIAS_GRADIENT": True}
            for add in (False, True):
                title, warps = f"{'add ' if add else ''}norm", _warps(width)
                yield Shipped(f"{title} {dtype} {width}", forward_kernel, types, {**forward, "ADD": add}, warps)
                back = f"{title} back {dtype} {width}"
                yield Shipped(back, backward_kernel, types, {**backward, "EXTRA": add}, warps)
