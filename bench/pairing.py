"""Variants of one thing, timed in turns inside one case of pytest-benchmark.

Whatever slows a machine down for a while (its heat, its power limit, its neighbours) then slows all variants down, and
their ratio stays. What pytest-benchmark prints is the first variant; the others are in the rows that are made here.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.files import Row, quantiles
from bench.measure import Call

Clock = Callable[[Call], float]
WARM_UP = 3  # compilation, allocation and the choice of an algorithm belong to nobody's time


def processor_clock(call: Call) -> float:
    """Milliseconds of this process on its processors: what others do on the machine counts as little as it can."""
    began = time.process_time()
    call()
    return 1e3 * (time.process_time() - began)


def wall_clock(call: Call) -> float:
    """Milliseconds by the clock on the wall, for what waits for other processes."""
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def alternate(
    benchmark: BenchmarkFixture, variants: Mapping[str, Call], clock: Clock, rounds: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Milliseconds of each variant, one figure a round. A round is one call of each, the first variant last.

    pytest-benchmark times the first variant; the others run between its rounds. By `processor_clock` all have one
    thread.
    """
    threads = torch.get_num_threads()
    if clock is processor_clock:
        torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in variants}
    first, *others = variants
    for call in variants.values():
        for _ in range(warm_up):
            call()

    def turn(names: list[str]) -> None:
        for name in names:
            times[name].append(clock(variants[name]))

    benchmark.pedantic(turn, args=([first],), setup=lambda: turn(others), rounds=rounds, iterations=1)
    torch.set_num_threads(threads)
    return times


def rate_row(name: str, ms: list[float], work: float, unit: str, parameters: dict[str, Any]) -> Row:
    """`work` (in units of `unit` without its "/s") a call, as a row: the rate at the median time, with its spread."""
    p20, median, p80 = quantiles(ms)
    return {"name": name, "value": 1e3 * work / median, "unit": unit, "p20": 1e3 * work / p80, "p80": 1e3 * work / p20,
            "ms": median, "n": len(ms), "parameters": parameters}  # fmt: skip


def time_row(name: str, ms: list[float], parameters: dict[str, Any]) -> Row:
    """The median time as a row, in ms."""
    p20, median, p80 = quantiles(ms)
    return {"name": name, "value": median, "unit": "ms", "p20": p20, "p80": p80, "n": len(ms), "parameters": parameters}


def ratio_row(
    name: str, times: Mapping[str, list[float]], over: str, parameters: dict[str, Any], of: str | None = None
) -> Row:
    """How many times the speed of `over` the variant `of` has, the first one where it is None.

    The median of the rounds, with its spread.
    """
    fast = times[next(iter(times)) if of is None else of]
    p20, median, p80 = quantiles([theirs / ours for theirs, ours in zip(times[over], fast)])
    return {"name": name, "value": median, "unit": "x", "p20": p20, "p80": p80, "n": len(fast),
            "parameters": parameters}  # fmt: skip
