"""Batches in order, from any position, with any number of worker processes."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fastjepa.data.dataset import ClipDataset, Sample
from fastjepa.masks import GeneratorCollator, TokenSet

# How often a worker that got SIGTERM looks whether its parent is still finishing its step and saving.
SECONDS_TO_SAVE = 30


class Batch(NamedTuple):
    """One forward pass: clips float32 [B, C, T, H, W], M context and M target mask sets, slots, unreadable files."""

    clips: Tensor
    masks_context: list[TokenSet]
    masks_target: list[TokenSet]
    slots: tuple[int, ...]
    bad: list[tuple[str, str]]

    def to(self, device: torch.device) -> "Batch":
        """Clips and masks on a device; copies from pinned memory do not wait."""
        return self._replace(
            clips=self.clips.to(device, non_blocking=True),
            masks_context=[s.to(device, non_blocking=True) for s in self.masks_context],
            masks_target=[s.to(device, non_blocking=True) for s in self.masks_target],
        )


class SlotBatches(Sampler[list[int]]):
    """The slots of every micro-batch from one step to another: `global_batch` a step, `batch_size` a micro-batch."""

    def __init__(self, first_step: int, last_step: int, global_batch: int, batch_size: int) -> None:
        self.first, self.stop = first_step * global_batch, last_step * global_batch
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(slot, slot + self.batch_size)) for slot in range(self.first, self.stop, self.batch_size))

    def __len__(self) -> int:
        return (self.stop - self.first) // self.batch_size


class Collate:
    """Samples of one micro-batch to a Batch, with the masks of its step."""

    def __init__(self, masks: GeneratorCollator, global_batch: int) -> None:
        self.masks, self.global_batch = masks, global_batch

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Stack clips and draw masks."""
        slots = tuple(sample.slot for sample in samples)
        context, target = self.masks.draw(slots[0] // self.global_batch, slots)
        return Batch(
            torch.stack([sample.clip for sample in samples]),
            context,
            target,
            slots,
            [entry for sample in samples for entry in sample.bad],
        )


def make_loader(
    dataset: ClipDataset,
    masks: GeneratorCollator,
    *,
    first_step: int,
    last_step: int,
    global_batch: int,
    batch_size: int,
    workers: int,
    pin_memory: bool,
) -> Iterable[Batch]:
    """Batches of the steps [first_step, last_step): the same for every number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=SlotBatches(first_step, last_step, global_batch, batch_size),
        collate_fn=Collate(masks, global_batch),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        # Its own generator: the loader must not move the random state of the training process.
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


@contextmanager
def running(loader: Iterable[Batch]) -> Iterator[Iterator[Batch]]:
    """The batches of a loader, in order; its worker processes end with the block, however it is left."""
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        # torch ends workers when the iterator is collected, which an exception's traceback can put off for ever.
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


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
