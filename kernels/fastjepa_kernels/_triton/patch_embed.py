"""Embedding of kept patches: pixels of other patches are not read, and a clip is normalised as it is loaded.

Two forms: a matrix product that cuts its patches on load, and a kernel that cuts them for a product of the library.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.launch import Shipped, combinations, on_device_of, pinned, power_of_two, rows_in_place
from fastjepa_kernels._triton.product import tile_of
from fastjepa_kernels.config import lookup
from fastjepa_kernels.precision import as_given


@triton.jit
def token_of(row, index, clips, kept, present, ALL: tl.constexpr):
    """Clip and token number of a row of the result, int64."""
    clip = (row // kept) % clips
    token = row % kept
    if not ALL:
        token = tl.load(index + row, mask=present, other=0).to(tl.int64)
    return clip, token


@triton.jit
def corner(token, clip, high, wide, v_clip, v_frame, v_line, TUBELET: tl.constexpr, PATCH: tl.constexpr):
    """Offset of the first pixel of a token."""
    first = token // (high * wide) * TUBELET * v_frame + token // wide % high * PATCH * v_line + token % wide * PATCH
    return clip * v_clip + first


@triton.jit
def place_of(lane, v_channel, v_frame, v_line, TUBELET: tl.constexpr, PATCH: tl.constexpr):
    """Channel, and offset from the corner, of value `lane` of a patch, in the order (c, t, p, q) of Conv3d's weight."""
    channel = lane // (TUBELET * PATCH * PATCH)
    frame = lane // (PATCH * PATCH) % TUBELET
    return channel, channel * v_channel + frame * v_frame + lane // PATCH % PATCH * v_line + lane % PATCH


