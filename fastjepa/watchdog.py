"""Ends the process when nothing moves in it any more, and says which rank stood where.

Who watches is another process (`fastjepa.watcher`): a decoder that hangs may hold the interpreter lock, and then no
thread and no signal handler in Python runs here.
"""

import faulthandler
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from fastjepa import watcher

# Asks for the stacks. faulthandler's own handler writes them, in C, and lets the default action end the process.
ASK = signal.SIGUSR2


class Watchdog:
    """A context that is told what is being done, and ends the process after `minutes` in which it is told nothing.

    Then one sentence names rank, stage and step, on stderr and in `folder`/train.log, status.json says "failed" with
    this reason, the Python stacks of all threads are in `folder`/watchdog-rank0.txt, and the process ends by SIGUSR2,
    or by SIGKILL where it does not answer. With None or 0 minutes nothing is started.

    Time in which the whole job is suspended does not count; a process that is stopped alone (SIGSTOP, Ctrl-Z) is one in
    which nothing moves.
    """

    def __init__(
        self, minutes: float | None, rank: int, folder: Path, say: Callable[[str], None] = warnings.warn
    ) -> None:
        self.minutes, self.rank, self.folder, self.say = minutes or 0.0, rank, folder, say
        self.stacks = folder / f"watchdog-rank{rank}.txt"
        self._pid, self._beats, self._step = os.getpid(), 0, -1
        self._memory: mmap.mmap | None = None
        self._file: IO[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Watchdog":
        if self.minutes:
            try:
                self._begin()
            except OSError as error:  # no room for a file, no process to be had: no reason not to train
                self.say(f"warning: no watchdog: {error}")
                self._memory = None
        return self

    def _begin(self) -> None:
        with _shared_file() as shared:
            shared.truncate(watcher.RECORD.size)
            self._memory = mmap.mmap(shared.fileno(), watcher.RECORD.size)
            self.stage("starting")
            self._file = self.stacks.open("ab")
            numbers = (shared.fileno(), os.getpid(), self.rank)
            paths = (self.folder.absolute(), self.stacks.absolute())
            self._watcher = subprocess.Popen(
                [sys.executable, "-I", "-S", watcher.__file__, *map(str, (*numbers, *paths))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # A session of its own: Ctrl-C and the end of a terminal are for the process that trains.
                start_new_session=True,
                pass_fds=[shared.fileno()],
                cwd="/",
            )
            faulthandler.register(ASK, file=self._file, all_threads=True, chain=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is None or self._memory is None or self._file is None:
            return
        self._watcher.kill()
        self._watcher.wait()
        self._watcher = None
        faulthandler.unregister(ASK)
        self._file.close()
        with suppress(FileNotFoundError):  # somebody tidied up
            if self.stacks.stat().st_size == 0:  # nothing has ever hung
                self.stacks.unlink()
        self._memory.close()
        self._memory = None

    def stage(self, name: str, step: int | None = None, patience: float = 1.0) -> None:
        """A sign of life: `name` is what begins now, or goes on; `step` the training step, None for the last one said.

        The limit of this stage is `patience` times that of the watchdog. A write into memory, no system call waits.
        """
        # Loader processes are forks of this one and share the memory: their lives are not this one's.
        if self._memory is None or os.getpid() != self._pid:
            return
        self._beats += 1
        if step is not None:
            self._step = step
        seconds = 60.0 * self.minutes * patience
        # Not by pack_into, which clears the memory first: the watcher would now and then see nothing there.
        self._memory[:] = watcher.RECORD.pack(self._beats, self._step, seconds, name.encode())


def _shared_file() -> IO[bytes]:
    """A file without a name, in memory where the system has that: a disk that hangs must not keep a heartbeat."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("fastjepa-watchdog"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
