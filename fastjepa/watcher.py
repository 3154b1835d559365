"""The process that looks on from outside and ends another one in which nothing moves (`fastjepa.watchdog` starts it).

It is run as a script without site packages, so that it costs a few MB: nothing but the standard library here. It ends
by itself once its parent is gone, however that ended.
"""

import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# What the watched process writes: heartbeats so far, step (-1: none yet), seconds of patience, name of the stage.
RECORD = struct.Struct("=Qqd104s")
# What happens to the process that is ended. Files may lie on the very disk that it waits for: a write that does not
# return must not save its life.
SECONDS_TO_WRITE = 5.0
SECONDS_TO_DUMP = 3.0
SECONDS_TO_DIE = 10.0
# A signal to all processes of a job is meant for those that train: the watch goes on while they save.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
STATES = {"T": "it was stopped by a signal", "D": "it waits in the kernel, for a disk or a driver"}


def watch(memory: mmap.mmap, parent: int) -> tuple[bytes, float] | None:
    """Wait until there is no heartbeat for as long as the stage allows; None where the parent is gone first.

    Returns the record and the seconds. Time in which this process does not run does not count: a job that is suspended
    as a whole, or a machine (CLOCK_MONOTONIC stands still then), comes back to a fresh poll.
    """
    still, before = 0.0, time.monotonic()
    while os.getppid() == parent:
        record = memory[: RECORD.size]
        limit = RECORD.unpack(record)[2]
        if limit <= 0:  # half written: no stage has no time at all
            time.sleep(0.001)
            continue
        pause = min(1.0, limit / 20)
        time.sleep(pause)
        now = time.monotonic()
        still = still + min(now - before, 2 * pause) if memory[: RECORD.size] == record else 0.0
        before = now
        if still >= limit:
            return record, limit
    return None


def end(parent: int, rank: int, folder: Path, stacks: Path, record: bytes, seconds: float) -> None:
    """Say where the process stands, ask it for its Python stacks, which ends it, and kill it if it does not answer."""
    _, step, _, name = RECORD.unpack(record)
    stage = name.rstrip(b"\0").decode(errors="replace")
    where = f"in stage '{stage}'" + (f" at step {step}" if step >= 0 else "")
    why = _state(parent)
    reason = f"rank {rank}: nothing has moved for {_duration(seconds)} {where}" + (f" ({why})" if why else "")
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {reason}; ending the process\n"
    _say(folder, f"{reason}; ending the process, its Python stacks are in {stacks}")
    # The heading of the stacks is there before they are; all of them in one file, those of earlier hangs too.
    _in_time(lambda: _append(stacks, line), lambda: _put_status(folder, rank, step, reason))
    with suppress(ProcessLookupError):
        os.kill(parent, signal.SIGUSR2)
        os.kill(parent, signal.SIGCONT)  # a stopped process answers no other signal
    if _gone(parent, SECONDS_TO_DUMP):
        return
    with suppress(ProcessLookupError):
        os.kill(parent, signal.SIGKILL)
    if _gone(parent, SECONDS_TO_DIE):
        _say(folder, f"rank {rank}: it gave no Python stacks for {_duration(SECONDS_TO_DUMP)} and was killed")
    else:
        _say(folder, f"rank {rank}: it cannot be killed ({_state(parent) or 'its state is unknown'})")


def _say(folder: Path, text: str) -> None:
    """One line on stderr and in train.log."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n"
    _in_time(lambda: _error(text), lambda: _append(folder / "train.log", line))


def _in_time(*writes: Callable[[], None]) -> None:
    """Do what may never return, all at once, and wait for it no longer than `SECONDS_TO_WRITE`."""
    threads = [threading.Thread(target=write, daemon=True) for write in writes]
    deadline = time.monotonic() + SECONDS_TO_WRITE
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _error(text: str) -> None:
    with suppress(OSError):  # whoever read it is gone: train.log says it too
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as out:
            out.write(text)
    except OSError as error:
        _error(f"{path} cannot be written: {error}")


def _put_status(folder: Path, rank: int, step: int, reason: str) -> None:
    """status.json as the run would have written it, had it been able to; from any rank, as one is enough to end all."""
    path, scratch = folder / "status.json", folder / f".tmp-status-{rank}.json"
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or damaged: nothing is taken over
        old = {}
    new = {"state": "failed", "step": max(step, 0), "steps": old.get("steps"), "heartbeat": time.time()}
    try:
        with scratch.open("w", encoding="utf-8") as out:
            out.write(json.dumps(new | {"reason": reason}, indent=2))
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, path)
    except OSError as error:
        _error(f"{path} cannot be written: {error}")


def _gone(parent: int, seconds: float) -> bool:
    """Whether the parent ends within this time."""
    deadline = time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.02)
    return os.getppid() != parent


def _state(parent: int) -> str:
    """What Linux says of a process that may explain why it does not move; "" where it says nothing."""
    try:
        stat = Path(f"/proc/{parent}/stat").read_text(errors="replace")
    except OSError:  # gone, or another system
        return ""
    # The name of the program stands before, in brackets, and may be anything.
    return STATES.get(stat.rpartition(")")[2].split()[0], "")


def _duration(seconds: float) -> str:
    """Seconds as 4 s or 15 min."""
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds / 60:.3g} min"


def main(arguments: list[str]) -> None:
    """Arguments: number of the open file that is shared, process to watch, its rank, run folder, file of the stacks."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    shared, parent, rank = (int(text) for text in arguments[:3])
    folder, stacks = (Path(text) for text in arguments[3:])
    found = watch(mmap.mmap(shared, RECORD.size), parent)
    if found is not None:
        end(parent, rank, folder, stacks, *found)
        # Not by the usual way, which waits for threads that may never return.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
