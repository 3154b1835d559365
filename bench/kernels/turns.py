"""How calls are timed: from one copy of the inputs to the next, and on a GPU by its own clock.

A cache would keep what one call read for the next. Therefore there are as many copies of the inputs as exceed it, and
every call takes the next one, whichever variant it belongs to.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bench.measure import FASTEST_CLOCK_HZ, MOST_CALLS, SHORTEST_SAMPLE_S, Call
from bench.pairing import Clock
from fastjepa.memory import usable_memory
from fastjepa_kernels.testing.case import Call as Operation
from fastjepa_kernels.testing.case import Case, Part, fresh, timed

MOST_COPIES = 16
SHARE_OF_MEMORY = 1 / 16  # graphs of every variant come on top, a few times the inputs
LAUNCH_S = 50e-6  # that the device is kept busy at least, until the first kernel is in its queue


def cache_bytes(device: torch.device) -> int:
    """The second-level cache of a GPU; 0 of anything else."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def copies_needed(size: int, cache: int, memory: float) -> int:
    """How many copies of `size` bytes together exceed twice the cache, within a share of the memory; all in bytes."""
    return max(min(2 * cache // size + 1, MOST_COPIES, int(memory * SHARE_OF_MEMORY / size)), 1)


def copies_of(case: Case, inputs: tuple[Tensor, ...], cache: int) -> list[tuple[Tensor, ...]]:
    """Copies of the inputs, leaves where there is a gradient."""
    size = sum(x.numel() * x.itemsize for x in inputs)
    return [fresh(case, inputs) for _ in range(copies_needed(size, cache, usable_memory(inputs[0].device)))]


def passes(case: Case, call: Operation, copies: Sequence[tuple[Tensor, ...]], which: Part) -> list[Call]:
    """One pass over each copy. A forward pass keeps what its backward pass needs, where there is one."""
    if which == "forward" and case.gradients:
        return [partial(call, *copy) for copy in copies]
    return [timed(case, call, copy, which) for copy in copies]


class Rotation:
    """Hands every call the next copy."""

    def __init__(self, copies: int) -> None:
        self._next = itertools.cycle(range(copies))

    def through(self, calls: Sequence[Call]) -> Call:
        """One call of those over the copies."""
        return lambda: calls[next(self._next)]()


@dataclass(frozen=True)
class Pace:
    """Of one variant: calls in a sample, and seconds that the host needs to launch one."""

    calls: int
    host_s: float

    @classmethod
    def of(cls, host_s: float, total_s: float) -> "Pace":
        """Short calls are timed several at a time, so that the two events' own cost disappears."""
        return cls(min(max(math.ceil(SHORTEST_SAMPLE_S / max(total_s, 1e-7)), 1), MOST_CALLS), host_s)

    def cycles(self) -> int:
        """For how long the device has to be busy until all of a sample is in its queue."""
        return int((1.5 * self.host_s * self.calls + LAUNCH_S) * FASTEST_CLOCK_HZ)


@dataclass
class DeviceClock:
    """Milliseconds of one call on the current CUDA device, without the time that the host needs to launch it."""

    paces: dict[Call, Pace] = field(default_factory=dict)

    def __call__(self, call: Call) -> float:
        """One sample of a call that has run before."""
        if call not in self.paces:
            self.paces[call] = self._pace(call)
        pace = self.paces[call]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(pace.cycles())
        start.record()
        for _ in range(pace.calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / pace.calls

    @staticmethod
    def _pace(call: Call) -> Pace:
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        host_s = time.perf_counter() - began
        torch.cuda.synchronize()
        return Pace.of(host_s, time.perf_counter() - began)


def rounds_within(
    seconds: float,
    calls: Sequence[Call],
    clock: Clock,
    least: int,
    most: int,
    now: Callable[[], float] = time.perf_counter,
) -> int:
    """How many rounds of all calls fill about so many seconds."""
    for call in calls:
        call()  # the choice of an algorithm would be taken for its time
        clock(call)
    began = now()
    for call in calls:
        clock(call)
    return min(max(int(seconds / max(now() - began, 1e-7)), least), most)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """What one call allocates at most beyond what was there before; None where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
