"""Rows made ready for attention once, not in every block that reads them: chosen, biased, turned; and the way back.

Turning a row costs about as much arithmetic as multiplying it, and keeps a GPU from copying it past the registers. So
queries, keys and values that take part are written one after another, and attention runs on those; their gradients are
turned back, summed for the bias and written where the rows came from.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.angles import sine_cosine
from fastjepa_kernels._triton.attention_bias import add_bias, bias_row, store_sums
from fastjepa_kernels._triton.attention_rows import begin_of, chunk, load, origin, span, store, tokens
from fastjepa_kernels._triton.launch import Shipped, combinations, on_device_of, pinned, rows_in_place
from fastjepa_kernels._triton.norms import sum_parts
from fastjepa_kernels.attention_inputs import Inputs
from fastjepa_kernels.config import lookup

SIZES = ("most", "rows", "blocks", "heads", "x_clip", "x_row", "x_head")


@triton.jit(do_not_specialize=SIZES)
def ready_kernel(
    x, index, lengths, starts, ids, bias, out, most, rows, blocks, heads, x_clip, x_row, x_head,
    HEAD: tl.constexpr, FLAT: tl.constexpr, INDEX: tl.constexpr, LENGTHS: tl.constexpr, IDS: tl.constexpr,
    UNIT: tl.constexpr, BIAS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LOG2_THETA: tl.constexpr,
    COMPAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of a clip and head a program, rounded after bias and after turn; absent ones are not written."""
    program = tl.program_id(0).to(tl.int64)
    head = program // blocks % heads
    clip = program // blocks // heads
    begin, count = span(clip, most, starts, lengths, FLAT, LENGTHS)
    place = (program % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    present = place < count
    token = tokens(index, begin, place, present, INDEX)
    first = origin(x, clip, begin, head, x_clip, x_row, x_head, FLAT, UNIT)
    a, b = load(first, token * (x_row * UNIT), present, HEAD)
    bias0, bias1 = bias_row(bias, 0, heads, head, HEAD, BIAS)
    a, b = add_bias(a, b, bias0, bias1, HEAD, BIAS)
    if HEIGHT:
        number = numbers(ids, clip, begin, rows, token, present, FLAT, IDS)
        a, b = turn(a, b, number, HEAD, HEIGHT, WIDTH, LOG2_THETA, COMPAT, False)
    store(out, ((begin + place) * heads + head) * HEAD, present, a, b, HEAD)


@triton.jit(do_not_specialize=SIZES)
def back_kernel(
    x, index, lengths, starts, ids, gradient, sums, most, rows, blocks, heads, x_clip, x_row, x_head,
    HEAD: tl.constexpr, FLAT: tl.constexpr, INDEX: tl.constexpr, LENGTHS: tl.constexpr, IDS: tl.constexpr,
    UNIT: tl.constexpr, SUMS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LOG2_THETA: tl.constexpr,
    COMPAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK ready rows turned back into x, where the rows came from, and its sum over them."""
    program = tl.program_id(0).to(tl.int64)
    head = program // blocks % heads
    clip = program // blocks // heads
    begin, count = span(clip, most, starts, lengths, FLAT, LENGTHS)
    place = (program % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    present = place < count
    token = tokens(index, begin, place, present, INDEX)
    a, b = load(gradient, ((begin + place) * heads + head) * HEAD, present, HEAD)
    if HEIGHT:
        number = numbers(ids, clip, begin, rows, token, present, FLAT, IDS)
        a, b = turn(a, b, number, HEAD, HEIGHT, WIDTH, LOG2_THETA, COMPAT, True)
    if SUMS:
        store_sums(sums + ((clip * blocks + program % blocks) * heads + head) * HEAD, a, b, HEAD)
    # Without an index rows that take no part are within reach, and their zeros are written here.
    written = present if FLAT or INDEX else place < most
    first = origin(x, clip, begin, head, x_clip, x_row, x_head, FLAT, UNIT)
    store(first, token * (x_row * UNIT), written, a, b, HEAD)


@triton.jit
def numbers(ids, clip, begin, rows, token, present, FLAT: tl.constexpr, IDS: tl.constexpr):
    """Token numbers of the rows `token` of a clip: those given for its `rows`, or the rows' own."""
    number = token
    if IDS:
        first = begin if FLAT else clip * rows
        number = tl.load(ids + first + token, mask=present, other=0)
    return number


@triton.jit
def turn(
    a, b, token, HEAD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LOG2_THETA: tl.constexpr,
    COMPAT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rotary positions on all chunks, float32: the map of queries and keys, or BACK its transpose, for gradients."""
    x = turn_chunk(a, token, HEAD, 0, HEIGHT, WIDTH, LOG2_THETA, COMPAT, BACK)
    y = x
    if chunk(HEAD, 1):
        y = turn_chunk(b, token, HEAD, 1, HEIGHT, WIDTH, LOG2_THETA, COMPAT, BACK)
    return x, y


@triton.jit
def turn_chunk(
    x, token, HEAD: tl.constexpr, N: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    LOG2_THETA: tl.constexpr, COMPAT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Chunk N; segments begin at even channels, so a pair never lies in two of them, nor in two chunks."""
    segment: tl.constexpr = HEAD // 3 // 2 * 2
    half: tl.constexpr = segment // 2
    lane = begin_of(HEAD, N) + tl.arange(0, chunk(HEAD, N))
    number = lane % segment % half if COMPAT else lane % segment // 2
    # Channels after the third segment stand still.
    pace = tl.where(lane < 3 * segment, tl.exp2(number.to(tl.float32) * (-LOG2_THETA / half)), 0.0)
    token = token.to(tl.int32)[:, None]
    axis = (lane // segment)[None, :]
    place = tl.where(axis == 0, token // (HEIGHT * WIDTH), tl.where(axis == 1, token // WIDTH % HEIGHT, token % WIDTH))
    sine, cosine = sine_cosine(place.to(tl.float32) * pace[None, :])
    x = x.to(tl.float32)
    if BACK:
        return x * cosine - swap(x * sine)
    else:
        return x * cosine + swap(x) * sine


@triton.jit
def swap(x):
    """(a, b) -> (-b, a) for neighbouring channels: both lie in one thread."""
    first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(-second, first), [x.shape[0], x.shape[1]])


def ready(case: Inputs) -> Inputs:
    """The same attention with separate rows [B, K, H, d], or [R, H, d], that need no index, bias or turn."""
    made = []
    for part, (x, side) in enumerate(zip(case.views(), _sides(case))):
        x = rows_in_place(x)
        # In flat form x is [1, R, H, d].
        lead = (case.clips, side.most) if case.starts is None else x.shape[1:2]
        out = x.new_empty(*lead, case.heads, case.head)
        row = x if case.bias is None else case.bias[part].contiguous()
        _launch(ready_kernel, case, part, x, side, (row, out), BIAS=case.bias is not None)
        made.append(out)
    q, k, v = made
    return case._replace(q=q, k=k, v=v, q_index=None, kv_index=None, bias=None, q_ids=None, kv_ids=None, grid=[])


def back(case: Inputs, made: tuple[Tensor, ...], bias_wanted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ready rows -> those of what they were made of: q, k and v, and of the bias in float32, or [0]."""
    gradients = case.empty_gradients(fill=case.q_index is not None or case.kv_index is not None)
    dq, dk, dv = gradients
    dbias = case.q.new_empty((3, case.heads, case.head) if bias_wanted else (0,), dtype=torch.float32)
    parts = case._replace(q=dq, k=None if case.packed else dk, v=None if case.packed else dv).views()
    for part, (x, gradient, side) in enumerate(zip(parts, made, _sides(case))):
        rows = triton.cdiv(side.most, _settings(case)["BLOCK"]) * case.clips
        sums = dbias.new_empty(rows if bias_wanted else 0, case.heads * case.head)
        _launch(back_kernel, case, part, x, side, (gradient, sums), SUMS=bias_wanted)
        if bias_wanted and not rows:
            dbias[part].zero_()
        elif bias_wanted:
            with on_device_of(x):
                sum_parts(sums, dbias[part], rows)
    return dq, dk, dv, dbias


class _Side(NamedTuple):
    """Of queries, keys or values: index, lengths, token numbers, and the most rows of a clip."""

    picked: Tensor | None
    lengths: Tensor | None
    ids: Tensor | None
    most: int


def _sides(case: Inputs) -> list[_Side]:
    """Those of queries, keys and values; the last are not turned."""
    keys = _Side(case.kv_index, case.kv_lengths, case.kv_ids, case.keys)
    return [_Side(case.q_index, case.q_lengths, case.q_ids, case.queries), keys, keys._replace(ids=None)]


def _settings(case: Inputs) -> dict[str, int]:
    return lookup("indexed_attention_ready", device=case.q.device, dtype=case.q.dtype, width=case.head)


def _launch(kernel, case, part, x, side, pointers, **flags) -> None:
    settings = _settings(case)
    blocks = triton.cdiv(side.most, settings["BLOCK"])
    if not blocks * case.clips:
        return
    strides = x.stride()[:3]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    _, height, width = case.grid if case.grid and part < 2 else (0, 0, 0)
    chosen = (side.picked, side.lengths, case.starts, side.ids)
    with on_device_of(x):
        kernel[(blocks * case.heads * case.clips,)](
            x, *(x if one is None else one.contiguous() for one in chosen), *pointers, side.most, x.shape[1], blocks,
            case.heads, *(stride // unit for stride in strides), HEAD=case.head, FLAT=case.starts is not None,
            INDEX=side.picked is not None, LENGTHS=side.lengths is not None, IDS=side.ids is not None, UNIT=unit,
            HEIGHT=height, WIDTH=width, LOG2_THETA=math.log2(case.theta), COMPAT=case.compat, **settings, **flags,
        )  # fmt: skip


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Both kernels at the first-class head sizes, with an index and in flat form, in bfloat16 and float32."""
    fixed = {
        **dict.fromkeys(("INDEX", "LENGTHS", "IDS", "BIAS", "SUMS"), True), "FLAT": False, "UNIT": 8, "HEIGHT": 16,
        "WIDTH": 16, "LOG2_THETA": math.log2(1e4), "COMPAT": False,
    }  # fmt: skip
    for name in ("bf16", "fp32"):
        types = {
            **dict.fromkeys(SIZES, "i32"), **dict.fromkeys(("index", "lengths", "starts", "ids"), "*i64"),
            **dict.fromkeys(("x", "out", "gradient"), f"*{name}"), "bias": "*fp32", "sums": "*fp32",
        }  # fmt: skip
        for head in (24, 32, 64, 80, 88, 104, 128):
            settings = lookup("indexed_attention_ready", architecture=architecture, dtype=name, width=head)
            for title, kernel in (("ready", ready_kernel), ("back", back_kernel)):
                constants = {key: value for key, value in fixed.items() if key in kernel.arg_names}
                constants |= {"HEAD": head, **settings}
                yield pinned(f"attention {title} {name} {head}", kernel, types, constants)
                # What training launches.
                flat = {**constants, "FLAT": True, "INDEX": False, "LENGTHS": False, "COMPAT": True}
                yield pinned(f"attention {title} flat {name} {head}", kernel, {**types, "starts": "*i32"}, flat)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries, `width` being the size of a head."""
    return {"indexed_attention_ready": combinations(BLOCK=(16, 32, 64), num_warps=(2, 4, 8))}
