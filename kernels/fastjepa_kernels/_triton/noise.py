"""Rows normalised, mixed with noise made in registers, positions added: each is read once and written once.

Backward reads the gradient and the rows; the noise has no part in it. With an index it looks from the tokens: an
inverse index says which kept row a token became, so every row of the gradient is written once, zeros included.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton import philox
from fastjepa_kernels._triton.gather import invert_kernel
from fastjepa_kernels._triton.launch import Shipped, folded, on_device_of, pinned, pointer
from fastjepa_kernels._triton.philox import noise_tile

# Where the position of a row stands: nowhere, in a row that repeats with a period, in the table row of its index.
NOWHERE, PERIOD, TABLE = 0, 1, 2


@triton.jit
def noised_tile(
    x, source, alpha, share_of, row_key, seed, noise, mean, rstd, row, present, lane,
    EPS: tl.constexpr, RECORDED: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Rows of x at the offsets `source`, normalised and mixed, float32 [ROWS, LANES]; their statistics are stored.

    `row` counts rows of the result, `share_of` is the place of each in alpha.
    """
    inside = present[:, None] & (lane < WIDTH)[None, :]
    values = tl.load(x + source[:, None] + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    centre = tl.sum(values, axis=1) / WIDTH
    centred = tl.where(inside, values - centre[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / WIDTH + EPS)
    tl.store(mean + row, centre, mask=present)
    tl.store(rstd + row, scale, mask=present)
    if RECORDED:
        drawn = tl.load(noise + row[:, None] * WIDTH + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        drawn = noise_tile(tl.load(row_key + row, mask=present, other=0), tl.load(seed), LANES)
    share = tl.load(alpha + share_of, mask=present, other=0.0).to(tl.float32)
    signal = tl.sqrt_rn(share) * scale
    return centred * signal[:, None] + tl.sqrt_rn(1.0 - share)[:, None] * drawn


@triton.jit
def forward_kernel(
    x, index, alpha, row_key, seed, noise, position, out, mean, rstd, rows, inner, x_outer, x_inner, share, period,
    EPS: tl.constexpr, GATHER: tl.constexpr, POSITION: tl.constexpr, RECORDED: tl.constexpr,
    WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program; `share` neighbouring rows have one alpha."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    present = row < rows
    inside = present[:, None] & (lane < WIDTH)[None, :]
    place = row % inner
    if GATHER:
        place = tl.load(index + row, mask=present, other=0).to(tl.int64)
    result = noised_tile(
        x, (row // inner) * x_outer + place * x_inner, alpha, row // share, row_key, seed, noise, mean, rstd, row,
        present, lane, EPS, RECORDED, WIDTH, LANES,
    )  # fmt: skip
    if POSITION == 1:
        place = row % period
    if POSITION != 0:
        result += tl.load(position + place[:, None] * WIDTH + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * WIDTH + lane[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gradient, x, inverse, alpha, mean, rstd, dx, rows, inner, g_outer, g_inner, x_outer, x_inner, kept, share,
    GATHER: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of dx a program; with GATHER they are tokens, and those that nobody kept are zero."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    present = row < rows
    outer, place = row // inner, row % inner
    source = outer * x_outer + place * x_inner
    there = present
    kept_row = row
    if GATHER:
        place = tl.load(inverse + row, mask=present, other=-1).to(tl.int64)
        there = place >= 0
        kept_row = outer * kept + place
    inside = there[:, None] & (lane < WIDTH)[None, :]
    scale = tl.load(rstd + kept_row, mask=there, other=0.0)
    centre = tl.load(mean + kept_row, mask=there, other=0.0)
    values = tl.load(x + source[:, None] + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    unit = tl.where(inside, (values - centre[:, None]) * scale[:, None], 0.0)
    from_row = gradient + (outer * g_outer + place * g_inner)[:, None]
    moved = tl.load(from_row + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(moved * unit, axis=1) / WIDTH
    level = tl.sum(moved, axis=1) / WIDTH
    signal = scale * tl.sqrt_rn(tl.load(alpha + kept_row // share, mask=there, other=0.0).to(tl.float32))
    result = (moved - level[:, None] - unit * along[:, None]) * signal[:, None]
    written = present[:, None] & (lane < WIDTH)[None, :]
    tl.store(dx + row[:, None] * WIDTH + lane[None, :], result.to(dx.dtype.element_ty), mask=written)


def _forward(
    x: Tensor,
    index: Tensor | None,
    alpha: Tensor,
    row_key: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    position: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, width = x.shape[:-1] if index is None else index.shape, x.shape[-1]
    out = x.new_empty((*shape, width), dtype=out_dtype)
    mean, rstd = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    rows = mean.numel()
    if out.numel():
        source, where = folded(x), PERIOD if index is None else TABLE
        inner = source.shape[1] if index is None else index.shape[1]
        fixed = philox.tiles(width, device=x.device, dtype=x.dtype, length=inner)
        with on_device_of(x):
            forward_kernel[(triton.cdiv(rows, fixed["ROWS"]),)](
                source, pointer(index, source), alpha.contiguous(), pointer(row_key, source), pointer(seed, source),
                pointer(noise, source), pointer(position, source), out, mean, rstd, rows, inner, source.stride(0),
                source.stride(1), rows // alpha.numel(), 1 if position is None else position.numel() // width,
                EPS=eps, GATHER=index is not None, POSITION=NOWHERE if position is None else where,
                RECORDED=noise is not None, WIDTH=width, **fixed,
            )  # fmt: skip
    return out, mean, rstd


def layer_norm_noise(
    x: Tensor,
    alpha: Tensor,
    row_key: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    position: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] -> mixed [..., D], mean [...], 1 / standard deviation [...]."""
    return _forward(x, None, alpha, row_key, seed, noise, position, eps, out_dtype)


def gather_norm_noise(
    x: Tensor,
    index: Tensor,
    alpha: Tensor,
    row_key: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    position: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, N, D], index [B, K], position [N, D] -> mixed [B, K, D], mean [B, K], 1 / standard deviation [B, K]."""
    return _forward(x, index, alpha, row_key, seed, noise, position, eps, out_dtype)


def noise_backward(
    gradient: Tensor, x: Tensor, index: Tensor | None, alpha: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Gradient [..., D] of the mixed rows -> that of x; any two strides of the gradient's rows are read in place."""
    width = x.shape[-1]
    dx = x.new_empty(x.shape)
    if not mean.numel() or not dx.numel():
        return dx.zero_()
    gradient, source = folded(gradient), folded(x)
    fixed = philox.tiles(width, device=x.device, dtype=x.dtype, length=source.shape[1])
    kept, inverse = 0, mean
    with on_device_of(x):
        if index is not None:
            kept = index.shape[1]
            inverse = torch.full(x.shape[:2], -1, dtype=torch.int32, device=x.device)
            invert_kernel[(index.numel(),)](index.contiguous(), inverse, kept, x.shape[1])
        rows = dx.numel() // width
        backward_kernel[(triton.cdiv(rows, fixed["ROWS"]),)](
            gradient, source, inverse, alpha.contiguous(), mean.contiguous(), rstd.contiguous(), dx, rows,
            source.shape[1], gradient.stride(0), gradient.stride(1), source.stride(0), source.stride(1), kept,
            mean.numel() // alpha.numel(), GATHER=index is not None, WIDTH=width, **fixed,
        )  # fmt: skip
    return dx


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Both kernels at a predictor's, an odd and the largest width, with and without index, noise made and handed in."""
    numbers = ("rows", "inner", "x_outer", "x_inner", "g_outer", "g_inner", "share", "period", "kept")
    floats = dict.fromkeys(("alpha", "mean", "rstd", "noise", "position"), "*fp32")
    types = {**dict.fromkeys(numbers, "i32"), **floats, "index": "*i64", "row_key": "*i64", "seed": "*i64"}
    for dtype, width in (("bf16", 384), ("bf16", 1000), ("fp32", 8192)):
        types = {**types, **dict.fromkeys(("x", "gradient", "dx"), f"*{dtype}"), "out": "*fp32", "inverse": "*i32"}
        fixed = {"WIDTH": width, **philox.tiles(width, architecture=architecture, dtype=dtype)}
        for gather in (False, True):
            name = f"{'gather ' * gather}noise"
            for recorded in (False, True):
                more = {"EPS": 1e-5, "GATHER": gather, "POSITION": TABLE if gather else PERIOD, "RECORDED": recorded}
                title = f"{name}{' recorded' * recorded} {dtype} {width}"
                yield pinned(title, forward_kernel, types, {**fixed, **more})
            yield pinned(f"{name} back {dtype} {width}", backward_kernel, types, {**fixed, "GATHER": gather})


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries: nothing of its own, the settings are those of `philox_normal`."""
    return {}
