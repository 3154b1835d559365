"""Multi-block masks: the targets are a union of space-time blocks, the context is the rest.

Grid of t x h x w tokens, numbered time, row, column. Source: V-JEPA (arXiv 2404.08471, section 3.2) and the published
collator: one block size for all clips of a step, positions drawn for each clip.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastjepa.masks.grid import token_grid
from fastjepa.masks.tokens import Ragged, TokenSet
from fastjepa.streams import Purpose, stream

Truncation = Literal["group", "none", "random"]
Range = tuple[float, float]
Extent = tuple[int, int, int]
Alike = Callable[[int], bool]
MAX_REDRAWS = 1000
# Construction asks this many clips to find a context in this many draws: settings that pass do so with a chance of
# more than 2 % a draw, so that a run never exhausts MAX_REDRAWS (odds of 2e-9 a clip).
REHEARSED_CLIPS, REHEARSED_DRAWS = 20, 50


class MultiBlockMaskGenerator:
    """Draws one mask set: for each clip the context tokens that the encoder sees and the target tokens to predict.

    `truncation` says how clips come to equal lengths. `group` cuts every clip to the shortest of its group of `group`
    clips and keeps the lowest token numbers, as the published code does with its batch of 24; `random` cuts to the same
    length but keeps a random subset, which does not favour early frames; `none` cuts nothing. `group=None` takes all
    clips of a call as one group, as the published collator does with its batch.

    Cutting leaves tokens that are on neither side. `full_complement` makes the targets everything outside of the cut
    context, `pred_full_complement` the context everything outside of the cut targets. `inv_block` exchanges the sides
    at the end: the blocks are the context, and what lies around them is predicted; `max_keep` then limits the targets.
    Source of the three: V-JEPA 2 (arXiv 2506.09985), the options of its collator.

    Errors: ValueError, at construction, for settings that must give an empty context or an empty target, and for
    options that undo each other.
    """

    def __init__(
        self,
        crop_size: int | Sequence[int] = 224,
        num_frames: int = 16,
        spatial_patch_size: int | Sequence[int] = 16,
        temporal_patch_size: int = 2,
        spatial_pred_mask_scale: Range = (0.2, 0.8),
        temporal_pred_mask_scale: Range = (1.0, 1.0),
        aspect_ratio: Range = (0.3, 3.0),
        npred: int = 1,
        max_context_frames_ratio: float = 1.0,
        max_keep: int | None = None,
        *,
        seed: int = 0,
        set_number: int = 0,
        truncation: Truncation = "group",
        group: int | None = None,
        full_complement: bool = False,
        pred_full_complement: bool = False,
        inv_block: bool = False,
    ) -> None:
        self.grid = token_grid(crop_size, num_frames, spatial_patch_size, temporal_patch_size)
        self.duration, self.height, self.width = self.grid
        self.spatial_scale, self.temporal_scale = spatial_pred_mask_scale, temporal_pred_mask_scale
        self.aspect_ratio = aspect_ratio
        self.npred = npred
        self.max_context_duration = max(1, int(self.duration * max_context_frames_ratio))
        self.max_keep = max_keep
        self.seed, self.set_number = seed, set_number
        self.truncation, self.group = truncation, group
        self.full_complement, self.pred_full_complement = full_complement, pred_full_complement
        self.inv_block = inv_block
        self._refuse_the_impossible()

    def _block(self, time: float, area: float, aspect: float) -> tuple[int, int, int]:
        """Block extent from fractions of the duration and of the frame area, and an aspect ratio height / width."""
        cells = int(self.height * self.width * area)
        return (
            max(1, int(self.duration * time)),
            min(self.height, round((cells * aspect) ** 0.5)),
            min(self.width, round((cells / aspect) ** 0.5)),
        )

    def block_size(self, step: int) -> tuple[int, int, int]:
        """(time, rows, columns) of the blocks of a step: the published rule.

        Three uniforms (temporal scale, area, aspect) from a torch CPU generator seeded with the step number, the same
        for all clips and mask sets of the step.
        """
        generator = torch.Generator().manual_seed(step)
        time, area, aspect = (
            low + torch.rand(1, generator=generator).item() * (high - low)
            for low, high in (self.temporal_scale, self.spatial_scale, self.aspect_ratio)
        )
        return self._block(time, area, aspect)

    def sample(self, step: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """(context, target) token numbers, ascending int64, of the clip at this global slot, before any cutting."""
        return self._drawn(self.block_size(step), step, slot)

    def draw_corners(self, block: Extent, rng: np.random.Generator) -> np.ndarray:
        """(top, left, start) of every block: int64 [npred, 3], in tokens, uniform over where the block fits."""
        bt, bh, bw = block
        tops = rng.integers(0, self.height - bh + 1, size=self.npred)
        lefts = rng.integers(0, self.width - bw + 1, size=self.npred)
        starts = rng.integers(0, self.duration - bt + 1, size=self.npred)
        return np.stack([tops, lefts, starts], axis=1)

    def place(self, block: Extent, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(context, target) token numbers, ascending int64, of blocks with these corners [npred, 3].

        The context may come out empty.
        """
        bt, bh, bw = block
        free = np.ones(self.grid, dtype=bool)
        free[self.max_context_duration :] = False
        for top, left, start in corners:
            free[start : start + bt, top : top + bh, left : left + bw] = False
        kept = free.ravel()
        return np.flatnonzero(kept), np.flatnonzero(~kept)

    def _drawn(self, block: Extent, step: int, slot: int, draws: int = MAX_REDRAWS) -> tuple[np.ndarray, np.ndarray]:
        """The first draw of a clip's corners that leaves a context."""
        rng = stream(self.seed, Purpose.MASK, slot, step, self.set_number)
        for _ in range(draws):
            context, target = self.place(block, self.draw_corners(block, rng))
            if len(context):
                return context, target
        raise RuntimeError(
            f"{self.npred} blocks of {'x'.join(map(str, block))} tokens left no context on a grid of "
            f"{'x'.join(map(str, self.grid))} in {draws} draws: lower num_blocks or spatial_scale"
        )

    def draw(self, step: int, slots: Sequence[int], alike: Alike | None = None) -> tuple[TokenSet, TokenSet]:
        """(context, target) mask sets of the clips at these global slots, cut as `truncation` says.

        A [B, K] int64 tensor each where all clips are of one group, a `Ragged` otherwise. Groups are counted over the
        slots of the run, so cutting does not depend on how a step is divided into batches. Of a group only those slots
        are cut together that are `alike`, the given ones among them.
        """
        block = self.block_size(step)
        if self.truncation == "none":
            drawn = [self._drawn(block, step, slot) for slot in slots]
            pairs = [self._finished(context[: self.max_keep], target) for context, target in drawn]
            return _ragged([context for context, _ in pairs]), _ragged([target for _, target in pairs])
        pairs = []
        for members, wanted in self._groups(slots, alike):
            placed = {slot: self._drawn(block, step, slot) for slot in members}
            seen, asked = (min(len(pair[side]) for pair in placed.values()) for side in (0, 1))
            seen = seen if self.max_keep is None else min(seen, self.max_keep)
            for slot in wanted:
                context, target = placed[slot]
                cut = self._cut(context, seen, step, slot, 0), self._cut(target, asked, step, slot, 1)
                pairs.append(self._finished(*cut))
        one_group = self.group is None or len({slot // self.group for slot in slots}) == 1
        form = _dense if one_group else _ragged
        return form([context for context, _ in pairs]), form([target for _, target in pairs])

    def _groups(self, slots: Sequence[int], alike: Alike | None) -> Iterator[tuple[Sequence[int], list[int]]]:
        """(all members of a group, those of them that are asked for), in the order of `slots`."""
        group = self.group
        if group is None:
            yield slots, list(slots)
            return
        for number, wanted in groupby(slots, key=lambda slot: slot // group):
            members = range(number * group, (number + 1) * group)
            yield members if alike is None else [slot for slot in members if alike(slot)], list(wanted)

    def _cut(self, tokens: np.ndarray, keep: int, step: int, slot: int, side: int) -> np.ndarray:
        if self.truncation == "random" and len(tokens) > keep:
            rng = stream(self.seed, Purpose.MASK_CUT, slot, step, 2 * self.set_number + side)
            tokens = np.sort(rng.choice(tokens, size=keep, replace=False))
        return tokens[:keep]

    def _finished(self, context: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sides of a clip that has been cut, by the options of the second generation."""
        if self.full_complement:
            target = self._outside(context)
        elif self.pred_full_complement:
            context = self._outside(target)
        return (target, context) if self.inv_block else (context, target)

    def _outside(self, tokens: np.ndarray) -> np.ndarray:
        """All other tokens of the grid, ascending."""
        other = np.ones(self.duration * self.height * self.width, dtype=bool)
        other[tokens] = False
        return np.flatnonzero(other)

    def _refuse_the_impossible(self) -> None:
        grid = "x".join(map(str, self.grid))
        for name, (low, high) in (
            ("spatial_scale", self.spatial_scale),
            ("temporal_scale", self.temporal_scale),
            ("aspect_ratio", self.aspect_ratio),
        ):
            if not 0 < low <= high or (name != "aspect_ratio" and high > 1):
                raise ValueError(
                    f"mask {name} must be 0 < low <= high{' <= 1' * (name != 'aspect_ratio')}, got {low}..{high}"
                )
        if self.npred < 1:
            raise ValueError(f"mask num_blocks must be at least 1, got {self.npred}")
        if self.max_keep is not None and self.max_keep < 1:
            raise ValueError(f"mask max_keep must be at least 1 token, got {self.max_keep}")
        if self.pred_full_complement:
            for name, given in (("full_complement", self.full_complement), ("max_keep", self.max_keep)):
                if given:
                    raise ValueError(f"mask pred_full_complement undoes {name}: choose one of them")
        area, (flat, tall) = self.height * self.width, self.aspect_ratio
        least = int(area * self.spatial_scale[0])
        if least * flat <= 0.25 or least / tall <= 0.25:
            raise ValueError(
                f"mask spatial_scale {self.spatial_scale[0]} of a {grid} token grid gives blocks without a token"
            )
        most = int(area * self.spatial_scale[1])
        covers = max(flat, (self.height - 0.5) ** 2 / most) <= min(tall, most / (self.width - 0.5) ** 2)
        # A uniform never reaches 1, so blocks of varying duration are never as long as the clip.
        longest = self.temporal_scale[0] + (1 - 2**-24) * (self.temporal_scale[1] - self.temporal_scale[0])
        if covers and int(self.duration * longest) >= self.duration:
            raise ValueError(
                f"a mask block can cover the whole {grid} token grid and leave no context: lower spatial_scale"
            )
        # Many blocks may cover the grid together nearly always: rehearse the largest ones before a run depends on it.
        extents = {self._block(longest, self.spatial_scale[1], aspect) for aspect in np.geomspace(flat, tall, 65)}
        largest = [e for e in extents if not any(o != e and all(a >= b for a, b in zip(o, e)) for o in extents)]
        try:
            for block in sorted(largest):
                for slot in range(REHEARSED_CLIPS):
                    self._drawn(block, 0, slot, REHEARSED_DRAWS)
        except RuntimeError as error:
            raise ValueError(str(error)) from None


def _dense(sets: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(sets).astype(np.int64))


def _ragged(sets: list[np.ndarray]) -> Ragged:
    return Ragged(torch.from_numpy(np.concatenate(sets).astype(np.int64)), tuple(len(s) for s in sets))
