"""Random tube masks: the same random places of the frame are seen in every time slot, the rest is predicted.

Grid of t x h x w tokens, numbered time, row, column; a cell is a place of the frame, numbered row, column. Source: tube
masking of VideoMAE (arXiv 2203.12602, section 3.2), in the form and with the counts of the published V-JEPA collator.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastjepa.masks.grid import token_grid
from fastjepa.streams import Purpose, stream


class RandomTubeMaskGenerator:
    """Draws one mask set: `int(h * w * (1 - ratio))` cells of the frame are the context of a clip, at all times.

    All clips keep equally many tokens, so nothing is ever cut and a draw is always dense.

    Errors: ValueError, at construction, for a ratio that leaves no cell to see or none to predict.
    """

    def __init__(
        self,
        crop_size: int | Sequence[int] = 224,
        num_frames: int = 16,
        spatial_patch_size: int | Sequence[int] = 16,
        temporal_patch_size: int = 2,
        ratio: float = 0.9,
        *,
        seed: int = 0,
        set_number: int = 0,
    ) -> None:
        self.grid = token_grid(crop_size, num_frames, spatial_patch_size, temporal_patch_size)
        self.seed, self.set_number = seed, set_number
        if not 0 < ratio < 1:
            raise ValueError(f"mask ratio must be above 0 and below 1, got {ratio}")
        _, height, width = self.grid
        self.cells = height * width
        # The published arithmetic: rounding makes it 9 of 10 x 10 cells at a ratio of 0.9.
        self.keep = int(self.cells * (1 - ratio))
        if self.cells == 1:
            raise ValueError(
                "random tubes need a frame of several tokens, and this one has a single one: raise data.crop"
            )
        if not 0 < self.keep < self.cells:
            side, change = ("context", "lower") if self.keep == 0 else ("target", "raise")
            raise ValueError(
                f"mask ratio {ratio} leaves no {side} on a frame of {height}x{width} tokens: {change} mask.ratio"
            )

    def draw_cells(self, step: int, slots: Sequence[int]) -> np.ndarray:
        """The cells that the clips at these global slots keep: bool [B, h * w], `keep` true ones a row."""
        kept = np.zeros((len(slots), self.cells), dtype=bool)
        for row, slot in zip(kept, slots):
            rng = stream(self.seed, Purpose.MASK, slot, step, self.set_number)
            row[rng.choice(self.cells, size=self.keep, replace=False)] = True
        return kept

    def draw(
        self, step: int, slots: Sequence[int], alike: Callable[[int], bool] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(context, target) token numbers, ascending int64, of the clips at these global slots.

        [B, keep * t] and [B, (h * w - keep) * t]. Nothing is cut, so it does not matter which others are `alike`.
        """
        kept = self.draw_cells(step, slots)
        return tube_tokens(kept, self.grid[0]), tube_tokens(~kept, self.grid[0])


def tube_tokens(cells: np.ndarray, duration: int) -> Tensor:
    """Token numbers of cells that are chosen at all times: bool [B, cells] -> ascending int64 [B, K * duration].

    Errors: ValueError where the rows do not choose equally many cells K.
    """
    counts = np.unique(cells.sum(axis=1))
    if len(counts) > 1:
        raise ValueError(f"clips of one mask set must keep equally many cells, got {counts.tolist()}")
    clips, total = cells.shape
    places = np.nonzero(cells)[1].reshape(clips, 1, -1)
    tokens = places + total * np.arange(duration).reshape(1, -1, 1)
    return torch.from_numpy(tokens.reshape(clips, -1).astype(np.int64))
