"""Batches in order, from any position, with any number of worker processes."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fastjepa.data.dataset import ClipDataset, Sample
from fastjepa.data.decoders.encoded import EncodedClip
from fastjepa.masks import GeneratorCollator, TargetUnion, TokenSet, repeat_clips, target_union

# How often a worker that got SIGTERM looks whether its parent is still finishing its step and saving.
SECONDS_TO_SAVE = 30

Loaded = TypeVar("Loaded")


class Batch(NamedTuple):
    """One forward pass: clips [B, C, T, H, W], M context and M target mask sets, slots of the clips.

    Clips are uint8, or normalised float32 in a run that erases; those of one video are neighbours. `union` is that of
    the target sets (see `target_union`). `bad` are unreadable files met on the way, `short` videos passed over for
    their length: (path, reason) pairs.
    """

    clips: Tensor
    masks_context: list[TokenSet]
    masks_target: list[TokenSet]
    union: TargetUnion
    slots: tuple[int, ...]
    bad: list[tuple[str, str]]
    short: list[tuple[str, str]]

    def to(self, device: torch.device) -> "Batch":
        """Clips and masks on a device; copies from pinned memory do not wait."""
        return self._replace(
            clips=self.clips.to(device, non_blocking=True),
            masks_context=[s.to(device, non_blocking=True) for s in self.masks_context],
            masks_target=[s.to(device, non_blocking=True) for s in self.masks_target],
            union=self.union.to(device, non_blocking=True),
        )


class EncodedBatch(NamedTuple):
    """A batch whose clips are decoded together, on the device: `clips` in the order of `batch`, which has none yet.

    Those of videos that the device's decoder does not take are decoded already, [C, T, H, W].
    """

    batch: Batch
    clips: list[Tensor | EncodedClip]


class SlotBatches(Sampler[list[int]]):
    """The slots of every micro-batch from one step to another: `global_batch` a step, `batch_size` a micro-batch.

    Slots are those of the data set's items, videos; so are both sizes. Of `world` processes, number `rank` gets an
    equal part of each step, the parts in the order of the ranks. Errors: ValueError where a step does not divide.
    """

    def __init__(
        self, first_step: int, last_step: int, global_batch: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        if global_batch % (world * batch_size) or not 0 <= rank < world:
            raise ValueError(
                f"a step of {global_batch} cannot be divided into batches of {batch_size} of process {rank} of {world}"
            )
        self.steps, self.global_batch, self.batch_size = range(first_step, last_step), global_batch, batch_size
        self.own = range(rank * global_batch // world, (rank + 1) * global_batch // world, batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        firsts = (step * self.global_batch + place for step in self.steps for place in self.own)
        return (list(range(first, first + self.batch_size)) for first in firsts)

    def __len__(self) -> int:
        return len(self.steps) * len(self.own)


class Collate:
    """Samples of one micro-batch to a Batch, with the masks of its step, which the clips of a video share."""

    def __init__(self, masks: GeneratorCollator, videos_per_step: int, tokens: int) -> None:
        self.masks, self.videos_per_step, self.tokens = masks, videos_per_step, tokens

    def __call__(self, samples: Sequence[Sample]) -> Batch | EncodedBatch:
        """Stack clips and draw masks; an EncodedBatch where some clips are not decoded yet."""
        slots, clips = [sample.slot for sample in samples], len(samples[0].clips)
        made = [clip for sample in samples for clip in sample.clips]
        decoded = [clip for clip in made if isinstance(clip, Tensor)]
        context, target = self.masks.draw(slots[0] // self.videos_per_step, slots)
        target = [repeat_clips(token_set, clips) for token_set in target]
        batch = Batch(
            torch.stack(decoded) if len(decoded) == len(made) else torch.empty(0, dtype=torch.uint8),
            [repeat_clips(token_set, clips) for token_set in context],
            target,
            target_union(target, self.tokens),
            tuple(slot * clips + number for slot in slots for number in range(clips)),
            [entry for sample in samples for entry in sample.bad],
            [entry for sample in samples for entry in sample.short],
        )
        return batch if len(decoded) == len(made) else EncodedBatch(batch, made)


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
    tokens: int,
    rank: int = 0,
    world: int = 1,
) -> Iterable[Batch | EncodedBatch]:
    """Batches of the steps [first_step, last_step): the same for every number of workers.

    Of `world` processes, number `rank` gets its part of every step. A clip has so many `tokens`. `global_batch` and
    `batch_size` count clips, and are multiples of the clips that a video gives.
    """
    videos_per_step = global_batch // dataset.plan.clips_per_video
    return DataLoader(
        dataset,
        batch_sampler=SlotBatches(
            first_step, last_step, videos_per_step, batch_size // dataset.plan.clips_per_video, rank, world
        ),
        collate_fn=Collate(masks, videos_per_step, tokens),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        # Its own generator: the loader must not move the random state of the training process.
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


@contextmanager
def running(loader: Iterable[Loaded]) -> Iterator[Iterator[Loaded]]:
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
