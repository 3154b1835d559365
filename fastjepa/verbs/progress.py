"""How far a verb is: a bar on a terminal, elsewhere a line every ten seconds, each with the time that is left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SAY_SECONDS = 10.0


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """What is called with (what is counted, done, total), on stderr; another `what` is a new count."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            tasks: dict[str, TaskID] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what)
                bar.update(tasks[what], completed=done, total=total)

            yield show
        return
    began: dict[str, float] = {}
    said = time.monotonic()

    def say(what: str, done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        began.setdefault(what, now)
        if now - said >= SAY_SECONDS and done < total:
            said = now
            left = (now - began[what]) / done * (total - done)
            console.print(f"{done:,} of {total:,} {what}, {duration(left)} left", markup=False)

    yield say


def duration(seconds: float) -> str:
    """In words that a person reads at once."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