@triton.jit
def normalise(values, channel, CHANNELS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """values * SCALE[channel] + SHIFT[channel] in float32; `channel` has the shape of the values or spreads to it."""
    scale = tl.zeros_like(channel).to(tl.float32) + SCALE[0]
    shift = tl.zeros_like(channel).to(tl.float32) + SHIFT[0]
    for n in tl.static_range(1, CHANNELS):
        scale = tl.where(channel == n, SCALE[n], scale)
        shift = tl.where(channel == n, SHIFT[n], shift)
    return values.to(tl.float32) * scale + shift


@triton.jit
def cut_kernel(
    video, index, out, clips, kept, high, wide, v_clip, v_channel, v_frame, v_line,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, CHANNELS: tl.constexpr, TUBELET: tl.constexpr, PATCH: tl.constexpr,
    ALL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One kept patch a program of axis 0, LANES of its values each of axis 1."""
    row = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = CHANNELS * TUBELET * PATCH * PATCH
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    clip, token = token_of(row, index, clips, kept, True, ALL)
    start = corner(token, clip, high, wide, v_clip, v_frame, v_line, TUBELET, PATCH)
    channel, place = place_of(lane, v_channel, v_frame, v_line, TUBELET, PATCH)
    values = tl.load(video + start + place, mask=lane < size, other=0)
    values = normalise(values, channel, CHANNELS, SCALE, SHIFT)
    tl.store(out + row * size + lane, values.to(out.dtype.element_ty), mask=lane < size)


@triton.jit
def finish_kernel(
    x, index, bias, position, out, clips, kept,
    BIAS: tl.constexpr, POSITION: tl.constexpr, ALL: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row a program: product + bias + position of its token, added in float32."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = lane < WIDTH
    values = tl.load(x + row * WIDTH + lane, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        values += tl.load(bias + lane, mask=inside, other=0.0).to(tl.float32)
    if POSITION:
        _, token = token_of(row, index, clips, kept, True, ALL)
        values += tl.load(position + token * WIDTH + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + lane, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def fused_kernel(
    video, index, weight, bias, position, out, rows, clips, kept, high, wide, v_clip, v_channel, v_frame, v_line,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, CHANNELS: tl.constexpr, TUBELET: tl.constexpr, PATCH: tl.constexpr,
    ALL: tl.constexpr, BIAS: tl.constexpr, POSITION: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the result a program: patches are cut and normalised on load, rounded to the weight's dtype."""
    size: tl.constexpr = CHANNELS * TUBELET * PATCH * PATCH
    down, across = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(WIDTH, COLUMNS), GROUP)
    row = down.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    present, used = row < rows, column < WIDTH
    clip, token = token_of(row, index, clips, kept, present, ALL)
    start = video + corner(token, clip, high, wide, v_clip, v_frame, v_line, TUBELET, PATCH)
    line = weight + column.to(tl.int64) * size
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, size, STEP):
        lane = first + tl.arange(0, STEP)
        channel, place = place_of(lane, v_channel, v_frame, v_line, TUBELET, PATCH)
        inside = present[:, None] & (lane < size)[None, :]
        values = tl.load(start[:, None] + place[None, :], mask=inside, other=0)
        values = normalise(values, channel[None, :], CHANNELS, SCALE, SHIFT).to(weight.dtype.element_ty)
        factor = tl.load(line[None, :] + lane[:, None], mask=used[None, :] & (lane < size)[:, None], other=0.0)
        total = tl.dot(values, factor, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + column, mask=used, other=0.0).to(tl.float32)[None, :]
    inside = present[:, None] & used[None, :]
    if POSITION:
        total += tl.load(position + token[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * WIDTH + column[None, :], total.to(out.dtype.element_ty), mask=inside)


def _lanes(values: int) -> int:
    return min(1024, power_of_two(values))


def _clip(video: Tensor, index: Tensor | None, mean: list[float], std: list[float], tubelet: int, patch: int) -> Any:
    """How all kernels read the clip: (video, index), kept rows in all, further arguments, constants."""
    video = rows_in_place(video)
    clips, channels, frames, height, width = video.shape
    high, wide = height // patch, width // patch
    kept = frames // tubelet * high * wide if index is None else index.shape[2]
    rows = clips * kept * (1 if index is None else index.shape[0])
    unit = 1.0 if video.dtype.is_floating_point else 255.0
    fixed = {
        "SCALE": tuple(1.0 / (unit * spread) for spread in std or [1.0] * channels),
        "SHIFT": tuple(-level / spread for level, spread in zip(mean, std)) or (0.0,) * channels,
        "CHANNELS": channels, "TUBELET": tubelet, "PATCH": patch, "ALL": index is None,
    }  # fmt: skip
    return (video, video if index is None else index.contiguous()), rows, (clips, kept, high, wide), fixed


def _cut(
    video: Tensor, index: Tensor | None, mean: list[float], std: list[float], tubelet: int, patch: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Normalised kept patches [rows, C * t * p * p]."""
    (source, places), rows, counts, fixed = _clip(video, index, mean, std, tubelet, patch)
    size = video.shape[1] * tubelet * patch * patch
    out = video.new_empty(rows, size, dtype=dtype)
    lanes = _lanes(size)
    if rows:
        cut_kernel[(rows, triton.cdiv(size, lanes))](
            source, places, out, *counts, *source.stride()[:4], **fixed, LANES=lanes
        )
    return out


def patch_embed_gather(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    position: Tensor | None,
    mean: list[float],
    std: list[float],
    tubelet: int,
    patch: int,
    out_dtype: torch.dtype,
    fused: bool,
) -> Tensor:
    """-> [M * B, K, D], weight [D, C * t * p * p], position [N, D]; `fused` cuts in the product."""
    (source, places), rows, (clips, kept, high, wide), fixed = _clip(video, index, mean, std, tubelet, patch)
    width = weight.shape[0]
    out = weight.new_empty(rows // kept if kept else clips, kept, width, dtype=out_dtype)
    if not out.numel():
        return out
    weight = weight.contiguous()
    added = weight if bias is None else bias.contiguous(), weight if position is None else position.contiguous()
    given = {"BIAS": bias is not None, "POSITION": position is not None, "WIDTH": width}
    with on_device_of(video):
        if fused:
            sizes = lookup("patch_embed_gather", device=video.device, dtype=weight.dtype, width=width, length=rows)
            grid = (triton.cdiv(rows, sizes["ROWS"]) * triton.cdiv(width, sizes["COLUMNS"]),)
            fused_kernel[grid](
                source, places, weight, *added, out, rows, clips, kept, high, wide, *source.stride()[:4], **fixed,
                **given, **sizes,
            )  # fmt: skip
            return out
        patches = _cut(video, index, mean, std, tubelet, patch, weight.dtype)
        alone = position is None and out_dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
        with as_given(video):
            product = F.linear(patches, weight, bias if alone else None)
        if alone:
            return product.view(out.shape)
        lanes = _lanes(width)
        finish_kernel[(rows, triton.cdiv(width, lanes))](
            product, places, *added, out, clips, kept, ALL=index is None, **given, LANES=lanes
        )
    return out


def patch_embed_gather_backward(
    gradient: Tensor,
    video: Tensor,
    index: Tensor | None,
    mean: list[float],
    std: list[float],
    tubelet: int,
    patch: int,
    dtype: torch.dtype,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [D, C * t * p * p] in its `dtype` and of bias [D] in float32, [0] where not wanted."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    dweight, dbias = gradient.new_empty(0, dtype=dtype), gradient.new_empty(0, dtype=torch.float32)
    with on_device_of(video), as_given(video):
        if weight_gradient:
            dweight = rows.to(dtype).T @ _cut(video, index, mean, std, tubelet, patch, dtype)
        if bias_gradient:
            dbias = rows.sum(0, dtype=torch.float32)
    return dweight, dbias


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Bytes and floats, the published patch, a predictor's and an encoders' widths."""
    counts = dict.fromkeys(("rows", "clips", "kept", "high", "wide", "v_clip", "v_channel", "v_frame", "v_line"), "i32")
    colour = {"SCALE": (0.02, 0.02, 0.02), "SHIFT": (-2.1, -2.0, -1.8), "CHANNELS": 3, "TUBELET": 2, "PATCH": 16}
    for pixel, dtype in (("u8", torch.bfloat16), ("u8", torch.float32), ("fp32", torch.bfloat16)):
        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        types = {**counts, "video": f"*{pixel}", "index": "*i64", "bias": "*fp32", "position": "*fp32"}
        types.update(dict.fromkeys(("weight", "out", "x"), f"*{name}"))
        fixed = {**colour, "ALL": False}
        yield Shipped(f"cut {pixel} {name}", cut_kernel, types, {**fixed, "LANES": _lanes(1536)})
        for width in (1024, 1408):
            given = {"BIAS": True, "POSITION": True, "WIDTH": width}
            sizes = lookup("patch_embed_gather", architecture=architecture, dtype=name, width=width)
            title = f"patch embed {pixel} {name} {width}"
            yield pinned(title, fused_kernel, types, {**fixed, **given, **sizes})
            if pixel != "u8":  # what is finished are products: the pixels do not matter
                continue
            finish = {**given, "ALL": False, "LANES": _lanes(width)}
            yield Shipped(f"patch finish {name} {width}", finish_kernel, types, finish)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries for the fused form."""
    blocks = {"ROWS": (32, 64, 128), "COLUMNS": (64, 128), "STEP": (16, 32, 64), "GROUP": (8,)}
    return {"patch_embed_gather": combinations(**blocks, num_warps=(4, 8), num_stages=(2, 3, 4))}
