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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastjepa import config
from fastjepa.runfolder import write_atomically


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

    def advance(self, step: int) -> None:
        """Move the bar."""

    def rewind(self, step: int) -> None:
        """Drop rows of metrics.jsonl after this step: a resumed run logs them again, each step once."""

    def metrics(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl; numbers that are not finite are written as null."""

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Figures that are no row of metrics.jsonl, such as those of a probe, for TensorBoard and Weights & Biases."""

    def status(self, state: str, step: int | None, **more: Any) -> None:
        """Replace status.json: state, step (None for the last one that was said), time of the heartbeat."""


class RunLog(Log):
    """Writes to the console and into a run folder. A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, folder: Path, settings: config.Log, name: str, last_step: int) -> None:
        super().__init__(folder)
        self.last_step = last_step
        self._step = 0
        self.console = Console(highlight=False, soft_wrap=True, emoji=False)
        self._text = (folder / "train.log").open("a", encoding="utf-8", errors="backslashreplace")
        self._metrics = (folder / "metrics.jsonl").open("a+", encoding="utf-8")
        self._progress: Progress | None = None
        self._task: Any = None
        self._board = _tensorboard(folder) if settings.tensorboard else None
        self._wandb = _wandb(folder, name) if settings.wandb else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_progress()
        for sink in (self._text, self._metrics, self._board):
            if sink is not None:
                with self._full_disk_is_said():
                    sink.close()
        if self._wandb is not None:
            self._wandb.finish()

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
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task("train", total=self.last_step, completed=step)

    def stop_progress(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

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
        if self._board is not None and len(rows) < len(lines):
            self._board.close()
            self._board = _tensorboard(self.folder, purge_step=step + 1)

    def metrics(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl; numbers that are not finite are written as null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self._full_disk_is_said():
            self._metrics.write(json.dumps(clean) + "\n")
            self._metrics.flush()
        self.scalars(row["step"], {k: v for k, v in clean.items() if isinstance(v, int | float) and k != "step"})

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """As `Log`."""
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def status(self, state: str, step: int | None, **more: Any) -> None:
        """As `Log`."""
        self._step = self._step if step is None else step
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


def _tensorboard(folder: Path, **options: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("log.tensorboard needs the package tensorboard: pip install 'fastjepa[log]'") from None
    return SummaryWriter(str(folder / "tensorboard"), **options)


def _wandb(folder: Path, name: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError("log.wandb needs the package wandb: pip install 'fastjepa[log]'") from None
    return wandb.init(project="fastjepa", name=name, dir=str(folder), id=folder.name, resume="allow")
