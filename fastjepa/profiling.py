"""The profiler of a run: `runtime.profile` names steps, which leave a trace and a table of the costliest operations.

Nothing is measured, and nothing of the profiler is loaded, before the first of these steps.

    profile/trace-steps-10-20.json.gz    for chrome://tracing or ui.perfetto.dev
    profile/operations.txt               the table that the console shows
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MOST_SHOWN = 10
LONGEST_NAME = 60


class Profiler:
    """Profiles the steps of `wanted`, "10..20", of this process; None profiles nothing.

    `say` takes lines for the console. Steps count from 1, as everywhere in the log.
    """

    def __init__(self, wanted: str | None, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        self.first, self.last = (0, -1) if wanted is None else steps_of(wanted)
        self.folder, self.device, self._say = folder / "profile", device, say
        self._running: Any = None
        self._taken: list[int] = []

    def begin(self, step: int) -> None:
        """The run begins after this step: say where steps that were to be profiled lie behind it."""
        if self.first and step >= self.first:
            kept = f", {self.folder} has what was measured then" if self.folder.is_dir() else ""
            self._say(
                f"profile    nothing: runtime.profile names steps {self.first} to {self.last}, and this run goes on "
                f"after step {step}{kept}"
            )
            self.first, self.last = 0, -1

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a training step."""
        if not self.first <= number <= self.last:
            yield
            return
        if self._running is None:
            self._start()
        self._taken.append(number)
        yield
        if number == self.last:
            self.close()

    def touches(self, step: int, steps: int) -> dict[str, bool]:
        """An entry for a row about the `steps` steps up to this one: profiled ones are slower than others."""
        return {"profiled": True} if step >= self.first and step - steps < self.last and self.first else {}

    def close(self) -> None:
        """Write what was measured, if anything was and is not written yet; also of a run that ended in between."""
        running, self._running = self._running, None
        if running is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        running.stop()
        name = f"trace-steps-{self._taken[0]}-{self._taken[-1]}.json.gz"
        lines = table(running.key_averages(), self.device, len(self._taken))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = self.folder / f".tmp-{name}"
            running.export_chrome_trace(str(scratch))
            os.replace(scratch, self.folder / name)
            head = f"steps {self._taken[0]} to {self._taken[-1]} on {self.device}"
            (self.folder / "operations.txt").write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
        except OSError as error:  # a full disk
            self._say(f"warning: the profile cannot be written: {error}")
        self._say(f"profile    steps {self._taken[0]} to {self._taken[-1]}, which were slower for it:")
        for line in lines:
            self._say(f"           {line}")
        self._say(f"           {self.folder / name} is for ui.perfetto.dev or chrome://tracing")

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        self._running = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
        self._running.start()


def steps_of(text: str) -> tuple[int, int]:
    """(first, last) of "10..20"."""
    first, _, last = text.partition("..")
    return int(first), int(last)


def table(events: Any, device: torch.device, steps: int) -> list[str]:
    """The ten costliest operations by the time that they take themselves, the device's where it is a GPU."""
    from torch.autograd import DeviceType

    on_gpu = device.type == "cuda"
    rows = []
    for event in events:
        if (event.device_type == DeviceType.CUDA) != on_gpu or event.is_user_annotation:
            continue
        rows.append((event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key))
    rows.sort(key=lambda row: -row[0])
    total = sum(row[0] for row in rows) or 1.0
    where = "GPU" if on_gpu else "CPU"
    lines = [f"{'ms a step':>10}{'share':>8}{'calls':>8}   the {min(MOST_SHOWN, len(rows))} costliest by {where} time"]
    for microseconds, calls, name in rows[:MOST_SHOWN]:
        shown = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."
        lines.append(f"{microseconds / 1e3 / steps:>10.3f}{microseconds / total:>8.1%}{calls / steps:>8.4g}   {shown}")
    return lines
