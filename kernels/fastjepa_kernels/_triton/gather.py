"""Rows moved by index, each read once and written once: no expanded index, no atomics, no zero-filling pass.

The backward pass and the scatter look from the other side: an inverse index says for every token which kept row holds
it, so every row of the result is written exactly once, in a fixed order of addition.
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
def gather_kernel(x, index, out, clips, kept, x_clip, x_token, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """One kept row a program: out[m, b, k] = x[b, index[m, b, k]]."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    clip = (row // kept) % clips
    token = tl.load(index + row).to(tl.int64)
    values = tl.load(x + clip * x_clip + token * x_token + lane, mask=lane < WIDTH)
    tl.store(out + row * WIDTH + lane, values, mask=lane < WIDTH)


@triton.jit
def invert_kernel(index, inverse, kept, tokens):
    """inverse[m, b, index[m, b, k]] = k; the buffer holds -1 before."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(index + row).to(tl.int64)
    tl.store(inverse + (row // kept) * tokens + token, (row % kept).to(tl.int32))


@triton.jit
def sum_kernel(
    gradient, inverse, out, clips, kept, tokens, MASKS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr
):
    """One token a program: out[b, n] = sum over masks of the kept row that holds it; zero where none does."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = lane < WIDTH
    total = tl.zeros([LANES], dtype=tl.float32)
    for mask in range(MASKS):
        place = tl.load(inverse + mask * clips * tokens + row).to(tl.int64)
        start = (mask * clips + row // tokens) * kept + place
        total += tl.load(gradient + start * WIDTH + lane, mask=inside & (place >= 0), other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + lane, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def segment_sum_kernel(
    gradient, order, first, out, clips, kept, tokens, MASKS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr
):
    """Like `sum_kernel` where a mask may name a token many times: rows order[first[n]:first[n + 1]] belong to it."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = lane < WIDTH
    clip, token = row // tokens, row % tokens
    total = tl.zeros([LANES], dtype=tl.float32)
    for mask in range(MASKS):
        pair = mask * clips + clip
        begin = tl.load(first + pair * (tokens + 1) + token)
        end = tl.load(first + pair * (tokens + 1) + token + 1)
        for place in range(begin, end):
            source = pair * kept + tl.load(order + pair * kept + place)
            total += tl.load(gradient + source * WIDTH + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + lane, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def scatter_kernel(
    x, inverse, fill, out, kept, tokens, x_clip, x_token, FILLED: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr
):
    """One token a program: out[b, n] = the kept row that holds it, or the fill row."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = lane < WIDTH
    place = tl.load(inverse + row).to(tl.int64)
    values = tl.load(x + (row // tokens) * x_clip + place * x_token + lane, mask=inside & (place >= 0), other=0.0)
    if FILLED:
        other = tl.load(fill + lane, mask=inside, other=0.0).to(values.dtype)
        values = tl.where(place >= 0, values, other)
    tl.store(out + row * WIDTH + lane, values, mask=inside)


def _sizes(operation: str, width: int, **where: Any) -> dict[str, int]:
    """A longer row than MOST_LANES is shared by several programs."""
    settings = lookup(operation, width=width, **where)
    return {"WIDTH": width, "LANES": min(settings.pop("MOST_LANES"), power_of_two(width)), **settings}


def _inverse(index: Tensor, tokens: int) -> Tensor:
    """int32 [M, B, N]: the place of every token in its mask, -1 where it is not kept."""
    inverse = torch.full((*index.shape[:2], tokens), -1, dtype=torch.int32, device=index.device)
    if index.numel():
        invert_kernel[(index.numel(),)](index, inverse, index.shape[2], tokens)
    return inverse


def gather(x: Tensor, index: Tensor, unique: bool = True) -> Tensor:
    """x [B, N, D], index [M, B, K] -> [M * B, K, D]. `unique` is for the backward pass alone."""
    x, index = rows_in_place(x), index.contiguous()
    masks, clips, kept = index.shape
    width = x.shape[2]
    out = x.new_empty(masks * clips, kept, width)
    if out.numel():
        rows = masks * clips * kept
        sizes = _sizes("gather_tokens", width, device=x.device, dtype=x.dtype, length=rows)
        with on_device_of(x):
            grid = (rows, triton.cdiv(width, sizes["LANES"]))
            gather_kernel[grid](x, index, out, clips, kept, x.stride(0), x.stride(1), **sizes)
    return out


def gather_backward(gradient: Tensor, index: Tensor, tokens: int, unique: bool) -> Tensor:
    """Gradient [M * B, K, D] -> [B, N, D], summed in float32 in a fixed order."""
    gradient, index = gradient.contiguous(), index.contiguous()
    masks, clips, kept = index.shape
    width = gradient.shape[2]
    out = gradient.new_empty(clips, tokens, width)
    if not out.numel():
        return out
    rows = clips * tokens
    sizes = _sizes("gather_tokens_backward", width, device=out.device, dtype=out.dtype, length=rows)
    sizes["MASKS"] = masks
    grid = (rows, triton.cdiv(width, sizes["LANES"]))
    with on_device_of(gradient):
        if unique:
            sum_kernel[grid](gradient, _inverse(index, tokens), out, clips, kept, tokens, **sizes)
        else:
            ordered, order = index.long().sort(dim=-1, stable=True)
            bounds = torch.arange(tokens + 1, device=index.device).expand(masks, clips, tokens + 1).contiguous()
            first = torch.searchsorted(ordered, bounds)
            segment_sum_kernel[grid](gradient, order, first, out, clips, kept, tokens, **sizes)
    return out


def scatter(x: Tensor, index: Tensor, tokens: int, fill: Tensor | None) -> Tensor:
    """x [B, K, D], index [B, K] -> [B, N, D]."""
    x, index = rows_in_place(x), index.contiguous()
    clips, kept, width = x.shape
    out = x.new_empty(clips, tokens, width)
    if out.numel():
        rows = clips * tokens
        sizes = _sizes("scatter_tokens", width, device=x.device, dtype=x.dtype, length=rows)
        with on_device_of(x):
            scatter_kernel[(rows, triton.cdiv(width, sizes["LANES"]))](
                x, _inverse(index.unsqueeze(0), tokens), x if fill is None else fill.contiguous(), out, kept, tokens,
                x.stride(0), x.stride(1), FILLED=fill is not None, **sizes,
            )  # fmt: skip
    return out


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Every kernel at a predictor's and an encoder's width."""
    sizes = dict.fromkeys(("clips", "kept", "tokens", "x_clip", "x_token"), "i32")
    yield Shipped("invert", invert_kernel, {**sizes, "index": "*i64", "inverse": "*i32"}, {})
    for dtype in ("bf16", "fp32"):
        values = dict.fromkeys(("x", "out", "gradient", "fill"), f"*{dtype}")
        types = {**sizes, **values, "index": "*i64", "inverse": "*i32", "order": "*i64", "first": "*i64"}
        for width in (384, 1280):
            for name, kernel, operation, more in (
                ("gather", gather_kernel, "gather_tokens", {}),
                ("sum", sum_kernel, "gather_tokens_backward", {"MASKS": 2}),
                ("segment sum", segment_sum_kernel, "gather_tokens_backward", {"MASKS": 2}),
                ("scatter", scatter_kernel, "scatter_tokens", {"FILLED": True}),
            ):
                fixed = {**_sizes(operation, width, architecture=architecture, dtype=dtype), **more}
                yield pinned(f"{name} {dtype} {width}", kernel, types, fixed)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries, for each of the three operations alike."""
    lanes = [n for n in (256, 512, 1024, 2048, 4096) if n < 2 * power_of_two(width)] or [256]
    rows = combinations(MOST_LANES=lanes, num_warps=(1, 2, 4, 8))
    return dict.fromkeys(("gather_tokens", "gather_tokens_backward", "scatter_tokens"), rows)
