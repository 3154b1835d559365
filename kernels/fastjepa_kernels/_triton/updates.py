"""Updates of parameters in place: everything about a value is read once and written once, in one launch a group.

Contiguous tensors of the same dtypes are a group: its kernel finds their addresses in a table on the device. Tables are
kept, so that while addresses stay what they are, steps after the first copy nothing to the device. A tensor that is
alone or not contiguous has a launch of its own, and so has every one while a CUDA graph is captured: a table made there
would be filled by a replay only.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from fastjepa_kernels._triton.launch import Shipped, combinations, on_device_of, pinned
from fastjepa_kernels.config import lookup
from fastjepa_kernels.reference.updates import there

# A program of a group takes TILES tiles of LANES values, all of one tensor. Settings have four values a thread: float32
# and half precision are then read in the same layout, with no exchange between threads.

# Tables that are kept: a step of two networks needs one of addresses and one of tiles for each dtype.
MOST_TABLES = 32
_tables: dict[Hashable, Tensor] = {}

TRITON_TYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _average(target, online, move, lane, count):
    inside = lane < count
    old = tl.load(target + lane, mask=inside)
    new = tl.load(online + lane, mask=inside).to(tl.float32)
    tl.store(target + lane, old + (new - old) * move, mask=inside)


@triton.jit
def ema_kernel(target, online, move, count, LANES: tl.constexpr):
    """target += move * (online - target), LANES values a program."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    _average(target, online, tl.load(move), lane, count)


