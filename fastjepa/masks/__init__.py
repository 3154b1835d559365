"""Which tokens are seen and which are predicted."""

from fastjepa.masks.collate import DefaultCollator, GeneratorCollator, MaskCollator, RandomTubeMaskCollator
from fastjepa.masks.multiblock3d import MultiBlockMaskGenerator
from fastjepa.masks.random_tube import RandomTubeMaskGenerator
from fastjepa.masks.tokens import Ragged, TokenSet, apply_masks, repeat_clips, split_runs
from fastjepa.masks.union import TargetUnion, target_union

__all__ = [
    "DefaultCollator",
    "GeneratorCollator",
    "MaskCollator",
    "MultiBlockMaskGenerator",
    "Ragged",
    "RandomTubeMaskCollator",
    "RandomTubeMaskGenerator",
    "TargetUnion",
    "TokenSet",
    "apply_masks",
    "repeat_clips",
    "split_runs",
    "target_union",
]
