"""What a training step costs against the size of what it is given: one axis at a time, from the published step on.

On a GPU that is ViT-L's; on a CPU a tiny model takes its place, which shows the course of a curve and no more.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.data.loading import CLIPS, TINY, own_clock
from bench.files import Row
from bench.pairing import alternate, processor_clock, rate_row, ratio_row
from bench.step.contenders import time_steps
from bench.step.pairs import FAILURES
from bench.step.ways import CLIPPING, ROOT, Batches, Runner, fit_together, plan_of, prepare
from fastjepa import configfile
from fastjepa.config import Settings
from fastjepa.memory import usable_memory
from fastjepa.plan import Plan

Value = int | float | str
# By kind of device. The tokens that are seen follow from the share of the frame that a tube hides, which stands here.
AXES: dict[str, dict[str, tuple[Value, ...]]] = {
    "batch": {"cuda": (8, 16, 24, 48, 96), "cpu": (2, 4, 8)},
    "tokens": {"cuda": (0.5, 0.75, 0.9, 0.95), "cpu": (0.5, 0.75, 0.9)},
    "truncation": {"cuda": ("group", "none"), "cpu": ("group", "none")},
    "frames": {"cuda": (8, 16, 32), "cpu": (4, 8, 16)},
    "crop": {"cuda": (160, 224, 288, 384), "cpu": (64, 96, 128)},
}
DRAWS = 50
WARM_UP = {"cuda": 5, "cpu": 5}
IN_TURNS, ALONE = "in turns", "by itself"
TURN = 5  # timed steps in a row on a GPU, where the host runs ahead; on a CPU there is one


def settings_of(axis: str, value: Value, device: torch.device) -> Settings:
    """The published step with one thing changed."""
    clips = value if axis == "batch" else CLIPS[device.type]
    changed = {
        "tokens": ("mask.kind=tube", f"mask.ratio={value}"),
        "truncation": (f"mask.truncation={value}",),
        "frames": (f"data.frames={value}",),
        "crop": (f"data.crop={value}",),
    }.get(axis, ())
    batch = (f"optim.global_batch={clips}", f"data.batch_size={clips}")
    tiny = TINY if device.type == "cpu" else ()
    return configfile.load(ROOT / "configs" / "vitl.yaml", [*tiny, CLIPPING, *batch, *changed])


@dataclass
class Point:
    """One point of an axis: what is known of it, and while its turns last, what runs."""

    settings: Settings
    parameters: dict[str, Any]
    device: torch.device
    ms: list[float] = field(default_factory=list)
    plan: Plan = field(init=False)
    peak_bytes: int = 0
    skipped: str = ""
    lacked_memory: bool = False
    order: str = ""
    _running: tuple[Runner, Batches, int] | None = None

    def __post_init__(self) -> None:
        self.plan = plan_of(self.settings, self.device)

    @property
    def tokens(self) -> float:
        """Context tokens of a clip, those of all mask sets together, on the mean."""
        return sum(self.plan.context)

    def build(self) -> bool:
        """Make and warm up what it steps with; whether that was possible."""
        return self._attempt(self._build)

    def turn(self) -> float:
        """Some steps: the milliseconds of one, noted too; 0 where it has failed before or does so now."""
        return self.ms[-1] if self._running is not None and self._attempt(self._step) else 0.0

    def release(self) -> None:
        """Let go of what it steps with."""
        self._running = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def row(self, name: str) -> Row:
        """Clips/s, or why there are none."""
        if self.skipped:
            return {"name": name, "skipped": self.skipped, "parameters": self.parameters}
        row = rate_row(name, self.ms, self.settings.optim.global_batch, "clips/s", self.parameters)
        peak = self.peak_bytes / 1e9 if self.device.type == "cuda" else None
        return row | {"context_tokens": round(self.tokens, 1), "peak_memory_gb": peak, "order": self.order}

    def over(self, first: "Point", name: str) -> list[Row]:
        """How many times the clips/s of the first point this one has, by turns; nothing where they took none."""
        if self is first or not (self.ms and first.ms) or {self.order, first.order} != {IN_TURNS}:
            return []
        clips = self.settings.optim.global_batch / first.settings.optim.global_batch
        times = {"this": self.ms, "first": [clips * ms for ms in first.ms]}
        return [ratio_row(f"{name}, over the first point", times, "first", self.parameters)]

    def _attempt(self, call: Callable[[], None]) -> bool:
        try:
            call()
            return True
        except torch.AcceleratorError:
            raise  # the device itself has failed, and everything after this would fail with it
        except FAILURES as error:
            self.lacked_memory = isinstance(error, torch.OutOfMemoryError)
            self.skipped = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.release()  # outside the clause above, whose traceback holds on to tensors
        return False

    def _build(self) -> None:
        batches = prepare(self.settings, DRAWS, self.device)
        before = _allocated(self.device)
        runner = Runner(self.settings, self.device)
        for _ in range(WARM_UP[self.device.type]):
            runner.step(batches)
        self._running = runner, batches, _allocated(self.device) - before

    def _step(self) -> None:
        assert self._running is not None, "a point is stepped after it was built"
        runner, batches, held = self._running
        if self.device.type == "cpu":
            self.ms.append(processor_clock(lambda: runner.step(batches)))
        else:
            ms, peak = time_steps(runner, batches, TURN)
            self.ms += ms
            self.peak_bytes = max(self.peak_bytes, held + peak)
        if not runner.losses[-1].isfinite():
            raise ValueError(f"the loss of step {runner.taken} is not finite")


def points_of(axis: str, device: torch.device) -> list[Point]:
    """The points of an axis, none of them built."""
    points = []
    for value in AXES[axis][device.type]:
        s = settings_of(axis, value, device)
        points.append(Point(s, {"model": s.model.name, axis: value}, device))
        if axis == "tokens":
            points[-1].parameters |= {"tokens": round(points[-1].tokens), "ratio": value}
    return points


class Unwatched:
    """Takes turns as pytest-benchmark's fixture does, which serves one group of a case, the first."""

    def pedantic(self, target: Callable, args: tuple, setup: Callable[[], None], rounds: int, iterations: int) -> None:
        """Rounds of setup and target."""
        for _ in range(rounds):
            setup()
            target(*args)


def measure(benchmark: BenchmarkFixture, points: Sequence[Point], rounds: int) -> None:
    """Turns of all points where they fit into memory together, else one after another; each says which it was.

    A point that lacks memory beside the others has another try by itself.
    """
    watching: Any = benchmark
    together = fit_together([point.plan for point in points], usable_memory(points[0].device))
    groups = [list(points)] if together else [[point] for point in points]
    for group in groups:
        for point in group:
            point.order = IN_TURNS if len(group) > 1 else ALONE
        built = {str(number): point.turn for number, point in enumerate(group) if point.build()}
        if built:
            alternate(watching, built, own_clock, rounds, warm_up=0)
            watching = Unwatched()
        for point in group:
            point.release()
            if point.lacked_memory and len(group) > 1:
                point.ms, point.peak_bytes, point.skipped, point.lacked_memory = [], 0, "", False
                groups.append([point])
        torch._dynamo.reset()  # compiled code holds on to what it was made for


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
