"""Batches in order, from any position, with any number of worker processes."""

import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from fastjepa.data.batches import Batch, Collate, CollateLengths, EncodedBatch, Lengths, MixedBatch
from fastjepa.data.dataset import ClipDataset
from fastjepa.data.guard import Guard
from fastjepa.data.replaced import ALWAYS_TOLERATED, TooManyBadFiles
from fastjepa.masks import GeneratorCollator

# How often a worker that got SIGTERM looks whether its parent is still finishing its step and saving.
SECONDS_TO_SAVE = 30
# Of the loader's processes, with neither a batch between nor a video found guilty: then something else is wrong.
DEATHS_IN_A_ROW = 5
SECONDS_TO_DIE = 5.0

Loaded = TypeVar("Loaded")


class SlotBatches(Sampler[list[int]]):
    """The slots of every micro-batch from one step to another: `global_batch` a step, `batch_size` a micro-batch.

    Slots are those of the data set's items, videos; so are both sizes. Of `world` processes, number `rank` gets an
    equal part of each step, the parts in the order of the ranks. The first `skip` micro-batches are left out. Errors:
    ValueError where a step does not divide.
    """

    def __init__(
        self,
        first_step: int,
        last_step: int,
        global_batch: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        skip: int = 0,
    ) -> None:
        if global_batch % (world * batch_size) or not 0 <= rank < world:
            raise ValueError(
                f"a step of {global_batch} cannot be divided into batches of {batch_size} of process {rank} of {world}"
            )
        self.global_batch, self.batch_size = global_batch, batch_size
        self.own = range(rank * global_batch // world, (rank + 1) * global_batch // world, batch_size)
        self.numbers = range(first_step * len(self.own) + skip, last_step * len(self.own))

    def __iter__(self) -> Iterator[list[int]]:
        for step, part in (divmod(number, len(self.own)) for number in self.numbers):
            first = step * self.global_batch + self.own[part]
            yield list(range(first, first + self.batch_size))

    def __len__(self) -> int:
        return len(self.numbers)


def make_loader(
    dataset: ClipDataset,
    masks: GeneratorCollator | Lengths,
    *,
    first_step: int,
    last_step: int,
    global_batch: int,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    tokens: int | Mapping[int, int],
    rank: int = 0,
    world: int = 1,
    guard: Guard | None = None,
) -> Iterable[Batch | MixedBatch | EncodedBatch]:
    """Batches of the steps [first_step, last_step): the same for every number of workers.

    Of `world` processes, number `rank` gets its part of every step. A clip has so many `tokens`; where clips have
    several lengths, `masks` are `Lengths`, and tokens are those of every length. `global_batch` and
    `batch_size` count clips, and are multiples of the clips that a video gives. With a `guard` a worker process that
    dies or hangs costs the video that it had in hand, not the run; where processes are not forked, or there are none,
    it only keeps back the videos that it knows of.
    """
    videos_per_step = global_batch // dataset.plan.clips_per_video
    videos_per_batch = batch_size // dataset.plan.clips_per_video
    if guard is not None:
        dataset.hold = guard.hold
    collate: Callable[[list[Any]], Batch | MixedBatch | EncodedBatch]
    if isinstance(masks, Lengths):
        assert isinstance(tokens, Mapping), "several lengths have numbers of tokens of their own"
        collate = CollateLengths(masks, videos_per_step, tokens)
    else:
        assert isinstance(tokens, int), "clips of one length have one number of tokens"
        collate = Collate(masks, videos_per_step, tokens)
    return in_processes(
        dataset,
        lambda skip: SlotBatches(first_step, last_step, videos_per_step, videos_per_batch, rank, world, skip),
        collate,
        workers=workers,
        pin_memory=pin_memory,
        guard=guard,
    )


def in_processes(
    dataset: Dataset[Any],
    batches: Callable[[int], Sampler[list[int]]],
    collate: Callable[[list[Any]], Loaded],
    *,
    workers: int,
    pin_memory: bool,
    guard: Guard | None,
) -> Iterable[Loaded]:
    """What `collate` makes of the items of every batch, in order, made by `workers` processes.

    `batches(skip)` are the numbers of the items of each batch without the first `skip` batches. With a `guard`, whose
    `hold` the data set uses, the death of a process is not the end.
    """
    forks = bool(workers) and sys.platform == "linux"

    def begin(worker: int) -> None:
        _leave_signals_to_the_parent(worker)
        assert guard is not None, "chosen only with a guard"
        guard.enter(worker)

    def make(skip: int) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=batches(skip),
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=begin if guard is not None and forks else _leave_signals_to_the_parent,
            # Its own generator: the loader must not move the random state of the training process.
            generator=torch.Generator().manual_seed(0),
            multiprocessing_context="fork" if forks else None,
        )

    return GuardedLoader(make, guard, workers) if guard is not None and forks else make(0)


