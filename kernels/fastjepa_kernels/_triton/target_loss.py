"""Error against normalised targets: every kept row is read once, normalised in registers and never written.

One program a row leaves a sum; a second kernel adds the sums up in a fixed order. The backward pass reads the same rows
again, with mean and deviation kept from before.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.launch import Shipped, combinations, on_device_of, pinned, power_of_two, rows_in_place
from fastjepa_kernels.config import lookup


@triton.jit
def _power(size, EXPONENT: tl.constexpr):
    """size ** EXPONENT for numbers that are not negative; 0 stays 0, NaN stays NaN."""
    if EXPONENT == 1.0:
        result = size
    elif EXPONENT == 2.0:
        result = size * size
    else:
        zero = size == 0.0
        result = tl.where(zero, 0.0, tl.exp2(EXPONENT * tl.log2(tl.where(zero, 1.0, size))))
    return result


@triton.jit
def _row(
    prediction, target, index, row, lane, inside, clips, kept, p_clip, p_token, t_clip, t_token
):  # fmt: skip
    """Prediction and target of a kept row, float32; 0 beyond its channels."""
    pair, place = row // kept, row % kept
    token = tl.load(index + row).to(tl.int64)
    p = tl.load(prediction + pair * p_clip + place * p_token + lane, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(target + (pair % clips) * t_clip + token * t_token + lane, mask=inside, other=0.0).to(tl.float32)
    return p, t


@triton.jit
def row_kernel(
    prediction, target, index, partial, mean, rstd, clips, kept, p_clip, p_token, t_clip, t_token,
    EXPONENT: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One kept row a program: the sum of |p - t| ** EXPONENT, with t of mean 0 and deviation 1."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < WIDTH
    p, t = _row(prediction, target, index, row, lane, inside, clips, kept, p_clip, p_token, t_clip, t_token)
    centre = tl.sum(t, axis=0) / WIDTH
    centred = tl.where(inside, t - centre, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / WIDTH + EPS)
    total = tl.sum(_power(tl.abs(p - centred * scale), EXPONENT), axis=0)
    tl.store(partial + row, total)
    tl.store(mean + row, centre)
    tl.store(rstd + row, scale)


@triton.jit
def total_kernel(partial, out, rows, EXPONENT: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """One program: the mean of all, from the sums of the rows, always added in the same order."""
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], dtype=tl.float32)
    for start in range(0, rows, LANES):
        total += tl.load(partial + start + lane, mask=start + lane < rows, other=0.0)
    tl.store(out, tl.sum(total, axis=0) / rows / (WIDTH * EXPONENT))


@triton.jit
def row_backward_kernel(
    upstream, prediction, target, index, mean, rstd, out, rows, clips, kept, p_clip, p_token, t_clip, t_token,
    EXPONENT: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One kept row a program: sign(p - t) |p - t| ** (EXPONENT - 1), times the upstream gradient over all values."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < WIDTH
    p, t = _row(prediction, target, index, row, lane, inside, clips, kept, p_clip, p_token, t_clip, t_token)
    difference = p - (t - tl.load(mean + row)) * tl.load(rstd + row)
    if EXPONENT == 2.0:
        slope = difference
    else:
        slope = (difference > 0.0).to(tl.float32) - (difference < 0.0).to(tl.float32)
        if EXPONENT != 1.0:
            slope *= _power(tl.abs(difference), EXPONENT - 1.0)
    scale = tl.load(upstream) / rows / WIDTH
    tl.store(out + row * WIDTH + lane, (slope * scale).to(out.dtype.element_ty), mask=inside)


def _sizes(operation: str, width: int, **where: Any) -> dict[str, int]:
    """Of "target_loss" and its backward pass: a row is held whole, by as many threads as spread its values well."""
    return {"WIDTH": width, "LANES": power_of_two(width), **lookup(operation, width=width, **where)}


def loss(
    prediction: Tensor, target: Tensor, index: Tensor, exponent: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """prediction [M * B, K, D], target [B, N, D], index [M, B, K] -> the loss, mean and 1 / deviation of the rows."""
    prediction, target, index = rows_in_place(prediction), rows_in_place(target), index.contiguous()
    _, clips, kept = index.shape
    where, rows = prediction.device, index.numel()
    sizes = _sizes("target_loss", prediction.shape[2], device=where, dtype=prediction.dtype, length=rows)
    added = lookup("target_loss_total", device=where, length=rows)
    partial, mean, rstd = (
        torch.empty(prediction.shape[:2], dtype=torch.float32, device=prediction.device) for _ in range(3)
    )
    out = torch.empty((), dtype=torch.float32, device=prediction.device)
    with on_device_of(prediction):
        row_kernel[(rows,)](
            prediction, target, index, partial, mean, rstd, clips, kept, *prediction.stride()[:2],
            *target.stride()[:2], EXPONENT=exponent, EPS=eps, **sizes,
        )  # fmt: skip
        total_kernel[(1,)](partial, out, rows, EXPONENT=exponent, WIDTH=sizes["WIDTH"], **added)
    return out, mean, rstd


def loss_backward(
    upstream: Tensor, prediction: Tensor, target: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, exponent: float
) -> Tensor:
    """Gradient [M * B, K, D] of the prediction."""
    prediction, target, index = rows_in_place(prediction), rows_in_place(target), index.contiguous()
    _, clips, kept = index.shape
    out = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    where = {"device": out.device, "dtype": out.dtype, "length": index.numel()}
    sizes = _sizes("target_loss_backward", out.shape[2], **where)
    with on_device_of(prediction):
        row_backward_kernel[(index.numel(),)](
            upstream, prediction, target, index, mean.contiguous(), rstd.contiguous(), out, index.numel(), clips, kept,
            *prediction.stride()[:2], *target.stride()[:2], EXPONENT=exponent, **sizes,
        )  # fmt: skip
    return out


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Every kernel at the usual, an odd and the largest width, with the exponents that have code of their own."""
    numbers = ("rows", "clips", "kept", "p_clip", "p_token", "t_clip", "t_token")
    floats = dict.fromkeys(("partial", "mean", "rstd", "upstream"), "*fp32")
    for exponent in (1.0, 2.0, 1.5):
        fixed = {"EXPONENT": exponent, "WIDTH": 1280, **lookup("target_loss_total", architecture=architecture)}
        yield pinned(f"loss total q={exponent}", total_kernel, {**floats, "rows": "i32", "out": "*fp32"}, fixed)
        for dtype, width in (("bf16", 1280), ("fp32", 1000), ("bf16", 8192), ("fp32", 8192)):
            values = dict.fromkeys(("prediction", "target", "out"), f"*{dtype}")
            types = {**dict.fromkeys(numbers, "i32"), **floats, **values, "index": "*i64"}
            name = f"{dtype} {width} q={exponent}"
            sizes = _sizes("target_loss", width, architecture=architecture, dtype=dtype)
            yield pinned(f"loss {name}", row_kernel, types, {**sizes, "EXPONENT": exponent, "EPS": 1e-5})
            sizes = _sizes("target_loss_backward", width, architecture=architecture, dtype=dtype)
            yield pinned(f"loss backward {name}", row_backward_kernel, types, {**sizes, "EXPONENT": exponent})


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries: one warp, or more with 2 to 64 values of a row a thread."""
    spread = {n: power_of_two(width) // n // 32 for n in (1, 2, 4, 8, 16)}
    rows = [{"num_warps": n} for n, values in spread.items() if n == 1 or 2 <= values <= 64]
    total = combinations(LANES=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16))
    return {"target_loss": rows, "target_loss_backward": rows, "target_loss_total": total}
