"""What a loader makes of its samples: one forward pass, of clips of one length or of several."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastjepa.data.dataset import Sample
from fastjepa.data.decoders.encoded import EncodedClip
from fastjepa.masks import GeneratorCollator, TargetUnion, TokenSet, repeat_clips, target_union

Made = TypeVar("Made")


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

    # What a step asks of a batch, whether its clips have one length or several.

    @property
    def groups(self) -> list["Batch"]:
        """The clips of every length."""
        return [self]

    def each(self, make: Callable[["Batch"], Made]) -> Made:
        """What `make` makes of the batch."""
        return make(self)

    @property
    def shares(self) -> None:
        """What the lengths weigh: there is one."""
        return


class MixedBatch(NamedTuple):
    """One forward pass of clips of several lengths: a batch a length, shortest first, and what its loss weighs.

    Lengths without a clip in this batch are left out. Shares add up to 1 over what is in a whole step, in the mean over
    its batches: see `CollateLengths`.
    """

    groups: list[Batch]
    shares: tuple[float, ...]

    @property
    def slots(self) -> tuple[int, ...]:
        """Those of all clips, in the order of the groups."""
        return tuple(slot for group in self.groups for slot in group.slots)

    @property
    def bad(self) -> list[tuple[str, str]]:
        """As that of `Batch`."""
        return [entry for group in self.groups for entry in group.bad]

    @property
    def short(self) -> list[tuple[str, str]]:
        """As that of `Batch`."""
        return [entry for group in self.groups for entry in group.short]

    def to(self, device: torch.device) -> "MixedBatch":
        """As `Batch.to`."""
        return self._replace(groups=[group.to(device) for group in self.groups])

    def each(self, make: Callable[[Batch], Any]) -> list[Any]:
        """What `make` makes of every group."""
        return [make(group) for group in self.groups]


class EncodedBatch(NamedTuple):
    """A batch whose clips are decoded together, on the device: `clips` in the order of `batch`, which has none yet.

    Those of videos that the device's decoder does not take are decoded already, [C, T, H, W].
    """

    batch: Batch
    clips: list[Tensor | EncodedClip]


class Collate:
    """Samples of one micro-batch to a Batch, with the masks of its step, which the clips of a video share."""

    def __init__(self, masks: GeneratorCollator, videos_per_step: int, tokens: int) -> None:
        self.masks, self.videos_per_step, self.tokens = masks, videos_per_step, tokens

    def __call__(self, samples: Sequence[Sample], alike: Callable[[int], bool] | None = None) -> Batch | EncodedBatch:
        """Stack clips and draw masks; an EncodedBatch where some clips are not decoded yet.

        `alike`: see `GeneratorCollator.draw`.
        """
        slots, clips = [sample.slot for sample in samples], len(samples[0].clips)
        made = [clip for sample in samples for clip in sample.clips]
        decoded = [clip for clip in made if isinstance(clip, Tensor)]
        context, target = self.masks.draw(slots[0] // self.videos_per_step, slots, alike)
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


@dataclass(frozen=True)
class Lengths:
    """Clips of several lengths in a run.

    `masks`: the mask streams of every length in frames. `of_slot` gives the length of the clips of a video slot. With
    `equal` every length weighs the same in the loss of a step, otherwise every clip.
    """

    masks: Mapping[int, GeneratorCollator]
    of_slot: Callable[[int], int]
    equal: bool


class CollateLengths:
    """Samples of one micro-batch to a MixedBatch.

    Shares are such that the mean over all batches of a step, of all processes, is the loss of the step as a whole: the
    mean over its clips, or the mean over its lengths of the means over their clips. They follow from the draws of the
    step alone, so it does not matter how it is divided.
    """

    def __init__(self, lengths: Lengths, videos_per_step: int, tokens: Mapping[int, int]) -> None:
        self.lengths, self.videos_per_step = lengths, videos_per_step
        self.of_length = {
            frames: Collate(masks, videos_per_step, tokens[frames]) for frames, masks in lengths.masks.items()
        }
        self._counted: tuple[int, Counter[int]] = (-1, Counter())

    def __call__(self, samples: Sequence[Sample]) -> MixedBatch:
        """Group by length, stack clips and draw the masks of each length on its own grid."""
        of_slot = self.lengths.of_slot
        by_length: dict[int, list[Sample]] = {}
        for sample in samples:
            by_length.setdefault(of_slot(sample.slot), []).append(sample)
        groups = []
        for frames in sorted(by_length):
            group = self.of_length[frames](by_length[frames], self._alike(frames))
            assert isinstance(group, Batch), "clips of several lengths are decoded where they are collated"
            groups.append(group)
        sizes = [len(by_length[frames]) for frames in sorted(by_length)]
        if not self.lengths.equal:
            return MixedBatch(groups, tuple(size / len(samples) for size in sizes))
        counts = self._counts(samples[0].slot // self.videos_per_step)
        batches = self.videos_per_step / len(samples)
        shares = [size * batches / (counts[frames] * len(counts)) for size, frames in zip(sizes, sorted(by_length))]
        return MixedBatch(groups, tuple(shares))

    def _alike(self, frames: int) -> Callable[[int], bool]:
        return lambda slot: self.lengths.of_slot(slot) == frames

    def _counts(self, step: int) -> Counter[int]:
        """Videos of every length in a step, of all processes."""
        if self._counted[0] != step:
            first = step * self.videos_per_step
            self._counted = step, Counter(map(self.lengths.of_slot, range(first, first + self.videos_per_step)))
        return self._counted[1]
