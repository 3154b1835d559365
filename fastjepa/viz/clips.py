"""Clips as the network sees them."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastjepa.viz.palette import name_columns, name_row, pixels, save, show, strip, style


def clip_picture(clips: Sequence[Tensor], titles: Sequence[str], tubelet: int, path: Path) -> None:
    """Clips as the network sees them, a row each and a column a token slot in time, as a PNG.

    `clips` are uint8 or normalised float32 [C, T, H, W] of one shape; floats are shown with the normalisation undone.
    """
    shown = [pixels(clip)[::tubelet] for clip in clips]
    with style():
        figure, axes = strip(len(shown), len(shown[0]))
        for title, frames, line in zip(titles, shown, axes):
            for frame, ax in zip(frames, line):
                show(ax, frame)
            name_row(line[0], title)
        name_columns(axes[0], tubelet)
        save(figure, path)
