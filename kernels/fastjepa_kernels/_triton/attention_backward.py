"""Attention over rows named by an index, backward: two kernels, no atomics, gradients written where the rows lie.

One kernel goes by blocks of queries and gives dq, and on its way the sum of gradient times result of every query; the
other goes by blocks of keys and gives dk and dv. Both compute the scores again, from the saved logarithm. Where a bias
was added, each leaves the sums of the tiles it wrote, and a third, small one adds them up.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.attention import (
    BIAS_HEADS,
    BIASED,
    FLAGS,
    FLAT,
    FLAT_HEADS,
    HEADS,
    SIZES,
    TYPES,
    launch_inputs,
    settings_of,
)
from fastjepa_kernels._triton.attention_bias import add_bias, as_written, bias_row, store_sums, sum_bias
from fastjepa_kernels._triton.attention_ready import back, ready
from fastjepa_kernels._triton.attention_rows import (
    LOG2_E,
    inner,
    load,
    mix,
    multiply_sum,
    origin,
    scale,
    span,
    store,
    tokens,
    zeros,
)
from fastjepa_kernels._triton.launch import Shipped, combinations, on_device_of, pinned
from fastjepa_kernels.attention_inputs import Inputs
from fastjepa_kernels.config import lookup

MORE_SIZES = (*SIZES, "d_clip", "d_row")


@triton.jit(do_not_specialize=MORE_SIZES)
def query_kernel(
    q, k, v, q_index, kv_index, q_lengths, kv_lengths, starts, bias, gradient, out, lse, delta, dq, sums,
    queries, keys, blocks, heads, q_clip, q_row, q_head, k_clip, k_row, k_head, v_clip, v_row, v_head, d_clip, d_row,
    SCALE: tl.constexpr, HEAD: tl.constexpr, FLAT: tl.constexpr, Q_INDEX: tl.constexpr, KV_INDEX: tl.constexpr,
    Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr, BIAS: tl.constexpr, SUMS: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of a clip and head, and delta, the sum over channels of gradient times result."""
    program = tl.program_id(0).to(tl.int64)
    head = program // blocks % heads
    clip = program // blocks // heads
    q_begin, asking = span(clip, queries, starts, q_lengths, FLAT, Q_LENGTHS)
    k_begin, seen = span(clip, keys, starts, kv_lengths, FLAT, KV_LENGTHS)
    place = (program % blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = place < asking
    q_origin = origin(q, clip, q_begin, head, q_clip, q_row, q_head, FLAT, UNIT)
    k_origin = origin(k, clip, k_begin, head, k_clip, k_row, k_head, FLAT, UNIT)
    v_origin = origin(v, clip, k_begin, head, v_clip, v_row, v_head, FLAT, UNIT)
    d_origin = origin(dq, clip, q_begin, head, d_clip, d_row, HEAD, FLAT, 1)
    q_token = tokens(q_index, q_begin, place, present, Q_INDEX)
    q0, q1 = load(q_origin, q_token * (q_row * UNIT), present, HEAD)
    x, y = bias_row(bias, 0, heads, head, HEAD, BIAS)
    q0, q1 = add_bias(q0, q1, x, y, HEAD, BIAS)
    result = ((q_begin + place) * heads + head) * HEAD
    o0, o1 = load(out, result, present, HEAD)
    g0, g1 = load(gradient, result, present, HEAD)
    level = multiply_sum(g0, g1, o0, o1, HEAD)
    stat = head * queries + q_begin if FLAT else (clip * heads + head) * queries
    tl.store(delta + stat + place, level, mask=present)
    # A query that is absent or sees nothing has inf here, so its share of every key is 0.
    saved = tl.load(lse + stat + place, mask=present, other=float("inf"))
    sum0, sum1 = zeros(BLOCK_M, HEAD)
    for first in range(0, seen, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        there = key < seen
        token = tokens(kv_index, k_begin, key, there, KV_INDEX)
        k0, k1 = load(k_origin, token * (k_row * UNIT), there, HEAD)
        # Read again for every block: held, the rows take registers that are spilled on sm_100.
        x, y = bias_row(bias, 1, heads, head, HEAD, BIAS)
        k0, k1 = add_bias(k0, k1, x, y, HEAD, BIAS)
        scores = inner(q0, q1, k0, k1, HEAD, PRECISION) * (SCALE * LOG2_E)
        share = tl.exp2(scores + tl.where(there, 0.0, float("-inf"))[None, :] - saved[:, None])
        v0, v1 = load(v_origin, token * (v_row * UNIT), there, HEAD)
        x, y = bias_row(bias, 2, heads, head, HEAD, BIAS)
        v0, v1 = add_bias(v0, v1, x, y, HEAD, BIAS)
        change = share * (inner(g0, g1, v0, v1, HEAD, PRECISION) - level[:, None])
        sum0, sum1 = mix(sum0, sum1, change, k0, k1, HEAD, PRECISION)
    sum0, sum1 = scale(sum0, sum1, SCALE, HEAD)
    # Without an index rows that do not ask are within reach, and their zeros are written here.
    written = present if FLAT or Q_INDEX else place < queries
    store(d_origin, q_token * d_row, written, sum0, sum1, HEAD)
    if SUMS:
        sum0, sum1 = as_written(sum0, sum1, present, dq, HEAD)
        store_sums(sums + ((clip * blocks + program % blocks) * heads + head) * HEAD, sum0, sum1, HEAD)


@triton.jit(do_not_specialize=MORE_SIZES)
def key_kernel(
    q, k, v, q_index, kv_index, q_lengths, kv_lengths, starts, bias, gradient, lse, delta, dk, dv, k_sums, v_sums,
    queries, keys, blocks, heads, q_clip, q_row, q_head, k_clip, k_row, k_head, v_clip, v_row, v_head, d_clip, d_row,
    SCALE: tl.constexpr, HEAD: tl.constexpr, FLAT: tl.constexpr, Q_INDEX: tl.constexpr, KV_INDEX: tl.constexpr,
    Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr, BIAS: tl.constexpr, SUMS: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of a clip and head; scores are held with a row for each key."""
    program = tl.program_id(0).to(tl.int64)
    head = program // blocks % heads
    clip = program // blocks // heads
    q_begin, asking = span(clip, queries, starts, q_lengths, FLAT, Q_LENGTHS)
    k_begin, seen = span(clip, keys, starts, kv_lengths, FLAT, KV_LENGTHS)
    place = (program % blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = place < seen
    q_origin = origin(q, clip, q_begin, head, q_clip, q_row, q_head, FLAT, UNIT)
    k_origin = origin(k, clip, k_begin, head, k_clip, k_row, k_head, FLAT, UNIT)
    v_origin = origin(v, clip, k_begin, head, v_clip, v_row, v_head, FLAT, UNIT)
    dk_origin = origin(dk, clip, k_begin, head, d_clip, d_row, HEAD, FLAT, 1)
    dv_origin = origin(dv, clip, k_begin, head, d_clip, d_row, HEAD, FLAT, 1)
    token = tokens(kv_index, k_begin, place, there, KV_INDEX)
    k0, k1 = load(k_origin, token * (k_row * UNIT), there, HEAD)
    v0, v1 = load(v_origin, token * (v_row * UNIT), there, HEAD)
    x, y = bias_row(bias, 1, heads, head, HEAD, BIAS)
    k0, k1 = add_bias(k0, k1, x, y, HEAD, BIAS)
    x, y = bias_row(bias, 2, heads, head, HEAD, BIAS)
    v0, v1 = add_bias(v0, v1, x, y, HEAD, BIAS)
    q_bias0, q_bias1 = bias_row(bias, 0, heads, head, HEAD, BIAS)
    stat = head * queries + q_begin if FLAT else (clip * heads + head) * queries
    dk0, dk1 = zeros(BLOCK_N, HEAD)
    dv0, dv1 = zeros(BLOCK_N, HEAD)
    for first in range(0, asking, BLOCK_M):
        query = first + tl.arange(0, BLOCK_M)
        present = query < asking
        q_token = tokens(q_index, q_begin, query, present, Q_INDEX)
        q0, q1 = load(q_origin, q_token * (q_row * UNIT), present, HEAD)
        q0, q1 = add_bias(q0, q1, q_bias0, q_bias1, HEAD, BIAS)
        saved = tl.load(lse + stat + query, mask=present, other=float("inf"))
        level = tl.load(delta + stat + query, mask=present, other=0.0)
        scores = inner(k0, k1, q0, q1, HEAD, PRECISION) * (SCALE * LOG2_E)
        # A key that is not there would get a share as if its channels were 0, which can pass the largest number.
        share = tl.exp2(scores + tl.where(there, 0.0, float("-inf"))[:, None] - saved[None, :])
        g0, g1 = load(gradient, ((q_begin + query) * heads + head) * HEAD, present, HEAD)
        dv0, dv1 = mix(dv0, dv1, share, g0, g1, HEAD, PRECISION)
        change = share * (inner(v0, v1, g0, g1, HEAD, PRECISION) - level[None, :])
        dk0, dk1 = mix(dk0, dk1, change, q0, q1, HEAD, PRECISION)
    dk0, dk1 = scale(dk0, dk1, SCALE, HEAD)
    written = there if FLAT or KV_INDEX else place < keys
    store(dk_origin, token * d_row, written, dk0, dk1, HEAD)
    store(dv_origin, token * d_row, written, dv0, dv1, HEAD)
    if SUMS:
        row = ((clip * blocks + program % blocks) * heads + head) * HEAD
        dk0, dk1 = as_written(dk0, dk1, there, dk, HEAD)
        store_sums(k_sums + row, dk0, dk1, HEAD)
        dv0, dv1 = as_written(dv0, dv1, there, dv, HEAD)
        store_sums(v_sums + row, dv0, dv1, HEAD)


def attention_backward(
    gradient: Tensor, out: Tensor, lse: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtype (of packed q alone, then [0] twice), and of the bias in float32.

    The last flag says whether the bias' gradient is wanted; it is [0] where not.
    """
    *rest, bias_wanted = given
    case = Inputs(*rest)
    if case.grid:
        inside = ready(case)
        return back(case, attention_backward(gradient, out, lse, *inside, False)[:3], bias_wanted)
    dq, dk, dv = case.empty_gradients(fill=case.q_index is not None or case.kv_index is not None)
    dbias = lse.new_empty((3, case.heads, case.head) if bias_wanted else (0,))
    # Where nobody asks or nothing is asked, nothing has an influence.
    if not out.numel() or not case.keys:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_()
    pointers, named = launch_inputs(case)
    gradient, out, lse = gradient.contiguous(), out.contiguous(), lse.contiguous()
    delta = lse.new_empty(lse.shape)
    # The places of all gradients [B, N, H, d], also within the packed one.
    parts = case._replace(q=dq, k=None if case.packed else dk, v=None if case.packed else dv).views()
    where: dict[str, Any] = {"device": case.q.device, "dtype": case.q.dtype, "width": case.head}
    biased = case.bias is not None
    query, key = (lookup(settings_of(side, biased), length=case.queries, **where) for side in ("_query", "_key"))
    blocks = triton.cdiv(case.queries, query["BLOCK_M"]), triton.cdiv(case.keys, key["BLOCK_N"])
    asking, seen = (case.clips * n if bias_wanted else 0 for n in blocks)
    sums = dbias.new_empty(asking + 2 * seen, case.heads * case.head)
    with on_device_of(case.q):
        query_kernel[(blocks[0] * case.heads * case.clips,)](
            *pointers, gradient, out, lse, delta, parts[0], sums, blocks=blocks[0], d_clip=parts[0].stride(0),
            d_row=parts[0].stride(1), SUMS=bias_wanted, **named, **query,
        )  # fmt: skip
        key_kernel[(blocks[1] * case.heads * case.clips,)](
            *pointers, gradient, lse, delta, *parts[1:], sums[asking:], sums[asking + seen :], blocks=blocks[1],
            d_clip=parts[1].stride(0), d_row=parts[1].stride(1), SUMS=bias_wanted, **named, **key,
        )  # fmt: skip
        if bias_wanted:
            sum_bias(sums, dbias, asking, seen)
    return dq, dk, dv, dbias


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Both kernels at every head size in bfloat16 and float32, in flat form and with a bias at some."""
    for side, kernel in (("query", query_kernel), ("key", key_kernel)):
        for name in ("bf16", "fp32"):
            for head in HEADS:
                yield _shipped(architecture, side, kernel, name, head, FLAGS)
        for name, head in FLAT_HEADS:
            yield _shipped(architecture, f"{side} flat", kernel, name, head, FLAT)
        for name, head in BIAS_HEADS:
            for title, flags in BIASED.items():
                yield _shipped(architecture, f"{side} {title}", kernel, name, head, flags)


def _shipped(architecture: str, title: str, kernel: Any, dtype: str, head: int, flags: dict[str, Any]) -> Shipped:
    values = dict.fromkeys(("q", "k", "v", "out", "gradient", "dq", "dk", "dv"), f"*{dtype}")
    sums = dict.fromkeys(("delta", "sums", "k_sums", "v_sums"), "*fp32")
    types = {**TYPES, **dict.fromkeys(MORE_SIZES, "i32"), **values, **sums}
    types["starts"] = "*i32" if flags["FLAT"] else "*i64"
    side = "_" + title.split()[0]
    tile = lookup(settings_of(side, flags["BIAS"]), architecture=architecture, dtype=dtype, width=head)
    fixed = {**flags, **tile, "SUMS": flags["BIAS"], "SCALE": head**-0.5, "HEAD": head}
    return pinned(f"attention {title} {dtype} {head}", kernel, types, fixed)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries, `width` being the size of a head."""
    blocks = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
    tiles = combinations(**blocks)
    return {settings_of(side, biased): tiles for side in ("_query", "_key") for biased in (False, True)}
