"""Rotary positions on three axes: a tile of tokens computes its angles once and turns every head with them."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.angles import sine_cosine
from fastjepa_kernels._triton.launch import Shipped, combinations, on_device_of, pinned, power_of_two, rows_in_place
from fastjepa_kernels.config import lookup


@triton.jit
def turn_heads(
    x, out, clip, token, present, even_cos, even_sin, odd_cos, odd_sin, turned, x_clip, x_token, x_head,
    HEADS: tl.constexpr, HEAD: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, row, BACK: tl.constexpr,
):  # fmt: skip
    """All heads of a tile of tokens; pairs of neighbouring channels are told apart in registers."""
    lane = tl.arange(0, LANES)
    inside = present[:, None] & (lane < HEAD)[None, :]
    source = (clip * x_clip + token * x_token)[:, None] + lane[None, :]
    target = row[:, None] * (HEADS * HEAD) + lane[None, :]
    for head in range(HEADS):
        values = tl.load(x + source + head * x_head, mask=inside, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(values, [TOKENS, LANES // 2, 2]))
        if BACK:
            first, second = even * even_cos + odd * odd_sin, odd * odd_cos - even * even_sin
        else:
            first, second = even * even_cos - odd * even_sin, odd * odd_cos + even * odd_sin
        # What is not turned is not multiplied either: an infinity stays one.
        first, second = tl.where(turned, first, even), tl.where(turned, second, odd)
        result = tl.reshape(tl.join(first, second), [TOKENS, LANES])
        tl.store(out + target + head * HEAD, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    q, k, ids, paces, q_out, k_out, rows, kept, height, width, ids_clip, ids_token, q_clip, q_token, q_head, k_clip,
    k_token, k_head, COMPAT: tl.constexpr, BACK: tl.constexpr, BOTH: tl.constexpr, Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, HEAD: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens a program. `paces` are the frequencies of the pairs of a segment.

    With BACK the transposed map, which is the inverse rotation where the members of a pair turn by one angle.
    """
    segment: tl.constexpr = 2 * ((HEAD // 3) // 2)
    half: tl.constexpr = segment // 2
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    present = row < rows
    clip, token = row // kept, row % kept
    number = tl.load(ids + clip * ids_clip + token * ids_token, mask=present, other=0).to(tl.int32)
    time, high, wide = number // (height * width), number // width % height, number % width
    pair = tl.arange(0, LANES // 2)
    axis, place = pair // half, pair % half
    at = tl.where((axis == 0)[None, :], time[:, None], tl.where((axis == 1)[None, :], high[:, None], wide[:, None]))
    at = at.to(tl.float32)
    if COMPAT:
        even_sin, even_cos = sine_cosine(at * tl.load(paces + 2 * place % half)[None, :])
        odd_sin, odd_cos = sine_cosine(at * tl.load(paces + (2 * place + 1) % half)[None, :])
    else:
        even_sin, even_cos = sine_cosine(at * tl.load(paces + place)[None, :])
        odd_sin, odd_cos = even_sin, even_cos
    turned = (axis < 3)[None, :]
    turn_heads(
        q, q_out, clip, token, present, even_cos, even_sin, odd_cos, odd_sin, turned, q_clip, q_token, q_head,
        Q_HEADS, HEAD, LANES, TOKENS, row, BACK,
    )  # fmt: skip
    if BOTH:
        turn_heads(
            k, k_out, clip, token, present, even_cos, even_sin, odd_cos, odd_sin, turned, k_clip, k_token, k_head,
            K_HEADS, HEAD, LANES, TOKENS, row, BACK,
        )  # fmt: skip


def _sizes(head: int, **where: Any) -> dict[str, int]:
    return {"LANES": power_of_two(head), **lookup("rope3d", width=head, **where)}


def rope3d(
    q: Tensor,
    k: Tensor | None,
    ids: Tensor,
    height: int,
    width: int,
    theta: float,
    compat: bool,
    back: bool,
) -> tuple[Tensor, Tensor]:
    """q and k [B, K, H, d] turned by the token numbers ids [B, K]; without k, [0] stands for it."""
    q_out, k_out = q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)
    clips, kept, heads, head = q.shape
    rows = clips * kept
    if rows:
        first = rows_in_place(q)
        second = first if k is None else rows_in_place(k)
        sizes = _sizes(head, device=q.device, dtype=q.dtype, length=rows)
        with on_device_of(q):
            rope_kernel[(triton.cdiv(rows, sizes["TOKENS"]),)](
                first, second, ids, _paces(theta, head, q.device), q_out, k_out, rows, kept, height, width,
                *ids.stride(), *first.stride()[:3], *second.stride()[:3], COMPAT=compat, BACK=back, BOTH=k is not None,
                Q_HEADS=heads, K_HEADS=second.shape[2], HEAD=head, **sizes,
            )  # fmt: skip
    return q_out, k_out


@lru_cache(maxsize=16)
def _paces(theta: float, head: int, device: torch.device) -> Tensor:
    """Frequencies of the pairs of a segment: float32, rounded once. A power in the kernel is off by several."""
    half = head // 3 // 2
    return torch.tensor([theta ** (-pair / half) for pair in range(half)], dtype=torch.float64).float().to(device)


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Head sizes of the encoders and the predictor, one with a large rest, both layouts and directions."""
    names = ("rows", "kept", "height", "width", "ids_clip", "ids_token")
    strides = [f"{x}_{part}" for x in "qk" for part in ("clip", "token", "head")]
    for head, heads in ((32, 12), (64, 16), (88, 16)):
        for dtype in ("bf16", "fp32"):
            sizes = _sizes(head, architecture=architecture, dtype=dtype)
            types = {**dict.fromkeys((*names, *strides), "i32"), "ids": "*i64", "paces": "*fp32"}
            types.update(dict.fromkeys(("q", "k", "q_out", "k_out"), f"*{dtype}"))
            fixed = {"BOTH": True, "HEAD": head, "Q_HEADS": heads, "K_HEADS": heads, **sizes}
            for compat, back in ((False, False), (True, True)):
                title = f"rope{' compat' if compat else ''}{' back' if back else ''} {dtype} {head}"
                yield pinned(title, rope_kernel, types, {**fixed, "COMPAT": compat, "BACK": back})


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries, `width` being the size of a head."""
    return {"rope3d": combinations(TOKENS=(4, 8, 16, 32, 64), num_warps=(2, 4, 8))}
