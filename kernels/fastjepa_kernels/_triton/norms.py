"""Layer normalisation, alone and after the addition of a residual: a row is read once and stays in registers.

The backward pass is one pass over the rows. A fixed number of programs share them, independent of the GPU; each sums
the gradients of the parameters over its own rows into one row of float32 each, and a second kernel adds those in order.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.launch import (
    Shipped,
    combinations,
    folded,
    on_device_of,
    pinned,
    pointer,
    power_of_two,
)
from fastjepa_kernels.config import lookup

# Channels up to which the sums of all four parameters fit into registers; longer rows take a second pass.
ONE_PASS = 4096


@triton.jit
def _clip(row, clip_rows):
    # In 32 bits: a 64-bit division is a call, around which registers spill, and 2^31 rows fit on no GPU.
    return row.to(tl.int32) // clip_rows


@triton.jit
def forward_kernel(
    x, residual, weight, bias, x_bias, branch_scale, row_scale, out, total, mean, rstd, rows, clip_rows, inner,
    x_outer, x_inner, residual_outer, residual_inner,
    EPS: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, X_BIAS: tl.constexpr,
    SCALE: tl.constexpr, ROW_SCALE: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program; with ADD it is residual + row_scale * branch_scale * (x + x_bias) that is stored in `total`
    and normalised; a clip has `clip_rows` rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    present = row < rows
    used = lane < WIDTH
    inside = present[:, None] & used[None, :]
    outer, place = row // inner, row % inner
    source = (outer * x_outer + place * x_inner)[:, None] + lane[None, :]
    target = row[:, None] * WIDTH + lane[None, :]
    values = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    if X_BIAS:
        values += tl.load(x_bias + lane, mask=used, other=0.0).to(tl.float32)[None, :]
    if SCALE:
        values *= tl.load(branch_scale + lane, mask=used, other=0.0).to(tl.float32)[None, :]
    if ROW_SCALE:
        values *= tl.load(row_scale + _clip(row, clip_rows), mask=present, other=0.0).to(tl.float32)[:, None]
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
    gradient, extra, total, weight, mean, rstd, x, x_bias, branch_scale, row_scale, of_total, of_x, parts, rows,
    clip_rows, inner, total_outer, total_inner, x_outer, x_inner, tiles,
    NORM: tl.constexpr, EXTRA: tl.constexpr, WEIGHT: tl.constexpr, X_BIAS: tl.constexpr, SCALE: tl.constexpr,
    ROW_SCALE: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr, X_GRADIENT: tl.constexpr,
    X_BIAS_GRADIENT: tl.constexpr, SCALE_GRADIENT: tl.constexpr,
    WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`tiles` neighbouring tiles of ROWS rows a program: the gradients of each row, and one row of partial sums of the
    program in each of `parts`, those that are wanted, in the order of the switches.

    Without NORM the gradient arrives through the sum alone, and that of the sum is not written: it is `extra`.
    """
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    used = lane < WIDTH
    if WEIGHT and NORM:
        factor = tl.load(weight + lane, mask=used, other=0.0).to(tl.float32)[None, :]
    weight_sum = tl.zeros([ROWS, LANES], dtype=tl.float32)
    bias_sum = tl.zeros([ROWS, LANES], dtype=tl.float32)
    x_bias_sum = tl.zeros([ROWS, LANES], dtype=tl.float32)
    scale_sum = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        present = row < rows
        inside = present[:, None] & used[None, :]
        target = row[:, None] * WIDTH + lane[None, :]
        if NORM:
            source = ((row // inner) * total_outer + (row % inner) * total_inner)[:, None] + lane[None, :]
            scale = tl.load(rstd + row, mask=present, other=0.0)
            centre = tl.load(mean + row, mask=present, other=0.0)
            values = tl.load(total + source, mask=inside, other=0.0).to(tl.float32)
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
            tl.store(of_total + target, result.to(of_total.dtype.element_ty), mask=inside)
        else:
            result = tl.load(extra + target, mask=inside, other=0.0).to(tl.float32)
        if ROW_SCALE:
            result *= tl.load(row_scale + _clip(row, clip_rows), mask=present, other=0.0).to(tl.float32)[:, None]
        if SCALE_GRADIENT:
            place = ((row // inner) * x_outer + (row % inner) * x_inner)[:, None] + lane[None, :]
            branch = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            if X_BIAS:
                branch += tl.load(x_bias + lane, mask=used, other=0.0).to(tl.float32)[None, :]
            scale_sum += result * branch
        if SCALE:
            result *= tl.load(branch_scale + lane, mask=used, other=0.0).to(tl.float32)[None, :]
        if X_BIAS_GRADIENT:
            x_bias_sum += result
        if X_GRADIENT:
            tl.store(of_x + target, result.to(of_x.dtype.element_ty), mask=inside)
    own = parts + program * WIDTH + lane
    every = tl.num_programs(0).to(tl.int64) * WIDTH
    if WEIGHT_GRADIENT:
        tl.store(own, tl.sum(weight_sum, axis=0), mask=used)
    if BIAS_GRADIENT:
        tl.store(own + WEIGHT_GRADIENT * every, tl.sum(bias_sum, axis=0), mask=used)
    if X_BIAS_GRADIENT:
        tl.store(own + (WEIGHT_GRADIENT + BIAS_GRADIENT) * every, tl.sum(x_bias_sum, axis=0), mask=used)
    if SCALE_GRADIENT:
        before = WEIGHT_GRADIENT + BIAS_GRADIENT + X_BIAS_GRADIENT
        tl.store(own + before * every, tl.sum(scale_sum, axis=0), mask=used)


@triton.jit
def sum_kernel(parts, out, count, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """out[n, d] = sum of the `count` rows parts[n, :, d], LANES columns a program; n is the second program id."""
    which = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    total = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for first in range(0, count, ROWS):
        row = which * count + first + tl.arange(0, ROWS)
        inside = (row < (which + 1) * count)[:, None] & (lane < WIDTH)[None, :]
        total += tl.load(parts + row[:, None] * WIDTH + lane[None, :], mask=inside, other=0.0)
    tl.store(out + which * WIDTH + lane, tl.sum(total, axis=0), mask=lane < WIDTH)


def _sizes(operation: str, width: int, **where: Any) -> dict[str, int]:
    """Of "layer_norm" and its backward pass; ROWS shrinks as rows grow, so that a tile stays in registers.

    PROGRAMS of the backward pass are at most so many, and so are the rows of partial sums.
    """
    return {"WIDTH": width, "LANES": power_of_two(width), **lookup(operation, width=width, **where)}


def sum_parts(parts: Tensor, out: Tensor, count: int) -> None:
    """out [n, D] = parts [n, `count`, D] summed over `count` in a fixed order, float32; n may be left out."""
    width = parts.shape[-1]
    settings = lookup("layer_norm_sum", device=parts.device, width=width, length=count)
    grid = (triton.cdiv(width, settings["LANES"]), out.numel() // width)
    sum_kernel[grid](parts, out, count, WIDTH=width, **settings)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] -> normalised [..., D], mean [...], 1 / standard deviation [...]."""
    out, _, mean, rstd = _forward(x, None, weight, bias, eps, out_dtype)
    return out, mean, rstd


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """residual + row_scale * scale * (x + x_bias) in the dtype of the residual, its normalised form before it, mean and
    1 / standard deviation after."""
    return _forward(x, residual, weight, bias, eps, out_dtype, x_bias, scale, row_scale)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    x_bias: Tensor | None = None,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=out_dtype)
    total = out if residual is None else residual.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if out.numel():
        first = folded(x)
        second = first if residual is None else folded(residual)
        sizes = _sizes("layer_norm", x.shape[-1], device=x.device, dtype=x.dtype, length=mean.numel())
        with on_device_of(x):
            forward_kernel[(triton.cdiv(mean.numel(), sizes["ROWS"]),)](
                first, second, *(pointer(given, first) for given in (weight, bias, x_bias, scale, row_scale)), out,
                total, mean, rstd, mean.numel(), _clip_rows(mean), first.shape[1], first.stride(0), first.stride(1),
                second.stride(0), second.stride(1), EPS=eps, ADD=residual is not None, WEIGHT=weight is not None,
                BIAS=bias is not None, X_BIAS=x_bias is not None, SCALE=scale is not None,
                ROW_SCALE=row_scale is not None, **sizes,
            )  # fmt: skip
    return out, total, mean, rstd


def _clip_rows(mean: Tensor) -> int:
    """Rows of one clip: statistics are [B, ...], or of a single row."""
    return mean.numel() // mean.shape[0] if mean.ndim else 1


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
    wanted = (weight_gradient, bias_gradient)
    sums = [mean.new_empty(x.shape[-1] if one else 0) for one in wanted]
    none = None, None, None, None, None
    dx, _ = _backward(gradient, extra, x, weight, mean, rstd, *none, *wanted, False, False, sums)
    return dx, sums[0], sums[1]


def add_layer_norm_backward(
    gradient: Tensor | None,
    extra: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor | None,
    x_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    x_dtype: torch.dtype,
    weight_gradient: bool,
    bias_gradient: bool,
    x_gradient: bool,
    x_bias_gradient: bool,
    scale_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum and of x [..., D], and of [parameters wanted, D] in float32, as those of the reference."""
    of_norm, of_branch = (weight_gradient, bias_gradient), (x_bias_gradient, scale_gradient)
    sums = mean.new_empty(sum(of_norm + of_branch), total.shape[-1])
    factors = x, x_bias, scale, row_scale, x_dtype if x_gradient else None
    if gradient is None or total.shape[-1] <= ONE_PASS or not (x_gradient or any(of_branch)):
        of_total, of_x = _backward(gradient, extra, total, weight, mean, rstd, *factors, *of_norm, *of_branch, [sums])
    else:
        split, none = sum(of_norm), (None, None, None, None, None)
        parts, flags = [sums[:split]], (*of_norm, False, False)
        wide, _ = _backward(gradient, extra, total, weight, mean, rstd, *none, *flags, parts, torch.float32)
        parts, flags = [sums[split:]], (False, False, *of_branch)
        _, of_x = _backward(None, wide, total, weight, mean, rstd, *factors, *flags, parts)
        of_total = wide.to(total.dtype)
    return of_total, of_x if x_gradient else of_x.to(x_dtype), sums


def _backward(
    gradient: Tensor | None,
    extra: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor | None,
    x_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    x_dtype: torch.dtype | None,
    weight_gradient: bool,
    bias_gradient: bool,
    x_bias_gradient: bool,
    scale_gradient: bool,
    sums: list[Tensor],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum (of its dtype, or another) and of x, where its dtype is given; of parameters into `sums`."""
    rows, width = mean.numel(), total.shape[-1]
    of_total = total.new_empty(0 if gradient is None else total.shape, dtype=dtype)
    of_x = total.new_empty(0 if x_dtype is None else total.shape, dtype=x_dtype)
    if not rows:
        for one in sums:
            one.zero_()
        return of_total, of_x
    mean, rstd, source = mean.contiguous(), rstd.contiguous(), folded(total)
    branch = source if x is None else folded(x)
    sizes = _sizes("layer_norm_backward", width, device=total.device, dtype=total.dtype, length=rows)
    most_programs = sizes.pop("PROGRAMS")
    wanted = sum((weight_gradient, bias_gradient, x_bias_gradient, scale_gradient))
    tiles = triton.cdiv(triton.cdiv(rows, sizes["ROWS"]), most_programs) if wanted else 1
    programs = triton.cdiv(rows, sizes["ROWS"] * tiles)
    parts = mean.new_empty(wanted, programs, width)
    with on_device_of(total):
        backward_kernel[(programs,)](
            pointer(gradient, source), pointer(extra, source), source, pointer(weight, source), mean, rstd, branch,
            *(pointer(given, source) for given in (x_bias, scale, row_scale)), of_total, of_x, parts, rows,
            _clip_rows(mean), source.shape[1], source.stride(0), source.stride(1), branch.stride(0),
            branch.stride(1), tiles, NORM=gradient is not None, EXTRA=extra is not None, WEIGHT=weight is not None,
            X_BIAS=x_bias is not None, SCALE=scale is not None, ROW_SCALE=row_scale is not None,
            WEIGHT_GRADIENT=weight_gradient, BIAS_GRADIENT=bias_gradient, X_GRADIENT=x_dtype is not None,
            X_BIAS_GRADIENT=x_bias_gradient, SCALE_GRADIENT=scale_gradient, **sizes,
        )  # fmt: skip
        first = 0
        for one in sums:
            if count := one.numel() // width:
                sum_parts(parts[first], one, programs)
                first += count
    return of_total, of_x


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Every kernel at a predictor's, an encoder's and the largest width; the addition plain and with all."""
    numbers = "rows clip_rows inner x_outer x_inner residual_outer residual_inner total_outer total_inner"
    wide = "mean rstd weight bias x_bias branch_scale row_scale parts"
    narrow = "x residual out total gradient extra of_total of_x"
    types = {**dict.fromkeys((*numbers.split(), "tiles", "count"), "i32"), **dict.fromkeys(wide.split(), "*fp32")}
    for width in (384, 1280, 8192):
        summing = {"WIDTH": width, **lookup("layer_norm_sum", architecture=architecture, width=width)}
        yield pinned(f"norm sum {width}", sum_kernel, {**types, "out": "*fp32"}, summing)
        for dtype in ("bf16", "fp32"):
            where = {"architecture": architecture, "dtype": dtype}
            fixed: dict[str, Any] = {**_sizes("layer_norm", width, **where), "WEIGHT": True}
            backward: dict[str, Any] = {**_sizes("layer_norm_backward", width, **where), "WEIGHT": True}
            del backward["PROGRAMS"]
            same = {**types, **dict.fromkeys(narrow.split(), f"*{dtype}")}
            # The stream of the residual is float32.
            mixed = {**same, **dict.fromkeys(("residual", "total", "extra", "of_total"), "*fp32")}
            for title, add, full in (("norm", False, False), ("add norm", True, False), ("add norm all", True, True)):
                settings = {**fixed, "EPS": 1e-6, "ADD": add, "BIAS": True, **_factors(full)}
                forward = mixed if full else same
                yield pinned(f"{title} {dtype} {width}", forward_kernel, forward, settings)
            norm = {**backward, "NORM": True, "WEIGHT_GRADIENT": True, "BIAS_GRADIENT": True}
            plain = {**_factors(False), **_of_branch(False)}
            every = {**_factors(True), **_of_branch(True)}
            none = {**norm, **dict.fromkeys(("NORM", "WEIGHT_GRADIENT", "BIAS_GRADIENT"), False)}
            back = [
                ("norm back", same, {**norm, **plain, "EXTRA": False}),
                ("add norm back", same, {**norm, **plain, "EXTRA": True}),
                ("add back all", mixed, {**none, **every, "EXTRA": True}),
                ("add norm back all", mixed, {**norm, **every, "EXTRA": True}),
            ]
            for title, pointers, settings in back[: None if width <= ONE_PASS else -1]:
                yield pinned(f"{title} {dtype} {width}", backward_kernel, pointers, settings)


def _factors(there: bool) -> dict[str, bool]:
    return dict.fromkeys(("X_BIAS", "SCALE", "ROW_SCALE"), there)


def _of_branch(wanted: bool) -> dict[str, bool]:
    return dict.fromkeys(("X_GRADIENT", "X_BIAS_GRADIENT", "SCALE_GRADIENT"), wanted)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries: tiles of up to 8192 values, 2 to 64 of them a thread."""
    lanes = power_of_two(width)
    tiles = [
        one
        for one in combinations(ROWS=(1, 2, 4, 8, 16, 32, 64), num_warps=(1, 2, 4, 8, 16))
        if (one["ROWS"] == 1 or one["ROWS"] * lanes <= 8192) and 2 <= one["ROWS"] * lanes / one["num_warps"] / 32 <= 64
    ]
    backward = [{**one, "PROGRAMS": programs} for one in tiles for programs in (256, 512, 1024)]
    sums = combinations(LANES=(32, 64, 128), ROWS=(16, 32, 64, 128), num_warps=(4, 8))
    return {"layer_norm": tiles, "layer_norm_backward": backward, "layer_norm_sum": sums}
