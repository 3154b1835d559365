"""Turns of timed steps: which ways take them together, and what becomes of one that fails."""

import gc
import math
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch._dynamo.utils import counters

from bench.measure import CANNOT_RUN, synchronize
from bench.steps.rows import Bench, Figures
from bench.steps.ways import Batches, Runner, fit_together
from fastjepa.memory import usable_memory

try:
    from triton.errors import TritonError
except ImportError:  # no Triton on this machine: nothing raises its errors
    TritonError = RuntimeError

WARM_UP = 5  # compilation, choices of algorithms, memory of the allocator
TURN = 10  # timed steps in a turn, after one that is not: the host is ahead of the device again by then
BUILDING = 0.6  # of a model's time: what is not built by then is left out, so that the rest is timed

# A kernel that does not compile is Triton's error, settings that this machine cannot follow are ValueErrors.
FAILURES = (*CANNOT_RUN, TritonError, ValueError)


def measure_model(bench: Bench) -> None:
    """Every way of one model, all in turns where they fit into memory together."""
    ways = list(bench.settings)
    together = len(ways) == 1 or fit_together(list(bench.plans.values()), usable_memory(bench.device))
    bench.order = "in turns" if together else "one after another, the first again at the end"
    if together:
        left = measure_together(bench, ways)
        if left:
            bench.order += f"; by itself: {', '.join(left)}"
        for way in left:
            measure_together(bench, [way])
    else:
        for way in ways:
            measure_together(bench, [way])
        if bench.found[ways[0]].ms and not bench.late():
            measure_together(bench, [ways[0]], suffix=", again")
    bench.write(complete=True)


def measure_together(bench: Bench, ways: Sequence[str], suffix: str = "") -> list[str]:
    """Build these ways and time them in turns; those that lacked memory beside the others, which try it by themselves.

    Nothing of them is alive afterwards.
    """
    runners: dict[str, Runner] = {}
    held: dict[str, int] = {}
    lacking: list[str] = []

    def attempt(way: str, call: Callable[[Figures], None]) -> None:
        """Run; what fails becomes the reason in the way's row, or another try without the others."""
        figures = bench.found.setdefault(way + suffix, Figures())
        try:
            call(figures)
            return
        except torch.AcceleratorError as error:
            # The device itself has failed, and everything after this would fail with it.
            figures.skipped = _reason(error)
            bench.write(complete=False)
            raise
        except FAILURES as error:
            lacks = isinstance(error, torch.OutOfMemoryError) and len(ways) > 1
            figures.skipped = _reason(error)
        # Outside the clause above, whose traceback holds on to tensors.
        runners.pop(way, None)
        _free()
        if lacks:
            del bench.found[way]
            lacking.append(way)

    def build(way: str, figures: Figures) -> None:
        before, graphs = _allocated(bench.device), _graphs()
        runner = Runner(bench.settings[way], bench.device)
        figures.how = runner.how
        for _ in range(WARM_UP):
            runner.step(bench.batches)
        synchronize(bench.device)
        figures.losses = _numbers(runner)
        held[way], figures.graphs = _allocated(bench.device) - before, _graphs() - graphs
        runners[way] = runner

    def turn(way: str, figures: Figures) -> None:
        runner, graphs = runners[way], _graphs()
        ms, peak = time_steps(runner, bench.batches, min(TURN, bench.steps - len(figures.ms)))
        figures.losses = _numbers(runner)
        figures.ms += ms
        figures.peak_bytes = max(figures.peak_bytes, held[way] + peak)
        figures.graphs_while_timed += _graphs() - graphs

    for way in ways:
        if bench.late(BUILDING if len(ways) > 1 else 1.0):
            bench.found[way + suffix] = Figures(skipped="no time was left of --budget")
        else:
            _say(bench, f"{way}{suffix}: building")
            attempt(way, lambda figures, way=way: build(way, figures))
        bench.write(complete=False)
    for number in range(math.ceil(bench.steps / TURN)):
        if number and bench.late():
            break
        for way in list(runners):
            attempt(way, lambda figures, way=way: turn(way, figures))
        bench.write(complete=False)
    runners.clear()
    torch._dynamo.reset()  # compiled code holds on to what it was made for, and is looked through at every call
    _free()
    return lacking


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


def _numbers(runner: Runner) -> list[float]:
    losses = torch.stack(runner.losses).tolist()
    bad = [step for step, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise ValueError(f"the loss of step {bad[0]} is not finite")
    return losses


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return counters["stats"]["unique_graphs"]


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reason(error: BaseException) -> str:
    # The first line of what a compiler raises only says which compiler it was.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300] or 'no message'}"


def _say(bench: Bench, text: str) -> None:
    seconds = time.perf_counter() - bench.began
    print(f"{seconds:6.0f} s  {bench.header['model']}, {text}", file=sys.stderr, flush=True)
