"""One operation at one place of a training step: every way checked, then timed in turns, and what becomes of it.

The yardstick of all ways is the eager form in float64, at the full shape: attention keeps the scores of one clip at a
time there, so that it fits beside the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.ceilings.cases import copy_call, gemm_call
from bench.failures import reason
from bench.files import Row
from bench.kernels.turns import DeviceClock, Rotation, cache_bytes, copies_of, passes, peak_bytes, rounds_within
from bench.kernels.ways import FAILURES, OURS, Make, ways_of
from bench.kernels.work import work_of
from bench.machine import LoadWatch
from bench.measure import UNIT_SIZE, Call, gemm_flops, synchronize
from bench.pairing import WARM_UP, Clock, alternate, rate_row, ratio_row
from fastjepa_kernels.dispatch import Impl
from fastjepa_kernels.testing.case import Call as Operation
from fastjepa_kernels.testing.case import Part, fresh, results, yardstick
from fastjepa_kernels.testing.cases_of_steps import Place

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Where and how: `clock` makes the clock of one case, `cache` is what copies of the inputs exceed, in bytes.

    `seconds` are for timing one case, in `least` to `most` rounds. The ceilings are a copy of `copied` bytes and the
    product of two square matrices of `side`.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    impl: Impl = "triton"
    clock: Callable[[], Clock] = DeviceClock
    cache: int = 0
    compiler: str = "inductor"
    seconds: float = 0.5
    least: int = 10
    most: int = 50
    copied: int = 1 << 30
    side: int = 8192

    @classmethod
    def of_a_gpu(cls, device: torch.device) -> "Setting":
        """The one of the figures."""
        return cls(device, cache=cache_bytes(device))


@dataclass
class Prepared:
    """A place whose ways are checked: calls by name, in the order of turns, and why others are not timed."""

    place: Place
    inputs: tuple[Tensor, ...]
    calls: dict[str, Operation] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def prepare(place: Place, setting: Setting) -> Prepared:
    """Make the inputs and each way, compile it, and compare its results and gradients with the yardstick.

    Errors: torch.OutOfMemoryError where inputs and yardstick do not fit.
    """
    case, dtype = place.case, setting.dtype
    prepared = Prepared(place, case.make(place.shape, setting.device, dtype))
    check = yardstick(case, prepared.inputs, dtype)

    def checked(make: Make) -> Operation:
        call = make()
        # As it will be timed, so that it is compiled once: where nothing has a gradient, none is recorded.
        with torch.set_grad_enabled(bool(case.gradients)):
            check(results(case, call, fresh(case, prepared.inputs), dtype))
        return call

    for way, make in ways_of(case, place.shape, setting.impl, setting.compiler).items():
        made = _attempt(lambda make=make: checked(make))
        (prepared.reasons if isinstance(made, str) else prepared.calls)[way] = made
    return prepared


def _attempt(call: Callable[[], T]) -> T | str:
    """What the call gives, or why it fails here: a way that cannot be had is a row, and the others go on."""
    try:
        return call()
    except torch.AcceleratorError:
        raise  # the device itself has failed, and everything after this would fail with it
    except FAILURES as error:
        return reason(error)


def measure(
    benchmark: BenchmarkFixture, prepared: Prepared, which: Part, setting: Setting, ceilings: dict[str, float]
) -> list[Row]:
    """Rows of one pass: the rate of each way, or why it has none, and how many times the speed of the others ours has.

    `ceilings` are the largest rates of the device by unit. What pytest-benchmark prints is a sample of ours with the
    host's part in it.
    """
    case, shape = prepared.place.case, prepared.place.shape
    name, dtype = f"{case.name} {which}", str(setting.dtype).removeprefix("torch.")
    copies = copies_of(case, prepared.inputs, setting.cache)
    rotation = Rotation(len(copies))
    calls: dict[str, Call] = {}
    peaks: dict[str, int | None] = {}
    reasons = dict(prepared.reasons)

    def ready(operation: Operation) -> tuple[Call, int | None]:
        call = rotation.through(passes(case, operation, copies, which))
        call()
        return call, peak_bytes(call, setting.device)

    for way, operation in prepared.calls.items():
        made = _attempt(lambda operation=operation: ready(operation))
        if isinstance(made, str):
            reasons[way] = made
        else:
            calls[way], peaks[way] = made
    where = {"shape": prepared.place.name, "dtype": dtype}
    rows: list[Row] = [
        {"name": name, "skipped": reason, "parameters": {**where, "way": way}} for way, reason in reasons.items()
    ]
    if not calls:
        return rows
    clock = setting.clock()
    rounds = rounds_within(setting.seconds, list(calls.values()), clock, setting.least, setting.most)
    times = alternate(benchmark, calls, clock, rounds)
    work, unit = work_of(case, shape, which, setting.dtype)
    for way, ms in times.items():
        row = rate_row(name, ms, work / UNIT_SIZE[unit], unit, {**where, "way": way})
        row |= {"share": row["value"] / ceilings[unit], "copies": len(copies), "sizes": shape}
        rows.append(row if peaks[way] is None else {**row, "peak_bytes": peaks[way]})
    for way in list(calls)[1:] if OURS in calls else ():
        rows.append(ratio_row(f"{name}, ours over {way}", times, way, {**where, "way": way}))
    return rows


def failure_of_ours(rows: list[Row]) -> str:
    """Why ours has no figure among these rows; empty where it has."""
    return next((row["skipped"] for row in rows if "skipped" in row and row["parameters"]["way"] == OURS), "")


def measure_ceilings(setting: Setting) -> list[Row]:
    """The largest rates that this device has in the same session, and by the same clock, as the rows say they do.

    With clock, power and temperature under this load, where the machine tells them.
    """
    copied, side, device = setting.copied, setting.side, setting.device
    tries: list[tuple[str, Call, float, str, dict[str, int]]] = [
        ("copy", copy_call(copied, "copy", device), 2 * copied, "GB/s", {"bytes": copied}),
        (
            "gemm",
            gemm_call(side, side, side, "forward", device),
            gemm_flops(side, side, side),
            "TFLOP/s",
            {"side": side},
        ),
    ]
    found = []
    for name, call, work, unit, parameters in tries:
        clock = setting.clock()
        for _ in range(WARM_UP):
            clock(call)
        ms = [clock(call) for _ in range(setting.most)]
        with LoadWatch(device) as load:  # not while it is timed: reading takes the host's time
            for _ in range(setting.most):
                call()
            synchronize(device)
        found.append(rate_row(f"ceiling {name}", ms, work / UNIT_SIZE[unit], unit, parameters) | load.last)
    return found
