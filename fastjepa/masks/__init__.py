"""Which tokens are seen and which are predicted."""

from fastjepa.masks.collate import DefaultCollator, MaskCollator
from fastjepa.masks.multiblock3d import MultiBlockMaskGenerator
from fastjepa.masks.tokens import Ragged, TokenSet, apply_masks, repeat_clips, split_runs

__all__ = [
    "DefaultCollator",
    "MaskCollator",
    "MultiBlockMaskGenerator",
    "Ragged",
    "TokenSet",
    "apply_masks",
    "repeat_clips",
    "split_runs",
]
