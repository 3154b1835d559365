"""A predictor's input in one launch: the first programs write rows of the context, the others those of the targets.

Every value is read once and written once, where it belongs; nothing is concatenated afterwards.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton import philox
from fastjepa_kernels._triton.launch import Shipped, combinations, folded, on_device_of, pinned, pointer
from fastjepa_kernels._triton.noise import noised_tile
from fastjepa_kernels.config import lookup

# What stands at the targets.
MASK_TOKEN, READY, NOISED = 0, 1, 2


@triton.jit
def _write(values, table, index, out, place, row, present, lane, TABLE: tl.constexpr, WIDTH: tl.constexpr):
    """values + table row of the token, if there is a table, into row `place` of the result."""
    inside = present[:, None] & (lane < WIDTH)[None, :]
    if TABLE:
        token = tl.load(index + row, mask=present, other=0).to(tl.int64)
        values += tl.load(table + token[:, None] * WIDTH + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place[:, None] * WIDTH + lane[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _context(
    row, lane, context, index, clips, other_lengths, table, out, rows, inner, outer_stride, inner_stride, other,
    RAGGED: tl.constexpr, TABLE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of the context; the targets of all clips before stand before them."""
    present = row < rows
    inside = present[:, None] & (lane < WIDTH)[None, :]
    clip = row // inner
    source = clip * outer_stride + (row % inner) * inner_stride
    if RAGGED:
        clip = tl.load(clips + row, mask=present, other=0)
        place = row + tl.load(other_lengths + clip, mask=present, other=0).to(tl.int64)
    else:
        place = row + clip * other
    values = tl.load(context + source[:, None] + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    _write(values, table, index, out, place, row, present, lane, TABLE, WIDTH)


@triton.jit
def _targets(
    row, lane, targets, index, clips, other_lengths, table, token, alpha, row_key, seed, noise, out, mean, rstd, rows,
    inner, outer_stride, inner_stride, other, token_stride, share,
    EPS: tl.constexpr, TARGETS: tl.constexpr, GATHER: tl.constexpr, RECORDED: tl.constexpr, RAGGED: tl.constexpr,
    TABLE: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Rows of the targets; the contexts of all clips before and of their own stand before them."""
    present = row < rows
    inside = present[:, None] & (lane < WIDTH)[None, :]
    clip = row // inner
    within = row % inner
    if GATHER:
        within = tl.load(index + row, mask=present, other=0).to(tl.int64)
    source = clip * outer_stride + within * inner_stride
    share_of = row // share
    if RAGGED:
        clip = tl.load(clips + row, mask=present, other=0)
        place = row + tl.load(other_lengths + clip + 1, mask=present, other=0).to(tl.int64)
        share_of = clip
    else:
        place = row + (clip + 1) * other
    if TARGETS == 0:
        at = token + (clip * token_stride)[:, None] + lane[None, :]
        values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    elif TARGETS == 1:
        values = tl.load(targets + source[:, None] + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        values = noised_tile(
            targets, source, alpha, share_of, row_key, seed, noise, mean, rstd, row, present, lane, EPS, RECORDED,
            WIDTH, LANES,
        )  # fmt: skip
    _write(values, table, index, out, place, row, present, lane, TABLE, WIDTH)


@triton.jit
def assemble_kernel(
    context, context_index, context_clips, context_lengths, targets, target_index, target_clips, target_lengths,
    table, token, alpha, row_key, seed, noise, out, mean, rstd, programs, context_rows, context_inner, c_outer, c_inner,
    target_rows, target_inner, t_outer, t_inner, token_stride, share,
    EPS: tl.constexpr, TARGETS: tl.constexpr, GATHER: tl.constexpr, RECORDED: tl.constexpr, RAGGED: tl.constexpr,
    TABLE: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program: the first `programs` take the context's, the others the targets'."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    if program < programs:
        _context(
            program * ROWS + tl.arange(0, ROWS), lane, context, context_index, context_clips, target_lengths, table,
            out, context_rows, context_inner, c_outer, c_inner, target_inner, RAGGED, TABLE, WIDTH,
        )  # fmt: skip
    else:
        _targets(
            (program - programs) * ROWS + tl.arange(0, ROWS), lane, targets, target_index, target_clips,
            context_lengths, table, token, alpha, row_key, seed, noise, out, mean, rstd, target_rows, target_inner,
            t_outer, t_inner, context_inner, token_stride, share, EPS, TARGETS, GATHER, RECORDED, RAGGED, TABLE, WIDTH,
            LANES,
        )  # fmt: skip


@triton.jit
def sum_kernel(
    gradient, context_lengths, target_lengths, parts, context, kept,
    RAGGED: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """parts[clip, split] = sum of one of SPLITS stretches of the clip's target rows, LANES columns a program."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    clip, split = program // SPLITS, program % SPLITS
    if RAGGED:
        before = tl.load(target_lengths + clip).to(tl.int64)
        length = tl.load(target_lengths + clip + 1).to(tl.int64) - before
        first = before + tl.load(context_lengths + clip + 1).to(tl.int64)
    else:
        # In 32 bits: a clip has fewer rows, and a number that is 1 comes as a constant.
        length = kept
        first = clip * (context + kept) + context
    total = tl.zeros([ROWS, LANES], dtype=tl.float32)
    end = (split + 1) * length // SPLITS
    for start in range(split * length // SPLITS, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (lane < WIDTH)[None, :]
        at = gradient + (first + row)[:, None] * WIDTH + lane[None, :]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(parts + program * WIDTH + lane, tl.sum(total, axis=0), mask=lane < WIDTH)


def _clips(lengths: Tensor | None, rows: int, other: Tensor) -> Tensor:
    """Clip of each row where lengths differ, int64 [R]; `other` stands in where they do not."""
    if lengths is None:
        return other
    row = torch.arange(rows, device=lengths.device, dtype=lengths.dtype)
    return torch.searchsorted(lengths[1:].contiguous(), row, right=True)


def assemble_tokens(
    context: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    table: Tensor | None,
    mask_token: Tensor | None,
    targets: Tensor | None,
    alpha: Tensor | None,
    row_key: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    context_lengths: Tensor | None,
    target_lengths: Tensor | None,
    eps: float,
    gather_targets: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, Kc, P] -> [B, Kc + Kt, P], or [Rc, P] -> [Rc + Rt, P]; mean and 1 / deviation of noised rows, or [0]."""
    width, seen, asked = context.shape[-1], context.shape[-2], target_index.shape[-1]
    out = context.new_empty((*context.shape[:-2], seen + asked, width), dtype=out_dtype)
    shape = (0,) if alpha is None else tuple(target_index.shape)
    mean, rstd = (context.new_empty(shape, dtype=torch.float32) for _ in range(2))
    if not out.numel():
        return out, mean, rstd
    source = folded(context)
    goal = source if targets is None else folded(targets)
    context_rows, target_rows = context_index.numel(), target_index.numel()
    fixed = philox.tiles(width, device=context.device, dtype=context.dtype, length=seen + asked)
    programs, more = (triton.cdiv(rows, fixed["ROWS"]) for rows in (context_rows, target_rows))
    what = MASK_TOKEN if mask_token is not None else READY if alpha is None else NOISED
    with on_device_of(context):
        assemble_kernel[(programs + more,)](
            source, context_index.contiguous(), _clips(context_lengths, seen, out), pointer(context_lengths, out),
            goal, target_index.contiguous(), _clips(target_lengths, asked, out), pointer(target_lengths, out),
            pointer(table, out), pointer(mask_token, out), pointer(alpha, out), pointer(row_key, out),
            pointer(seed, out), pointer(noise, out), out, mean, rstd, programs, context_rows, seen, source.stride(0),
            source.stride(1), target_rows, asked, goal.stride(0), goal.stride(1),
            width if mask_token is not None and mask_token.ndim == 2 else 0,
            1 if alpha is None else target_rows // max(1, alpha.numel()), EPS=eps, TARGETS=what, GATHER=gather_targets,
            RECORDED=noise is not None, RAGGED=context_lengths is not None, TABLE=table is not None, WIDTH=width,
            **fixed,
        )  # fmt: skip
    return out, mean, rstd


def sum_of_targets(
    gradient: Tensor, context: int, clips: int, context_lengths: Tensor | None, target_lengths: Tensor | None
) -> Tensor:
    """Sums over the target rows of each clip: gradient of the packed rows -> float32 [B, P]."""
    gradient, width = gradient.contiguous(), gradient.shape[-1]
    sums = lookup("assemble_sum", device=gradient.device, dtype=gradient.dtype, width=width)
    parts = gradient.new_empty((clips, sums["SPLITS"], width), dtype=torch.float32)
    if parts.numel():
        with on_device_of(gradient):
            sum_kernel[(clips * sums["SPLITS"], triton.cdiv(width, sums["LANES"]))](
                gradient, pointer(context_lengths, gradient), pointer(target_lengths, gradient), parts, context,
                gradient.shape[-2] - context, RAGGED=context_lengths is not None, WIDTH=width, **sums,
            )  # fmt: skip
    return parts.sum(1)


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Mask tokens, ready rows and noised ones at a predictor's and the largest width, with a table and without one."""
    numbers = ("programs", "context_rows", "context_inner", "c_outer", "c_inner", "target_rows", "target_inner")
    types = {
        **dict.fromkeys((*numbers, "t_outer", "t_inner", "token_stride", "share", "context", "kept"), "i32"),
        **dict.fromkeys(("table", "token", "alpha", "noise", "mean", "rstd", "parts", "gradient"), "*fp32"),
        **dict.fromkeys(("context_index", "target_index", "context_clips", "target_clips", "row_key", "seed"), "*i64"),
        **dict.fromkeys(("context_lengths", "target_lengths"), "*i32"),
        "out": "*fp32",
    }
    for width in (384, 8192):
        for ragged in (False, True):
            title = f"{' ragged' * ragged} {width}"
            sums = lookup("assemble_sum", architecture=architecture, width=width)
            fixed = {"RAGGED": ragged, "WIDTH": width, **sums}
            yield pinned(f"assemble sum{title}", sum_kernel, types, fixed)
            for name, what, gather, recorded, table in (
                ("token", MASK_TOKEN, False, False, True),
                ("ready", READY, False, False, True),
                ("noised", NOISED, False, False, True),
                ("gathered", NOISED, True, False, True),
                ("recorded", NOISED, False, True, True),
                # As with rotary positions.
                ("token without table", MASK_TOKEN, False, False, False),
                ("noised without table", NOISED, False, False, False),
            ):
                if ragged and gather:
                    continue
                for dtype in ("bf16",) if ragged else ("bf16", "fp32"):
                    more = {"EPS": 1e-5, "TARGETS": what, "GATHER": gather, "RECORDED": recorded, "RAGGED": ragged,
                            "TABLE": table}  # fmt: skip
                    given = {**types, "context": f"*{dtype}", "targets": f"*{dtype}"}
                    sizes: dict[str, Any] = {
                        "WIDTH": width,
                        **more,
                        **philox.tiles(width, architecture=architecture, dtype=dtype),
                    }
                    yield pinned(f"assemble {name} {dtype}{title}", assemble_kernel, given, sizes)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries for the sums of a mask token's gradient."""
    return {"assemble_sum": combinations(LANES=(32, 64, 128), ROWS=(16, 32, 64), SPLITS=(4, 8, 16), num_warps=(4, 8))}
