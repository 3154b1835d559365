"""The processes that train together, and what they tell each other on the host: decisions, findings, failures.

Gradients are exchanged elsewhere, by the device's own library. What is here goes through gloo, on the host, so that no
device is waited for: a signal that one process has got, a file that it cannot read.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastjepa.exits import Exit
from fastjepa.parallel.launch import BY_HAND, Launch

SECONDS_TO_MEET = 300.0
# How often a process that waits for another one shows that it is alive.
SECONDS_BETWEEN_BEATS = 0.1

Value = TypeVar("Value")


class World:
    """This process among `size`: number `rank`. Every method is called by all of them, in the same order.

    `control` is a group for decisions on the host, `saving` one that only checkpoints use, from a thread of their own.
    Both are None for a process that trains alone.
    """

    def __init__(
        self,
        found: Launch,
        store: dist.Store | None = None,
        control: dist.ProcessGroup | None = None,
        saving: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.size, self.local_rank, self.by = found.rank, found.size, found.local_rank, found.by
        self.store, self.control, self.saving = store, control, saving
        self._waits = 0
        self.sharing = 1
        if control is not None:
            own = _place()
            self.sharing = self.gather(own).count(own)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks for all."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in the order of their ranks."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def most(self, value: int) -> int:
        """The largest of the numbers that the processes give."""
        if self.control is None:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
        return int(number.item())

    def any(self, value: bool) -> bool:
        """Whether one of the processes says so."""
        return bool(self.most(int(value)))

    def together(self, work: Callable[[], Value], kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Value:
        """Do something in every process. Errors: where it fails in one, ValueError in all, with its sentence."""
        failure, result = None, None
        try:
            result = work()
        except kinds as error:
            if self.control is None:
                raise
            failure = str(error)
        self.wait()
        failures = self.gather(failure)
        found = [(rank, text) for rank, text in enumerate(failures) if text is not None]
        if found:
            rank, text = found[0]
            raise ValueError(text if len(found) == self.size else f"process {rank} of {self.size}: {text}")
        return result  # type: ignore[return-value]

    def first_does(self, work: Callable[[], Value]) -> Value:
        """Do something in the first process alone; all get its result. Errors: as `together`, the same in all."""
        failure, result = None, None
        if self.first:
            try:
                result = work()
            except (ValueError, OSError) as error:
                if self.control is None:
                    raise
                failure = str(error)
        self.wait()
        failure, result = self.gather((failure, result))[0]
        if failure is not None:
            raise ValueError(failure)
        return result  # type: ignore[return-value]

    def one_by_one(self, work: Callable[[], Value]) -> Value:
        """The first process of every machine does something before the others do: what it leaves is there for them."""
        if self.local_rank == 0:
            result = self.together(work)
            self.together(lambda: None)
            return result
        self.together(lambda: None)
        return self.together(work)

    def wait(self, beat: Callable[[], None] = lambda: None) -> None:
        """Wait until all have come here, for as long as that takes; `beat` is called all the while."""
        if self.store is None:
            return
        self._waits += 1
        key = f"fastjepa/wait/{self._waits}"
        here = self.store.add(key, 1)
        while here < self.size:
            beat()
            time.sleep(SECONDS_BETWEEN_BEATS)
            here = self.store.add(key, 0)

    def leave(self, code: Exit, *, wait: bool = True) -> Exit:
        """End a process that is one of several, with this exit code; one that is alone goes on.

        Where all come to the same end they wait for each other; a process that has failed leaves them at once, and
        what they wait for then fails too.
        """
        if self.control is None:
            return code
        if wait and code in (Exit.DONE, Exit.SAVED_AFTER_SIGNAL, Exit.WRONG_INPUT):
            # One that has lost another on the way out has come to its end all the same.
            with suppress(RuntimeError):
                dist.barrier(group=self.control)
                dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by the interpreter's way out: threads of gloo now and then abort in it.
        os._exit(code)


ALONE = World(BY_HAND)


def join(found: Launch, device: torch.device, minutes: float, seconds_to_meet: float = SECONDS_TO_MEET) -> World:
    """Meet the other processes. An exchange that takes longer than `minutes` is an error of all that take part.

    Errors: ValueError, a sentence, where they do not come together.
    """
    if found.size == 1:
        return ALONE
    os.environ |= {"MASTER_ADDR": found.address, "MASTER_PORT": str(found.port)}
    place = f"process {found.rank} of {found.size} (started by {found.by}) at {found.address}:{found.port}"
    limit = timedelta(minutes=minutes)
    try:
        meeting = dist.rendezvous("env://", found.rank, found.size, timeout=timedelta(seconds=seconds_to_meet))
        store, rank, size = next(iter(meeting))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )
        return World(found, store, *(dist.new_group(backend="gloo", timeout=limit) for _ in range(2)))
    except (RuntimeError, ValueError, OSError) as error:  # DistError is a RuntimeError
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the processes do not come together: {place}: {reason}") from None


def lost_another(error: BaseException) -> bool:
    """Whether an exchange failed because a process on its other end has ended: so say gloo, NCCL and torch's store."""
    told = r"[Cc]onnection (was (likely )?)?(closed|reset)|Broken pipe|remote process exit"
    return isinstance(error, RuntimeError) and re.search(told, str(error)) is not None


def _place() -> tuple[str, tuple[int, ...]]:
    """The machine and its processors that this process may use: what it shares with others of the same place."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return socket.gethostname(), tuple(sorted(cores))
