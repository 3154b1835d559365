"""What a run says: console, train.log, metrics.jsonl, status.json, and on request TensorBoard and Weights & Biases.

Of several processes the first one writes (`RunLog`); the others have a `Log` that speaks of their own troubles only.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fastjepa import config
from fastjepa.runfolder import write_atomically
from fastjepa.sinks import Sinks


class Log:
    """That of a process which leaves speaking to the first one. `who` names it: "process 3 of 8"."""

    def __init__(self, folder: Path, who: str = "") -> None:
        self.folder, self.who = folder, who

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what was begun."""

    def say(self, text: str) -> None:
        """One line on the console and in train.log."""

    def note(self, text: str) -> None:
        """Into train.log only, whichever process it is."""
        try:
            with (self.folder / "train.log").open("a", encoding="utf-8", errors="backslashreplace") as out:
                out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {self.who}: {text}\n")
        except OSError as error:
            sys.stderr.write(f"{self.who}: the log in {self.folder} cannot be written: {error}\n")

    def tell(self, text: str) -> None:
        """Say something of this process, whichever it is."""
        sys.stderr.write(f"{self.who}: {text}\n")
        self.note(text)

    def start_progress(self, step: int) -> None:
        """Show the bar, where the console is a terminal."""

    def stop_progress(self) -> None:
        """Take the bar away."""

    def advance(self, step: int, seconds_left: float | None = None) -> None:
        """Move the bar; None where nothing tells yet how long the run takes."""

    def rewind(self, step: int) -> None:
        """Drop rows of metrics.jsonl after this step: a resumed run logs them again, each step once."""

    def metrics(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl; numbers that are not finite are written as null."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """Show the settings, dotted keys and plain values, in TensorBoard and W&B."""

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers that TensorBoard and W&B get beside the rows of metrics.jsonl: accuracies of a probe, say."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """An image file, which TensorBoard and W&B get."""

    def status(self, state: str, step: int | None, **more: Any) -> None:
        """Replace status.json: state, step (None for the last one that was said), time of the heartbeat."""


class RunLog(Log):
    """Writes to the console and into a run folder. A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, folder: Path, settings: config.Log, name: str, last_step: int) -> None:
        super().__init__(folder)
        self.last_step = last_step
        self._step, self._state = 0, ""
        self.console = Console(highlight=False, soft_wrap=True, emoji=False)
        self._text = (folder / "train.log").open("a", encoding="utf-8", errors="backslashreplace")
        self._metrics = (folder / "metrics.jsonl").open("a+", encoding="utf-8")
        self._progress: Progress | None = None
        self._task: Any = None
        self._sinks = Sinks(settings, folder, name, self.say)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_progress()
        self._sinks.close(failed=self._state == "failed")
        for file in (self._text, self._metrics):
            with self._full_disk_is_said():
                file.close()

    def say(self, text: str) -> None:
        """One line on the console and in train.log."""
        # A file name may be any bytes; a console takes characters only.
        text = text.encode(errors="backslashreplace").decode()
        self.console.print(text, markup=False)
        with self._full_disk_is_said():
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
            self._text.flush()

    def note(self, text: str) -> None:
        """Into train.log only."""
        with self._full_disk_is_said():
            self._text.write(f"{text}\n")
            self._text.flush()

    def tell(self, text: str) -> None:
        """As `Log`, on the console like everything else."""
        self.say(text)

    def start_progress(self, step: int) -> None:
        """Show the bar, where the console is a terminal."""
        if self.console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[left]}"))
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task("train", total=self.last_step, completed=step, left="")

    def stop_progress(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def advance(self, step: int, seconds_left: float | None = None) -> None:
        """Move the bar."""
        if self._progress is not None:
            left = "" if seconds_left is None else f"{duration(seconds_left)} left"
            self._progress.update(self._task, completed=step, left=left)

    def rewind(self, step: int) -> None:
        """Drop rows of metrics.jsonl after this step: a resumed run logs them again, each step once."""
        self._metrics.seek(0)
        rows = []
        lines = self._metrics.read().splitlines()
        for line in lines:
            try:
                keep = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                keep = False  # half written where the process was killed
            if keep:
                rows.append(line)
        self._metrics.close()
        write_atomically(self.folder / "metrics.jsonl", "".join(f"{row}\n" for row in rows))
        self._metrics = (self.folder / "metrics.jsonl").open("a+", encoding="utf-8")
        if len(rows) < len(lines):
            self._sinks.rewind(step)

    def metrics(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl; numbers that are not finite are written as null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self._full_disk_is_said():
            self._metrics.write(json.dumps(clean) + "\n")
            self._metrics.flush()
        numbers = {k: v for k, v in clean.items() if isinstance(v, int | float) and k != "step"}
        self._sinks.scalars(row["step"], numbers)

    def settings(self, values: Mapping[str, Any]) -> None:
        """As `Log`."""
        self._sinks.settings(values)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """As `Log`."""
        self._sinks.scalars(step, numbers)

    def picture(self, name: str, path: Path, step: int) -> None:
        """As `Log`."""
        self._sinks.picture(name, path, step)

    def status(self, state: str, step: int | None, **more: Any) -> None:
        """As `Log`."""
        self._step, self._state = self._step if step is None else step, state
        content = {"state": state, "step": self._step, "steps": self.last_step, "heartbeat": time.time(), **more}
        with self._full_disk_is_said():
            write_atomically(self.folder / "status.json", json.dumps(content, indent=2))

    @contextmanager
    def _full_disk_is_said(self) -> Iterator[None]:
        """A log that cannot be written is no reason to end a run of days; what is buffered follows with the next."""
        try:
            yield
        except OSError as error:
            self.console.print(f"warning: the log in {self.folder} cannot be written: {error}", markup=False)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def duration(seconds: float) -> str:
    """Seconds as 4 s, 12 min or 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
