"""Timing that every bench here shares, and one case of it as a row of a result file.

Needs torch and the standard library only.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.files import Row, quantiles
from bench.machine import LoadWatch

Call = Callable[[], object]

UNIT_SIZE = {"TFLOP/s": 1e12, "GB/s": 1e9}
# What torch raises for a kernel, a dtype or an amount of memory that this machine lacks. The two in the middle are
# RuntimeErrors already; they are written out because they are the ones expected.
CANNOT_RUN = (RuntimeError, NotImplementedError, torch.OutOfMemoryError, ImportError)

SHORTEST_SAMPLE_S = 1e-3  # shorter calls are timed several at a time, so that the two events' own cost disappears
MOST_CALLS = 20  # in a sample: a full launch queue (about 1,000 kernels) would stall the host
MOST_SAMPLES = 10_000
FASTEST_CLOCK_HZ = (
    2e9  # no H100 or H200 runs above it: turns seconds into a number of cycles that lasts at least so long
)


def gemm_flops(m: int, n: int, k: int) -> int:
    """Operations of an [m, k] by [k, n] product, a multiply-add counted as two."""
    return 2 * m * n * k


def attention_forward_flops(batch: int, heads: int, length: int, head_dim: int) -> int:
    """Operations of softmax(QK^T)V, no mask: two products of 2*N*N*d for each head; the softmax is not counted."""
    return 4 * batch * heads * length * length * head_dim


def attention_backward_flops(batch: int, heads: int, length: int, head_dim: int) -> int:
    """Operations of the backward pass alone: dV, dP, dQ, dK. Scores that fused kernels recompute are not counted."""
    return 8 * batch * heads * length * length * head_dim


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Call, device: torch.device, seconds: float, min_samples: int = 3) -> list[float]:
    """Milliseconds of one call, one figure per sample, in the order in which they ran.

    Two calls come first, outside the timing: compilation, kernel choice and allocation belong to them. Samples fill
    about `seconds`, but never fewer than `min_samples` are taken.
    """
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    host_s = time.perf_counter() - start
    synchronize(device)
    total_s = max(time.perf_counter() - start, 1e-7)
    calls = min(max(math.ceil(SHORTEST_SAMPLE_S / total_s), 1), MOST_CALLS)
    samples = min(max(int(seconds / (total_s * calls)), min_samples), MOST_SAMPLES)
    if device.type == "cuda":
        return _cuda_samples(call, samples, calls, host_s, launch_bound=host_s > 0.5 * total_s)
    return [_cpu_sample(call, calls) for _ in range(samples)]


def _cpu_sample(call: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) * 1e3 / calls


def _cuda_samples(call: Call, samples: int, calls: int, host_s: float, *, launch_bound: bool) -> list[float]:
    # Nothing waits inside the loop: a device that idles between samples raises its clock and flatters the result.
    marks = []
    for _ in range(samples):
        if launch_bound:
            # The host needs longer to launch these kernels than the device to run them. Keep the device busy until all
            # of the sample is queued: otherwise the host's time would be taken for the kernels'.
            torch.cuda._sleep(int(1.5 * host_s * calls * FASTEST_CLOCK_HZ))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / calls for start, end in marks]


@dataclass(frozen=True)
class Case:
    """One thing to measure: `prepare(device)` builds the inputs and returns the call whose time is taken.

    `work` is the FLOP or the bytes of one call, `unit` what its rate is given in. `share` scales the time spent on it.
    `watch_load` adds clock, power and temperature under this load, where the machine tells them.
    """

    name: str
    prepare: Callable[[torch.device], Call]
    work: float
    unit: str
    parameters: dict[str, Any]
    share: float = 1.0
    watch_load: bool = False


def measure(case: Case, device: torch.device, seconds: float) -> Row:
    """Time one case. Building or running it may turn out impossible here (CANNOT_RUN); its row then says why."""
    row: Row = {"name": case.name, "parameters": case.parameters}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            times, load = _times_and_load(case, device, seconds * case.share)
            row |= _figures(times, case.work, case.unit) | load
        except torch.AcceleratorError:
            raise  # the device itself has failed, and everything after this would fail with it: not a missing kernel
        except CANNOT_RUN as error:
            row["skipped"] = f"{type(error).__name__}: {_first_line(error)}"
    if heard:  # this is where torch says why it refused or replaced a kernel
        row["warnings"] = sorted({_first_line(warning.message) for warning in heard})
    if device.type == "cuda":
        torch.cuda.empty_cache()  # one case's freed blocks must not fragment the next one's memory
    return row


def _times_and_load(case: Case, device: torch.device, seconds: float) -> tuple[list[float], dict[str, float | None]]:
    # A function of its own: the inputs die with it, before the next case builds its own.
    call = case.prepare(device)
    if not case.watch_load:
        return time_calls(call, device, seconds), {}
    with LoadWatch(device) as load:
        times = time_calls(call, device, seconds)
    return times, load.last


def _figures(times_ms: list[float], work: float, unit: str) -> Row:
    scale = work / UNIT_SIZE[unit] * 1e3
    p20, median, p80 = quantiles(times_ms)
    part = max(len(times_ms) // 10, 1)
    return {
        "value": scale / median,
        "unit": unit,
        "p20": scale / p80,
        "p80": scale / p20,
        "min": scale / max(times_ms),
        "max": scale / min(times_ms),
        "ms": median,
        "n": len(times_ms),
        # time of the last tenth over the first: above 1 the device slowed down, as hot or power-limited ones do
        "drift": statistics.median(times_ms[-part:]) / statistics.median(times_ms[:part]),
    }


def _first_line(message: object) -> str:
    text = str(message).strip()
    return text.splitlines()[0][:300] if text else "no message"