@triton.jit
def _address(entry, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(entry).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _count(entry, ALIGNED: tl.constexpr):
    count = tl.load(entry)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    return count


@triton.jit
def ema_group_kernel(
    table, chunks, move, ONLINE: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """`ema_kernel` for many tensors: `table` [tensors, 3] of target, online and count, `chunks` [programs, 2] of the
    tensor and its first value. With ALIGNED all addresses and counts are multiples of 16."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    entry = table + tl.load(chunk) * 3
    first = tl.multiple_of(tl.load(chunk + 1), LANES)
    target, online = _address(entry, tl.float32, ALIGNED), _address(entry + 1, ONLINE, ALIGNED)
    count, factor = _count(entry + 2, ALIGNED), tl.load(move)
    for tile in range(TILES):
        _average(target, online, factor, first + tile * LANES + tl.arange(0, LANES), count)


@triton.jit
def _step(
    parameter, gradient, exp_avg, exp_avg_sq, target, copy, target_copy, scalars, lane, count,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, AVERAGED: tl.constexpr, COPIED: tl.constexpr,
    AVERAGE_COPIED: tl.constexpr,
):  # fmt: skip
    inside = lane < tl.where(tl.load(scalars + 4) == 0.0, count, 0)
    moved = tl.load(gradient + lane, mask=inside, other=0.0).to(tl.float32) * tl.load(scalars + 3)
    mean = tl.load(exp_avg + lane, mask=inside, other=0.0)
    mean += (moved - mean) * (1.0 - BETA1)
    square = tl.load(exp_avg_sq + lane, mask=inside, other=0.0)
    square = square * BETA2 + moved * moved * (1.0 - BETA2)
    denominator = tl.div_rn(tl.sqrt_rn(square), tl.load(scalars + 2)) + EPS
    value = tl.load(parameter + lane, mask=inside, other=0.0) * tl.load(scalars)
    value -= tl.load(scalars + 1) * tl.div_rn(mean, denominator)
    tl.store(exp_avg + lane, mean, mask=inside)
    tl.store(exp_avg_sq + lane, square, mask=inside)
    tl.store(parameter + lane, value, mask=inside)
    if AVERAGED:
        old = tl.load(target + lane, mask=inside, other=0.0)
        average = old + (value - old) * tl.load(scalars + 5)
        tl.store(target + lane, average, mask=inside)
        if AVERAGE_COPIED:
            tl.store(target_copy + lane, average.to(target_copy.dtype.element_ty), mask=inside)
    if COPIED:
        tl.store(copy + lane, value.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def adamw_ema_kernel(
    parameter, gradient, exp_avg, exp_avg_sq, target, copy, target_copy, scalars, count,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    AVERAGED: tl.constexpr, COPIED: tl.constexpr, AVERAGE_COPIED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """AdamW, moving average and copies of LANES values; nothing is read or written where scalars[4] is not 0."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    _step(parameter, gradient, exp_avg, exp_avg_sq, target, copy, target_copy, scalars, lane, count, BETA1, BETA2, EPS,
          AVERAGED, COPIED, AVERAGE_COPIED)  # fmt: skip


@triton.jit
def adamw_ema_group_kernel(
    table, chunks, scalars, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, AVERAGED: tl.constexpr,
    COPIED: tl.constexpr, AVERAGE_COPIED: tl.constexpr, GRADIENT: tl.constexpr, COPY: tl.constexpr,
    AVERAGE_COPY: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`adamw_ema_kernel` for many tensors: `table` [tensors, 9] of the seven addresses, count and row of `scalars`;
    `chunks` and ALIGNED as for `ema_group_kernel`."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    entry = table + tl.load(chunk) * 9
    first = tl.multiple_of(tl.load(chunk + 1), LANES)
    parameter, gradient = _address(entry, tl.float32, ALIGNED), _address(entry + 1, GRADIENT, ALIGNED)
    exp_avg, exp_avg_sq = _address(entry + 2, tl.float32, ALIGNED), _address(entry + 3, tl.float32, ALIGNED)
    target, copy = _address(entry + 4, tl.float32, ALIGNED), _address(entry + 5, COPY, ALIGNED)
    target_copy = _address(entry + 6, AVERAGE_COPY, ALIGNED)
    count, own = _count(entry + 7, ALIGNED), scalars + tl.load(entry + 8) * 6
    for tile in range(TILES):
        lane = first + tile * LANES + tl.arange(0, LANES)
        _step(parameter, gradient, exp_avg, exp_avg_sq, target, copy, target_copy, own, lane, count, BETA1, BETA2, EPS,
              AVERAGED, COPIED, AVERAGE_COPIED)  # fmt: skip


def ema_update_(targets: list[Tensor], onlines: list[Tensor], move: Tensor) -> None:
    """target <- target + move * (online - target), `move` 0-dim float32."""
    groups, alone = _groups([targets, onlines], move)
    with on_device_of(move):
        for (_, online), aligned, members in groups:
            counts = [targets[n].numel() for n in members]
            rows = [(targets[n].data_ptr(), onlines[n].data_ptr(), count) for n, count in zip(members, counts)]
            settings = lookup("ema_update_", device=move.device, dtype=online, length=sum(counts))
            chunks = _chunks(counts, settings["TILES"] * settings["LANES"], move)
            ema_group_kernel[(len(chunks),)](
                _table(rows, move), chunks, move, ONLINE=TRITON_TYPE[online], ALIGNED=aligned, **settings
            )
        for n in alone:
            flat = targets[n].contiguous()
            settings = _alone("ema_update_", device=move.device, dtype=onlines[n].dtype, length=flat.numel())
            grid = (triton.cdiv(flat.numel(), settings["LANES"]),)
            ema_kernel[grid](flat, onlines[n].contiguous(), move, flat.numel(), **settings)
            _put_back(targets[n], flat)
    # Autograd does not see what a kernel writes: a graph that saved these tensors must refuse to run backward.
    increment_version(targets)


def adamw_ema_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    targets: list[Tensor],
    copies: list[Tensor],
    target_copies: list[Tensor],
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """As the reference: float32 parameters, moments, targets and `scalars` [parameters, 6]."""
    scalars = scalars.contiguous()
    optional = {"AVERAGED": targets, "COPIED": copies, "AVERAGE_COPIED": target_copies}
    kinds: dict[tuple[bool, ...], list[int]] = {}
    for n in range(len(parameters)):
        kinds.setdefault(tuple(there(some, n) for some in optional.values()), []).append(n)
    with on_device_of(scalars):
        for kind, members in kinds.items():
            fixed = {"BETA1": beta1, "BETA2": beta2, "EPS": eps, **dict(zip(optional, kind))}
            # A tensor that is not there is never touched; the parameter stands in for its address.
            lists = [parameters, gradients, exp_avgs, exp_avg_sqs]
            lists += [some if given else parameters for some, given in zip(optional.values(), kind)]
            _steps([[some[n] for n in members] for some in lists], scalars, members, fixed)
    increment_version([*parameters, *exp_avgs, *exp_avg_sqs, *targets, *copies, *target_copies])


def _steps(lists: list[list[Tensor]], scalars: Tensor, places: list[int], fixed: dict[str, Any]) -> None:
    """Parameters of one kind: `lists` are the seven of `adamw_ema_`, `places` their rows of `scalars`."""
    groups, alone = _groups(lists, scalars)
    for dtypes, aligned, members in groups:
        counts = [lists[0][n].numel() for n in members]
        rows = [(*(some[n].data_ptr() for some in lists), count, places[n]) for n, count in zip(members, counts)]
        settings = lookup("adamw_ema_", device=scalars.device, dtype=dtypes[1], length=sum(counts))
        chunks = _chunks(counts, settings["TILES"] * settings["LANES"], scalars)
        adamw_ema_group_kernel[(len(chunks),)](
            _table(rows, scalars), chunks, scalars, **fixed, GRADIENT=TRITON_TYPE[dtypes[1]],
            COPY=TRITON_TYPE[dtypes[5]], AVERAGE_COPY=TRITON_TYPE[dtypes[6]], ALIGNED=aligned, **settings,
        )  # fmt: skip
    for n in alone:
        gradient, written = lists[1][n], [some[n] for place, some in enumerate(lists) if place != 1]
        flat = [tensor.contiguous() for tensor in written]
        count = flat[0].numel()
        settings = _alone("adamw_ema_", device=scalars.device, dtype=gradient.dtype, length=count)
        adamw_ema_kernel[(triton.cdiv(count, settings["LANES"]),)](
            flat[0], gradient.contiguous(), *flat[1:], scalars[places[n]], count, **fixed, **settings
        )
        given = (True, True, True, fixed["AVERAGED"], fixed["COPIED"], fixed["AVERAGE_COPIED"])
        for tensor, updated, wanted in zip(written, flat, given):
            if wanted:
                _put_back(tensor, updated)


Group = tuple[tuple[torch.dtype, ...], bool, list[int]]


def _groups(lists: Sequence[Sequence[Tensor]], like: Tensor) -> tuple[list[Group], list[int]]:
    """Places of the tensors that share a launch, by their dtypes and alignment, and of those that have one each."""
    groups: dict[tuple[tuple[torch.dtype, ...], bool], list[int]] = {}
    alone = []
    capturing = like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    for n, tensors in enumerate(zip(*lists)):
        count = tensors[0].numel()
        if not count:
            continue
        if capturing or not all(tensor.is_contiguous() for tensor in tensors):
            alone.append(n)
            continue
        aligned = count % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        groups.setdefault((tuple(tensor.dtype for tensor in tensors), aligned), []).append(n)
    alone += [members[0] for members in groups.values() if len(members) == 1]
    return [(*key, members) for key, members in groups.items() if len(members) > 1], alone


def _table(rows: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    """These numbers on the device, int64."""
    return _kept(("table", tuple(rows)), lambda: torch.tensor(rows, dtype=torch.int64), like)


def _alone(operation: str, **where: Any) -> dict[str, int]:
    """The settings of a launch for one tensor, a tile a program."""
    settings = lookup(operation, **where)
    del settings["TILES"]
    return settings


def _chunks(counts: list[int], size: int, like: Tensor) -> Tensor:
    """[programs, 2]: for tensors of so many values, the tensor and first value of every program of `size` values."""

    def build() -> Tensor:
        programs = -(-torch.tensor(counts) // size)
        tensor = torch.repeat_interleave(torch.arange(len(counts)), programs)
        before = torch.repeat_interleave(programs.cumsum(0) - programs, programs)
        return torch.stack([tensor, (torch.arange(len(tensor)) - before) * size], dim=1)

    return _kept(("chunks", size, tuple(counts)), build, like)


def _kept(content: Hashable, build: Callable[[], Tensor], like: Tensor) -> Tensor:
    """A table on the device of `like`, made where there is none of this content; of too many the least used goes.

    The key is all of the content, so that a table is never wrong, and the stream, which alone waits for the copy.
    """
    on_gpu = like.device.type == "cuda"
    key = content, like.device, torch.cuda.current_stream(like.device).cuda_stream if on_gpu else 0
    table = _tables.pop(key, None)
    if table is None:
        while len(_tables) >= MOST_TABLES:
            del _tables[next(iter(_tables))]
        table = build()
        table = table.pin_memory().to(like.device, non_blocking=True) if on_gpu else table
    _tables[key] = table
    return table


def _put_back(tensor: Tensor, flat: Tensor) -> None:
    """Into a tensor that is not contiguous, whose contiguous copy was updated."""
    if flat is not tensor:
        tensor.copy_(flat)


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """Both kernels for gradients and online weights of every usual dtype, with and without targets and copies."""
    wide = dict.fromkeys(("target", "move", "parameter", "exp_avg", "exp_avg_sq", "scalars"), "*fp32")
    tables = dict.fromkeys(("table", "chunks"), "*i64")
    dtypes = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}
    for dtype, known in dtypes.items():
        types = {**wide, **tables, "online": f"*{dtype}", "count": "i32"}
        where: dict[str, Any] = {"architecture": architecture, "dtype": dtype}
        yield pinned(f"ema {dtype}", ema_kernel, types, _alone("ema_update_", **where))
        group = {**lookup("ema_update_", **where), "ONLINE": known}
        for aligned in (True, False):
            name = f"ema group {dtype}" + " unaligned" * (not aligned)
            yield pinned(name, ema_group_kernel, types, {**group, "ALIGNED": aligned})
    for dtype in ("fp32", "bf16"):
        types = {**wide, **tables, "gradient": f"*{dtype}", "count": "i32"}
        types |= dict.fromkeys(("copy", "target_copy"), "*bf16")
        for averaged, copied in ((False, False), (True, False), (False, True), (True, True)):
            fixed = {"BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8, "AVERAGED": averaged, "COPIED": copied}
            fixed["AVERAGE_COPIED"] = averaged and copied
            where = {"architecture": architecture, "dtype": dtype}
            more = " ema" * averaged + " copy" * copied
            alone = {**fixed, **_alone("adamw_ema_", **where)}
            yield pinned(f"adamw{more} {dtype}", adamw_ema_kernel, types, alone)
            group = {**fixed, **lookup("adamw_ema_", **where), "GRADIENT": dtypes[dtype]}
            group |= dict.fromkeys(("COPY", "AVERAGE_COPY"), tl.bfloat16)
            for aligned in (True, False):
                name = f"adamw{more} group {dtype}" + " unaligned" * (not aligned)
                yield pinned(name, adamw_ema_group_kernel, types, {**group, "ALIGNED": aligned})


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """What `tune` tries: 2 to 16 values a thread."""
    flat = [
        one
        for one in combinations(LANES=(256, 512, 1024, 2048, 4096), TILES=(4, 8, 16), num_warps=(2, 4, 8))
        if 2 <= one["LANES"] / one["num_warps"] / 32 <= 16
    ]
    return {"ema_update_": flat, "adamw_ema_": flat}
