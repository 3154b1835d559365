"""A function over many items in processes of their own: one that crashes or hangs costs its item, not the rest."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

START_SECONDS = 300.0  # imports from a slow network disk
CRASHED = "the decoder crashed"

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Lost:
    """What there is instead of an answer: the reason, a sentence without a full stop."""

    reason: str


def each_apart(
    function: Callable[[Item], Answer], items: Sequence[Item], workers: int, limit: Callable[[Item], float]
) -> Generator[tuple[int, Answer | Lost], None, None]:
    """(number of the item, answer) as they come, from at most `workers` processes that are started for it.

    `function` is found by name in a new interpreter (spawn). An item on which a process dies is tried once more, as the
    system kills processes for want of memory too; one that takes more than `limit(item)` seconds is given up. Errors:
    ValueError for `workers` below 1, RuntimeError where processes cannot start at all.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    waiting = deque(range(len(items)))
    tried_again: set[int] = set()
    crew: list[_Worker] = []
    try:
        while len(crew) < min(workers, len(items)):
            crew.append(_Worker(function))
        while crew:
            ready = wait([worker.pipe for worker in crew], max(0.0, min(w.deadline for w in crew) - time.monotonic()))
            now = time.monotonic()
            for worker in list(crew):
                number, lost = worker.number, None
                answer: Any = None
                if worker.pipe in ready:
                    try:
                        answer = worker.pipe.recv()
                    except (EOFError, OSError):
                        lost = CRASHED
                elif now >= worker.deadline:
                    lost = f"reading it took more than {worker.limit:.0f} s"
                else:
                    continue
                if lost is None:
                    if number is not None:
                        yield number, answer
                    if waiting:
                        worker.give(waiting[0], items[waiting[0]], limit(items[waiting.popleft()]))
                    else:
                        worker.end()
                        crew.remove(worker)
                    continue
                worker.end()
                crew.remove(worker)
                if number is None:
                    raise RuntimeError(
                        "a process ended before it began: out of memory, or the calling script lacks "
                        '`if __name__ == "__main__":`'
                    )
                if lost == CRASHED and number not in tried_again:
                    tried_again.add(number)
                    waiting.append(number)
                else:
                    yield number, Lost(lost)
                if waiting:
                    crew.append(_Worker(function))
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """A process and the item that it has: None while it starts."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()  # or the end of the process would not be the end of the pipe
        self.number: int | None = None
        self.limit = START_SECONDS
        self.deadline = time.monotonic() + START_SECONDS

    def give(self, number: int, item: Any, limit: float) -> None:
        """Send the next item. That the process is gone shows when the answer is read."""
        self.number, self.limit, self.deadline = number, limit, time.monotonic() + limit
        try:
            self.pipe.send(item)
        except OSError:
            return

    def end(self) -> None:
        """Kill the process, which may hang in a decoder."""
        self.process.kill()
        self.process.join(5)  # one that waits for a dead network disk cannot be killed
        self.pipe.close()


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    end_with_parent()
    try:
        pipe.send(None)
        while True:
            item = pipe.recv()
            try:
                answer = function(item)
            except Exception as error:  # noqa: BLE001
                # Said about this item: an answer that is missing would be taken for a crash.
                answer = Lost(f"{type(error).__name__}: {error}")
            pipe.send(answer)
    except (EOFError, OSError):
        return


def end_with_parent() -> None:
    """Run in a process that waits for work: one whose parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def processors() -> int:
    """Processors that this process may use, which is not always all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
