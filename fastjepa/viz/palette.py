"""Colours and sizes that all pictures share, frames as they are shown, and how a figure becomes a file.

Pictures have no background and lettering in a middle grey: they read on white paper and on a dark page.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from fastjepa.pixels import MEAN, STD

CONTEXT, TARGET, GREY = "#2f7fc1", "#d6453d", "#7a7a7a"
LINES = (CONTEXT, TARGET, "#d19a1f", "#4f9d5d", "#8e6bbf", "#3aa6a6", "#b0628f", "#8a8a3a")
# The words of metrics.jsonl and status.json: what is well, what may become so, what is lost.
VERDICTS = {
    "alive": "#3f9b57",
    "early": GREY,
    "position only": "#2f7fc1",
    "unknown": GREY,
    "stuck": "#d19a1f",
    "collapsing": "#d97a1f",
    "collapsed": "#d6453d",
    "diverged": "#d6453d",
}
STYLE: dict[str, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.hashsalt": "fastjepa",
}
DPI = 120
# Inches of a frame in a strip, and pixels below which a frame is enlarged without smoothing.
CELL, COARSE = 1.2, 100


@contextmanager
def style() -> Iterator[None]:
    """Figures look the same whatever the user's settings of matplotlib are."""
    with mpl.rc_context(), warnings.catch_warnings():
        # Names of videos may be in letters that the font does not have: boxes stand for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)  # type: ignore[arg-type]
        yield


def save(figure: Figure, path: Path) -> None:
    """A PNG, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def as_svg(figure: Figure) -> bytes:
    """The same figure in lines, without a date."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def pixels(clip: Tensor) -> np.ndarray:
    """uint8 or normalised float32 [C, T, H, W] -> [T, H, W, C] in 0..1, on the CPU."""
    clip = clip.cpu()
    if clip.dtype == torch.uint8:
        return (clip.permute(1, 2, 3, 0).float() / 255).numpy()
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (MEAN, STD))
    return (clip * std + mean).clamp(0, 1).permute(1, 2, 3, 0).numpy()


def strip(rows: int, slots: int, extra: float = 0.0) -> tuple[Figure, np.ndarray]:
    """A figure of frames, a column a token slot in time, with `extra` inches below them, and its axes [rows, slots]."""
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02, compress=True)
    figure = Figure(figsize=(CELL * slots + 0.9, CELL * 1.04 * rows + 0.35 + extra), layout=layout)
    axes = figure.subplots(rows, slots, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def show(ax: Axes, picture: np.ndarray, **options: Any) -> None:
    """A frame or a map [H, W(, 3)]: small ones keep their pixels, large ones are made smaller smoothly."""
    smoothing: Literal["nearest", "antialiased"] = "nearest" if len(picture) < COARSE else "antialiased"
    ax.imshow(picture, interpolation=smoothing, **options)


def name_columns(axes: Sequence[Axes], tubelet: int) -> None:
    """The number of the first frame of each slot above the first row."""
    for slot, ax in enumerate(axes):
        ax.set_title(f"frame {slot * tubelet}", fontsize=8)


def name_row(ax: Axes, title: str, colour: str = GREY) -> None:
    """A title left of the first picture of a row."""
    # A dollar in the name of a video begins no formula.
    ax.set_ylabel(title, color=colour, fontsize=8.5, parse_math=False)
