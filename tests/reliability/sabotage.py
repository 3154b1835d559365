"""What can befall a run from inside, at an exact moment. For forked children only: nothing here can be undone."""

import os
import resource
import signal
import sys
import threading
import time

from fastjepa import jepa, log, probe

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink")


def hit(numbers: list[int], group: bool = False) -> None:
    """Send these signals to this process, one after the other; with `group` to its loader processes too."""
    for place, number in enumerate(numbers):
        if place:
            time.sleep(0.1)  # two of a kind that wait for each other are one
        if group:
            os.killpg(0, number)
        else:
            os.kill(os.getpid(), number)


def in_save(change: int, numbers: list[int], group: bool = False) -> None:
    """Signals right before the n-th change of a folder of checkpoints: a file made, synced, renamed, removed."""
    left = change

    def watch(path: object) -> None:
        nonlocal left
        if "/checkpoints/" in f"{path}/":
            left -= 1
            if left == 0:
                hit(numbers, group)

    def hook(event: str, arguments: tuple) -> None:
        reading = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES and not reading:
            watch(arguments[1] if event in ("os.rename", "os.symlink") else arguments[0])

    fsync = os.fsync

    def watched(handle: int) -> None:
        watch(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    os.fsync = watched
    sys.addaudithook(hook)


def at_file(name: str, numbers: list[int], group: bool = False) -> None:
    """Signals right before the first file whose path ends in this name is opened to be written."""
    sent = False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal sent
        written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if written and not sent and str(arguments[0]).endswith(name):
            sent = True
            hit(numbers, group)

    sys.addaudithook(hook)


def after_row(step: int, numbers: list[int], group: bool = False) -> None:
    """Signals as soon as the row of this step is in metrics.jsonl."""
    metrics = log.RunLog.metrics

    def watched(self: log.RunLog, row: dict) -> None:
        metrics(self, row)
        if row["step"] == step:
            hit(numbers, group)

    log.RunLog.metrics = watched  # type: ignore[method-assign]


def in_forward(call: int, numbers: list[int], group: bool = False) -> None:
    """Signals in the middle of a step: before the n-th forward pass."""
    forward, left = jepa.JEPA.forward, call

    def watched(self, *arguments, **more):
        nonlocal left
        left -= 1
        if left == 0:
            hit(numbers, group)
        return forward(self, *arguments, **more)

    jepa.JEPA.forward = watched  # type: ignore[method-assign]


def in_probe(asked: int, numbers: list[int], group: bool = False) -> None:
    """Signals in the middle of a probe: when it asks for the n-th time whether it is to stop."""
    run, left = probe.probe, asked

    def watched(trained, untrained, videos, reader, protocol, stopped, **more):
        def asks() -> bool:
            nonlocal left
            left -= 1
            if left == 0:
                hit(numbers, group)
            return stopped()

        return run(trained, untrained, videos, reader, protocol, asks, **more)

    probe.probe = watched


def file_size(limit: int, freed: str) -> None:
    """No file may grow beyond this many bytes, as on a full disk, until a file of the name `freed` exists."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with EFBIG instead
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    def free() -> None:
        while not os.path.exists(freed):
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    threading.Thread(target=free, daemon=True).start()


def pause(step: int, until: str) -> None:
    """Stand still after the row of this step until a file of this name exists; `until`.paused says that it does."""
    metrics = log.RunLog.metrics

    def watched(self: log.RunLog, row: dict) -> None:
        metrics(self, row)
        if row["step"] == step:
            os.close(os.open(f"{until}.paused", os.O_CREAT))
            while not os.path.exists(until):
                time.sleep(0.005)

    log.RunLog.metrics = watched  # type: ignore[method-assign]


def audit(report: str) -> None:
    """Note every class that an unpickler looks up, and every program that is started, in a file of this name."""
    watched = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
    out = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def hook(event: str, arguments: tuple) -> None:
        if event in watched:
            os.write(out, f"{event} {arguments}\n".encode(errors="replace"))

    sys.addaudithook(hook)


def memory(limit: int) -> None:
    """No more than this many bytes of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