class GuardedLoader(Generic[Loaded]):
    """The batches of a loader whose processes may die: it is made again from the first batch not handed out yet.

    `make(skip)` is the loader without its first `skip` batches. Errors: RuntimeError where processes die again and
    again although no video is found guilty, or too many are, with no batch between; and what the loader raises.
    """

    def __init__(self, make: Callable[[int], DataLoader[Loaded]], guard: Guard, workers: int) -> None:
        self.make, self.guard, self.workers = make, guard, workers

    def __iter__(self) -> Generator[Loaded, None, None]:
        handed_out = deaths = 0
        known = self.guard.crashes.known
        known_then = len(known)  # when the last batch was handed out
        with _deaths_interrupt_nothing():
            while True:
                with self.guard.watching(self.workers):
                    with running(self.make(handed_out)) as batches:
                        while True:
                            try:
                                batch = next(batches)
                            except StopIteration:
                                return
                            except TooManyBadFiles:
                                raise
                            except (RuntimeError, OSError, EOFError):
                                dead = _exit_codes(batches)
                                if not dead:
                                    raise
                                break
                            handed_out += 1
                            deaths, known_then = 0, len(known)
                            yield batch
                    sentence, convicted = self.guard.blame(dead, handed_out)
                deaths = 0 if convicted else deaths + 1
                if deaths == DEATHS_IN_A_ROW or len(known) - known_then > ALWAYS_TOLERATED:
                    raise RuntimeError(
                        f"processes of the loader end again and again before a batch is made: {sentence}"
                    )


def _exit_codes(batches: Iterator[Any]) -> dict[int, int]:
    """Exit codes of the worker processes that have ended, by their place."""
    workers = batches._workers  # type: ignore[attr-defined]
    # The files of a process are closed a moment before it has ended: reading from it fails then, without an exit code.
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1.0)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()
    return {place: worker.exitcode for place, worker in enumerate(workers) if worker.exitcode is not None}


@contextmanager
def _deaths_interrupt_nothing() -> Iterator[None]:
    """torch raises from a handler of SIGCHLD, wherever the training process is then: in the midst of a step too.

    Without it a dead worker is found when a batch does not come for some seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal_handling._set_SIGCHLD_handler()  # it does so once: not any more when the workers start
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def running(loader: Iterable[Loaded]) -> Iterator[Iterator[Loaded]]:
    """The batches of a loader, in order; its worker processes end with the block, however it is left."""
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        # torch ends workers when the iterator is collected, which an exception's traceback can put off for ever.
        if isinstance(iterator, Generator):
            iterator.close()
        elif hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
            for worker in iterator._workers:  # type: ignore[attr-defined]
                if worker.is_alive():  # it hangs in a decoder, which no signal but this one ends
                    worker.kill()
                    worker.join(SECONDS_TO_DIE)


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the process group must not kill a worker before the parent has saved.

    SIGTERM only starts a timer, so that a worker that is told to end for good does: once its parent is gone, or after
    ten minutes, which is longer than any save.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent, waits = os.getppid(), iter(range(20))

    def end_or_wait(*_: object) -> None:
        if os.getppid() != parent or next(waits, None) is None:
            os._exit(0)
        signal.alarm(SECONDS_TO_SAVE)

    signal.signal(signal.SIGALRM, end_or_wait)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_TO_SAVE))
