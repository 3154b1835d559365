"""Where the time of a training step goes: by component, and by kernel."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench.measure import synchronize
from bench.step.ways import Batches, Runner
from fastjepa.models import packing

COMPONENTS = ("target", "context", "predictor", "loss", "backward", "optimizer")
WARM_UP, TIMED, PROFILED = 5, 10, 3
KERNELS = 30


class Marks:
    """When named parts of steps began and ended, by the clock of the device: nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Everything launched inside, also named in traces."""
        with record_function(name):
            start = self._now()
            yield
            self.found.append((name, start, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds by name, a step each; waits for the device."""
        synchronize(self.device)
        found: list[dict[str, float]] = [{}]
        for name, start, end in self.found:
            ms = start.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - start)
            found[-1][name] = found[-1].get(name, 0.0) + ms
            if name == "step":  # the last part to end
                found.append({})
        return found[:-1]


@contextmanager
def networks_marked(runner: Runner, marks: Marks) -> Iterator[None]:
    """Marks the networks' passes: the functions of the packed step, the modules of the reference one."""
    jepa = runner.jepa
    named: list[tuple[Any, str, str]] = [
        (jepa.target_encoder, "forward", "target"), (jepa.encoder, "forward", "context"),
        (jepa.predictor, "forward", "predictor"),
    ]  # fmt: skip
    if jepa.execution == "packed":
        named = [(packing, "encode_all", "target"), (packing, "encode_sets", "context")]
        named.append((packing, "predict_all_sets" if jepa.dense else "predict_sets", "predictor"))
    with ExitStack() as stack:
        for owner, attribute, name in named:
            stack.enter_context(patch.object(owner, attribute, _marked(getattr(owner, attribute), name, marks)))
        yield


def _marked(call: Callable, name: str, marks: Marks) -> Callable:
    def run(*arguments: Any, **more: Any) -> Any:
        with marks.part(name):
            return call(*arguments, **more)

    return run


def marked_step(runner: Runner, batches: Batches, marks: Marks) -> None:
    """The step of `Runner.step`, in named parts."""
    with marks.part("step"):
        with marks.part("forward"):
            loss = runner.forward(batches)
        with marks.part("backward"):
            runner.update.backward(loss)
        with marks.part("optimizer"):
            runner.update.step(runner.taken, loss.detach())
    runner.losses.append(loss.detach())


def components(runner: Runner, batches: Batches, steps: int) -> dict[str, float]:
    """Median ms of each component of a step, and of the whole "step"; "loss" is all of forward but the networks."""
    marks = Marks(runner.device)
    with networks_marked(runner, marks):
        for _ in range(steps):
            marked_step(runner, batches, marks)
    found = marks.steps()
    for parts in found:
        parts["loss"] = parts.pop("forward") - sum(parts[name] for name in COMPONENTS[:3])
    return {name: statistics.median(parts[name] for parts in found) for name in (*COMPONENTS, "step")}


def kernels(runner: Runner, batches: Batches, steps: int, trace: Path | None) -> list[tuple[str, float, float]]:
    """(name, ms a step, calls a step) of all kernels, the most expensive first; operators where there is no GPU."""
    on_gpu = runner.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    marks = Marks(runner.device)
    with networks_marked(runner, marks), profile(activities=activities) as found:
        for _ in range(steps):
            marked_step(runner, batches, marks)
        synchronize(runner.device)
    if trace is not None:
        found.export_chrome_trace(str(trace))
    rows = []
    for event in found.key_averages():
        if (event.device_type == DeviceType.CUDA) != on_gpu or event.is_user_annotation:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append((event.key, microseconds / 1e3 / steps, event.count / steps))
    return sorted(rows, key=lambda row: -row[1])


def write_profile(runner: Runner, batches: Batches, path: Path, head: list[str], *, trace: bool) -> str:
    """Warm up, measure, and write the tables as text, which is returned; with `trace` the Chrome trace beside it."""
    for _ in range(WARM_UP):
        runner.step(batches)
    parts = components(runner, batches, TIMED)
    rows = kernels(runner, batches, PROFILED, path.with_suffix(".trace.json") if trace else None)
    lines = [*head, "", *runner.how, "", f"{'component':<12}{'ms':>10}{'share':>8}   (median of {TIMED} steps)"]
    lines += [f"{name:<12}{parts[name]:>10.3f}{parts[name] / parts['step']:>8.1%}" for name in (*COMPONENTS, "step")]
    kind = "kernel" if runner.device.type == "cuda" else "operator"
    total = sum(ms for _, ms, _ in rows)
    lines += ["", f"{kind}s: {total:.3f} ms and {sum(calls for *_, calls in rows):.0f} calls a step, all together"]
    lines.append(f"{'ms':>10}{'share':>8}{'calls':>8}  the {KERNELS} most expensive of {len(rows)} (a step)")
    lines += [f"{ms:>10.3f}{ms / total:>8.1%}{calls:>8.0f}  {name[:150]}" for name, ms, calls in rows[:KERNELS]]
    text = "\n".join(lines) + "\n"
    path.write_text(text)
    return text
