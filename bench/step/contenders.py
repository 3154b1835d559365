"""What takes training steps beside another: the library in one of its ways, or whatever has the same methods."""

import gc
import math
import time
from typing import Any, Protocol

import torch
from torch._dynamo.utils import counters

from bench.machine import LoadWatch
from bench.measure import synchronize
from bench.step.profile import components
from bench.step.ways import Batches, Runner
from fastjepa.config import Settings

WARM_UP = 5  # compilation, choices of algorithms, memory of the allocator
COMPONENT_STEPS = 10


class Contender(Protocol):
    """Takes steps of one model on the same batches as another contender."""

    def turn(self, count: int) -> list[float]:
        """Milliseconds of `count` steps in a row, after one that is not timed."""

    def losses(self) -> list[float]:
        """Of every step so far. Errors: ValueError for one that is not finite."""

    def facts(self) -> dict[str, Any]:
        """What a row says besides: `peak_memory_gb` (None on a CPU), `components`, `how`."""

    def close(self) -> None:
        """Let go of its memory and its processes."""


class Own:
    """A way of the library."""

    def __init__(self, s: Settings, batches: Batches, device: torch.device, warm_up: int = WARM_UP) -> None:
        """Build it and take the first steps.

        Errors: ValueError where the settings ask for what this machine lacks.
        """
        self.batches, self.device = batches, device
        before = _allocated(device)
        self.runner = Runner(s, device)
        for _ in range(warm_up):
            self.runner.step(batches)
        synchronize(device)
        # Weights and moments, and not the batches, which others share.
        self.held = _allocated(device) - before
        self.peak, self.graphs = 0, 0

    def turn(self, count: int) -> list[float]:
        """Milliseconds of `count` steps in a row, after one that is not timed."""
        graphs = _graphs()
        ms, peak = time_steps(self.runner, self.batches, count)
        self.peak = max(self.peak, peak)
        self.graphs += _graphs() - graphs
        return ms

    def losses(self) -> list[float]:
        """Of every step so far. Errors: ValueError for one that is not finite."""
        return finite(torch.stack(self.runner.losses).tolist())

    def facts(self) -> dict[str, Any]:
        """What a row says besides; takes some more steps for the breakdown, and for clock and power under load."""
        peak = (self.held + self.peak) / 1e9 if self.device.type == "cuda" else None
        with LoadWatch(self.device) as load:  # not while steps are timed: reading it takes the host's time
            parts = components(self.runner, self.batches, COMPONENT_STEPS)
        return {
            "peak_memory_gb": peak,
            "graphs_while_timed": self.graphs,
            "components": parts,
            "how": self.runner.how,
            **load.last,
        }

    def close(self) -> None:
        """Let go of its memory."""
        del self.runner, self.batches
        torch._dynamo.reset()  # compiled code holds on to what it was made for, and is looked through at every call
        free()


def time_steps(runner: Runner, batches: Batches, count: int) -> tuple[list[float], int]:
    """Milliseconds of `count` steps in a row after one that is not timed, and the bytes that they added at most.

    Nothing waits between the steps: a device that idles raises its clock, and a host that is behind shows.
    """
    device = runner.device
    if device.type != "cuda":
        runner.step(batches)
        ms = []
        for _ in range(count):
            began = time.perf_counter()
            runner.step(batches)
            ms.append(1e3 * (time.perf_counter() - began))
        return ms, 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner.step(batches)  # the host gets ahead
    marks = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        runner.step(batches)
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in marks], torch.cuda.max_memory_allocated(device) - before


def finite(losses: list[float]) -> list[float]:
    """The same. Errors: ValueError for one that is not finite: its step is no figure."""
    bad = [step for step, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise ValueError(f"the loss of step {bad[0]} is not finite")
    return losses


def free() -> None:
    """Give back memory that nothing uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return counters["stats"]["unique_graphs"]


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
