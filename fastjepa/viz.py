"""Pictures of a run: the loss curve, the clips that are trained on, and what the masks hide."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from fastjepa.masks import TokenSet, split_runs
from fastjepa.pixels import MEAN, STD

CONTEXT, TARGET, GREY = "#1f77b4", "#d62728", "#8c8c8c"


def loss_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss, loss against the trivial predictor, and effective rank over the steps of metrics.jsonl, as a PNG."""
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, _values(rows, "loss"), color=CONTEXT, lw=1.2, label="loss")
    left.plot(steps, _values(rows, "loss_ratio"), color=TARGET, lw=1.2, label="loss / trivial predictor")
    left.axhline(1.0, color=GREY, lw=0.8, ls="--")
    left.set(xlabel="step", title="below the dashed line: more than the position is predicted")
    left.legend(frameon=False)
    right.plot(steps, _values(rows, "rank"), color=CONTEXT, lw=1.2)
    right.set(xlabel="step", title="effective rank of the target features", ylim=(0, None))
    for axes in (left, right):
        axes.title.set_size(9)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def mask_picture(
    clip: Tensor, context: list[TokenSet], target: list[TokenSet], tubelet: int, patch: int, path: Path
) -> None:
    """The first clip of a batch with its masks, a column a token slot in time, as a PNG.

    `clip` is uint8 or normalised float32 [C, T, H, W]. A row with the clip, then for each mask set one row with what
    the encoder sees and one with what is predicted; the rest is darkened.
    """
    frames = _pixels(clip)[::tubelet]
    slots, height, width = len(frames), clip.shape[-2] // patch, clip.shape[-1] // patch
    rows = [("clip", np.ones((slots, height, width), bool), GREY)]
    for number, (seen, wanted) in enumerate(zip(context, target)):
        rows.append((f"set {number}\nseen", _grid(seen, (slots, height, width)), CONTEXT))
        rows.append((f"set {number}\npredicted", _grid(wanted, (slots, height, width)), TARGET))
    figure = Figure(figsize=(1.1 * slots + 0.8, 1.15 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), slots, squeeze=False)
    for (title, kept, colour), line in zip(rows, axes):
        for slot, ax in enumerate(line):
            shown = np.kron(kept[slot], np.ones((patch, patch)))[..., None]
            tint = np.array(to_rgb(colour))
            ax.imshow(frames[slot] * shown + (1 - shown) * (0.12 + 0.18 * tint), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, color=colour, fontsize=9)
    for slot, ax in enumerate(axes[0]):
        ax.set_title(f"frame {slot * tubelet}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def clip_picture(clips: Sequence[Tensor], titles: Sequence[str], tubelet: int, path: Path) -> None:
    """Clips as the network sees them, a row each and a column a token slot in time, as a PNG.

    `clips` are uint8 or normalised float32 [C, T, H, W] of one shape; floats are shown with the normalisation undone.
    """
    shown = [_pixels(clip)[::tubelet] for clip in clips]
    slots = len(shown[0])
    figure = Figure(figsize=(1.1 * slots + 0.8, 1.15 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), slots, squeeze=False)
    for title, frames, line in zip(titles, shown, axes):
        for frame, ax in zip(frames, line):
            ax.imshow(frame, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, color=GREY, fontsize=9)
    for slot, ax in enumerate(axes[0]):
        ax.set_title(f"frame {slot * tubelet}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [float("nan") if row[key] is None else row[key] for row in rows]


def _pixels(clip: Tensor) -> np.ndarray:
    """[T, H, W, C] in 0..1."""
    if clip.dtype == torch.uint8:
        return (clip.permute(1, 2, 3, 0).float() / 255).numpy()
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (MEAN, STD))
    return (clip * std + mean).clamp(0, 1).permute(1, 2, 3, 0).numpy()


def _grid(token_set: TokenSet, grid: tuple[int, int, int]) -> np.ndarray:
    _, (dense,) = next(split_runs([token_set]))
    kept = np.zeros(int(np.prod(grid)), dtype=bool)
    kept[dense[0].numpy()] = True
    return kept.reshape(grid)
