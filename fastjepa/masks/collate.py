"""Collators: a list of samples to a batch with its mask sets."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.utils.data import default_collate

from fastjepa.masks.multiblock3d import Alike, MultiBlockMaskGenerator, Truncation
from fastjepa.masks.random_tube import RandomTubeMaskGenerator
from fastjepa.masks.tokens import TokenSet

Masks = tuple[list[TokenSet], list[TokenSet]]


class DefaultCollator:
    """Batches samples and draws no masks: returns (batch, None, None)."""

    def __call__(self, batch: Sequence[Any]) -> tuple[Any, None, None]:
        """Samples to (default_collate(samples), None, None)."""
        return default_collate(list(batch)), None, None


class MaskGenerator(Protocol):
    """Draws one mask set."""

    def draw(self, step: int, slots: Sequence[int], alike: Alike | None = None) -> tuple[TokenSet, TokenSet]:
        """(context, target) of the clips at these global slots; `alike` tells which others have their length."""


class GeneratorCollator:
    """Batches samples and draws one (context, target) pair of mask sets with each of its generators."""

    def __init__(self, generators: Sequence[MaskGenerator]) -> None:
        if not generators:
            raise ValueError("at least one mask set is needed, got none")
        self.generators = generators
        self._calls = 0
        self._clips = 0

    def draw(self, step: int, slots: Sequence[int], alike: Alike | None = None) -> Masks:
        """([context set, ...], [target set, ...]) of the clips at these global slots.

        Where a run has clips of several lengths, `alike` tells of every slot whether its clips have the length of
        these: only such clips are cut together.
        """
        pairs = [generator.draw(step, slots, alike) for generator in self.generators]
        return [context for context, _ in pairs], [target for _, target in pairs]

    def __call__(
        self, batch: Sequence[Any], step: int | None = None, slots: Sequence[int] | None = None
    ) -> tuple[Any, list[TokenSet], list[TokenSet]]:
        """Samples to (default_collate(samples), context sets, target sets).

        Without a step the calls are counted from 0, like a training loop that collates in its own process.
        """
        if step is None:
            step, self._calls = self._calls, self._calls + 1
        if slots is None:
            slots = range(self._clips, self._clips + len(batch))
            self._clips += len(batch)
        context, target = self.draw(step, slots)
        return default_collate(list(batch)), context, target


class MaskCollator(GeneratorCollator):
    """Multi-block masks, one pair of mask sets for each entry of `cfgs_mask`.

    An entry has the published keys: spatial_scale, temporal_scale, aspect_ratio, num_blocks, and optionally
    max_temporal_keep, max_keep, full_complement, pred_full_complement and inv_block; an unknown key raises. Draws
    depend on (seed, step, global slot, set number) only.
    """

    def __init__(
        self,
        cfgs_mask: Sequence[Mapping[str, Any]],
        crop_size: int | Sequence[int] = (224, 224),
        num_frames: int = 16,
        patch_size: int | Sequence[int] = (16, 16),
        tubelet_size: int = 2,
        *,
        seed: int = 0,
        truncation: Truncation = "group",
        group: int | None = None,
    ) -> None:
        clip = _clip(crop_size, num_frames, patch_size, tubelet_size)
        super().__init__(
            [
                MultiBlockMaskGenerator(
                    **clip, seed=seed, set_number=number, truncation=truncation, group=group,
                    **_generator_arguments(entry, _BLOCK_NAMES),
                )
                for number, entry in enumerate(cfgs_mask)
            ]
        )  # fmt: skip


class RandomTubeMaskCollator(GeneratorCollator):
    """Random tube masks, one pair of mask sets for each entry of `cfgs_mask`.

    An entry has the published key `ratio`, the share of the frame that is masked (0.9 without it); an unknown key
    raises. Draws depend on (seed, step, global slot, set number) only.
    """

    def __init__(
        self,
        cfgs_mask: Sequence[Mapping[str, Any]],
        crop_size: int | Sequence[int] = (224, 224),
        num_frames: int = 16,
        patch_size: int | Sequence[int] = (16, 16),
        tubelet_size: int = 2,
        *,
        seed: int = 0,
    ) -> None:
        clip = _clip(crop_size, num_frames, patch_size, tubelet_size)
        super().__init__(
            [
                RandomTubeMaskGenerator(
                    **clip, seed=seed, set_number=number, **_generator_arguments(entry, _TUBE_NAMES)
                )
                for number, entry in enumerate(cfgs_mask)
            ]
        )


_BLOCK_NAMES = {
    "spatial_scale": "spatial_pred_mask_scale",
    "temporal_scale": "temporal_pred_mask_scale",
    "aspect_ratio": "aspect_ratio",
    "num_blocks": "npred",
    "max_temporal_keep": "max_context_frames_ratio",
    "max_keep": "max_keep",
    "full_complement": "full_complement",
    "pred_full_complement": "pred_full_complement",
    "inv_block": "inv_block",
}
_TUBE_NAMES = {"ratio": "ratio"}


def _clip(
    crop_size: int | Sequence[int], num_frames: int, patch_size: int | Sequence[int], tubelet_size: int
) -> dict[str, Any]:
    """The clip under the names of the generators, which are the published ones."""
    return {
        "crop_size": crop_size,
        "num_frames": num_frames,
        "spatial_patch_size": patch_size,
        "temporal_patch_size": tubelet_size,
    }


def _generator_arguments(entry: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    unknown = set(entry) - set(names)
    if unknown:
        raise ValueError(f"unknown mask setting {sorted(unknown)[0]!r}, expected one of {', '.join(names)}")
    return {names[key]: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
