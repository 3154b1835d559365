"""Attention over rows named by an index, forward: one block of queries a program, keys and values block by block.

Softmax is kept as a running maximum and sum in float32, of scores in base 2. Nothing of a row that takes no part is
read; a query that sees nothing gives 0, and inf as its logarithm, which makes its share 0 in the backward pass too.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.attention_bias import add_bias, bias_row
from fastjepa_kernels._triton.attention_ready import ready
from fastjepa_kernels._triton.attention_rows import (
    LOG2_E,
    inner,
    load,
    mix,
    origin,
    scale,
    span,
    store,
    tokens,
    zeros,
)
from fastjepa_kernels._triton.launch import Shipped, combinations, on_device_of, pinned, rows_in_place
from fastjepa_kernels.attention_inputs import Inputs
from fastjepa_kernels.config import lookup

# Numbers change from step to step: no kernel of its own for those that are 1 or a multiple of 16.
STRIDES = tuple(f"{x}_{dim}" for x in "qkv" for dim in ("clip", "row", "head"))
SIZES = ("queries", "keys", "blocks", "heads", *STRIDES)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, q_index, kv_index, q_lengths, kv_lengths, starts, bias, out, lse, queries, keys, blocks, heads,
    q_clip, q_row, q_head, k_clip, k_row, k_head, v_clip, v_row, v_head,
    SCALE: tl.constexpr, HEAD: tl.constexpr, FLAT: tl.constexpr, Q_INDEX: tl.constexpr, KV_INDEX: tl.constexpr,
    Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr, BIAS: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a clip and head a program; neighbouring programs share keys and values."""
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
    q_token = tokens(q_index, q_begin, place, present, Q_INDEX)
    q0, q1 = load(q_origin, q_token * (q_row * UNIT), present, HEAD)
    x, y = bias_row(bias, 0, heads, head, HEAD, BIAS)
    q0, q1 = add_bias(q0, q1, x, y, HEAD, BIAS)
    k_bias0, k_bias1 = bias_row(bias, 1, heads, head, HEAD, BIAS)
    v_bias0, v_bias1 = bias_row(bias, 2, heads, head, HEAD, BIAS)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    sum0, sum1 = zeros(BLOCK_M, HEAD)
    for first in range(0, seen, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        there = key < seen
        token = tokens(kv_index, k_begin, key, there, KV_INDEX)
        k0, k1 = load(k_origin, token * (k_row * UNIT), there, HEAD)
        k0, k1 = add_bias(k0, k1, k_bias0, k_bias1, HEAD, BIAS)
        scores = inner(q0, q1, k0, k1, HEAD, PRECISION)
        scores = scores * (SCALE * LOG2_E) + tl.where(there, 0.0, float("-inf"))[None, :]
        highest = tl.maximum(top, tl.max(scores, axis=1))
        share = tl.exp2(scores - highest[:, None])
        fade = tl.exp2(top - highest)
        total = total * fade + tl.sum(share, axis=1)
        sum0, sum1 = scale(sum0, sum1, fade[:, None], HEAD)
        v0, v1 = load(v_origin, token * (v_row * UNIT), there, HEAD)
        v0, v1 = add_bias(v0, v1, v_bias0, v_bias1, HEAD, BIAS)
        sum0, sum1 = mix(sum0, sum1, share, v0, v1, HEAD, PRECISION)
        top = highest
    sees = present & (seen > 0)
    total = tl.where(sees, total, 1.0)
    sum0, sum1 = scale(sum0, sum1, tl.where(sees, 1.0 / total, 0.0)[:, None], HEAD)
    # Rows of the result that no query asks for are zeros; in flat form there are none.
    if FLAT:
        written = present
        stat = head * queries + q_begin
    else:
        written = place < queries
        stat = (clip * heads + head) * queries
    target = ((q_begin + place) * heads + head) * HEAD
    store(out, target, written, sum0, sum1, HEAD)
    tl.store(lse + stat + place, tl.where(sees, top + tl.log2(total), float("inf")), mask=written)


def launch_inputs(case: Inputs) -> tuple[list[Tensor], dict[str, Any]]:
    """What all attention kernels take: pointers in their order, then strides and constants by name.

    An absent tensor is given as q, and never read.
    """
    views = [rows_in_place(x) for x in case.views()]
    chosen = case[3:9]
    pointers = [*views, *(views[0] if x is None else x.contiguous() for x in chosen)]
    # In flat form the place of statistics depends on all rows.
    sizes = {"queries": case.q.shape[0] if case.starts is not None else case.queries, "keys": case.keys}
    strides = dict(zip(STRIDES, (stride for x in views for stride in x.stride()[:3])))
    unit = 1 if any(stride % 8 for stride in strides.values()) else 8
    flags = ("Q_INDEX", "KV_INDEX", "Q_LENGTHS", "KV_LENGTHS", "FLAT", "BIAS")
    constants = {"SCALE": case.scale, "HEAD": case.head, "UNIT": unit, "PRECISION": "ieee"}
    return pointers, {
        **sizes, "heads": case.heads, **{name: stride // unit for name, stride in strides.items()}, **constants,
        **{flag: x is not None for flag, x in zip(flags, chosen)},
    }  # fmt: skip


def attention(*given: Any) -> tuple[Tensor, Tensor]:
    """Inputs in order -> result as `out_shape`, log2 of the sum of exp in float32 as `lse_shape`, inf of nothing."""
    case = Inputs(*given)
    if case.grid:
        return attention(*ready(case))
    out = case.q.new_empty(case.out_shape())
    lse = case.q.new_empty(case.lse_shape(), dtype=torch.float32)
    if out.numel():
        pointers, named = launch_inputs(case)
        where: dict[str, Any] = {"device": case.q.device, "dtype": case.q.dtype, "width": case.head}
        tile = lookup(settings_of("", case.bias is not None), length=case.queries, **where)
        blocks = triton.cdiv(case.queries, tile["BLOCK_M"])
        with on_device_of(case.q):
            forward_kernel[(blocks * case.heads * case.clips,)](*pointers, out, lse, blocks=blocks, **named, **tile)
    return out, lse


def settings_of(side: str, biased: bool) -> str:
    """Launch settings of a pass: rows that get a bias go through registers on the way to their product."""
    return f"indexed_attention{side}{'_biased' if biased else ''}"


TYPES = {
    **dict.fromkeys(("q_index", "kv_index", "q_lengths", "kv_lengths", "starts"), "*i64"),
    **dict.fromkeys(SIZES, "i32"),
    **dict.fromkeys(("lse", "bias"), "*fp32"),
}
FLAGS = {
    **dict.fromkeys(("Q_INDEX", "KV_INDEX", "Q_LENGTHS", "KV_LENGTHS"), True),
    "FLAT": False,
    "BIAS": False,
    "UNIT": 8,
    "PRECISION": "ieee",
}
HEADS = range(16, 129, 8)
# What training launches: rows of all clips one after another, no index.
FLAT = {**dict.fromkeys(FLAGS, False), "FLAT": True, "UNIT": 8, "PRECISION": "ieee"}
FLAT_HEADS = (("bf16", 24), ("bf16", 64), ("bf16", 80), ("fp16", 64))
# The same and a dense batch of all rows, with the bias of the projection.
BIASED = {"flat bias": {**FLAT, "BIAS": True}, "dense bias": {**FLAT, "FLAT": False, "BIAS": True}}
BIAS_HEADS = (*FLAT_HEADS, ("bf16", 104), ("fp32", 24), ("fp32", 64), ("fp32", 80), ("fp32", 128))


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Every head size in bfloat16 and float32, some in flat form and with a bias."""
    for name in ("bf16", "fp32"):
        for head in HEADS:
            yield _shipped(architecture, "", name, head, FLAGS)
    for name, head in FLAT_HEADS:
        yield _shipped(architecture, "flat ", name, head, FLAT)
    for name, head in BIAS_HEADS:
        for title, flags in BIASED.items():
            yield _shipped(architecture, f"{title} ", name, head, flags)


def _shipped(architecture: str, title: str, dtype: str, head: int, flags: dict[str, Any]) -> Shipped:
    types = {**TYPES, **dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")}
    types["starts"] = "*i32" if flags["FLAT"] else "*i64"
    tile = lookup(settings_of("", flags["BIAS"]), architecture=architecture, dtype=dtype, width=head)
    fixed = {**flags, **tile, "SCALE": head**-0.5, "HEAD": head}
    return pinned(f"attention {title}{dtype} {head}", forward_kernel, types, fixed)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries, `width` being the size of a head."""
    blocks = {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
    return {settings_of("", biased): combinations(**blocks) for biased in (False, True)}
