"""What patch features tell apart: their first three principal components as red, green and blue.

B clips, N = S x H x W tokens, E width. The axes are fitted on the tokens of several clips together, so a colour means
the same in all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastjepa.viz.palette import name_columns, name_row, pixels, save, show, strip, style

# Shares of the values that are black and full colour: a few odd tokens must not make the rest grey.
LOW, HIGH = 0.02, 0.98
FEWEST_CLIPS = 2


def content(tokens: Tensor) -> Tensor:
    """Features [B, N, E] without their mean over the clips at each position, float32.

    Features know where they are, and that is most of what distinguishes them; what is left is what is seen there. A
    single clip is returned as it is.
    """
    tokens = tokens.float()
    return tokens if len(tokens) < FEWEST_CLIPS else tokens - tokens.mean(dim=0)


@dataclass(frozen=True)
class Components:
    """Three axes [E, 3] of unit length around `mean` [E], the share of the variance along each, and the range [3] of
    what they are fitted on, from `low` to `high`."""

    mean: Tensor
    axes: Tensor
    shares: Tensor
    low: Tensor
    high: Tensor

    def colours(self, tokens: Tensor) -> Tensor:
        """[..., E] -> float32 [..., 3] in 0..1."""
        values = (tokens.double() - self.mean) @ self.axes
        width = (self.high - self.low).clamp_min(torch.finfo(torch.float32).tiny)
        return ((values - self.low) / width).clamp(0, 1).float()


def fit(tokens: Tensor) -> Components:
    """Axes of tokens [..., E], on the CPU in float64. The largest entry of each is positive: the same features always
    have the same colours. Errors: ValueError for features that are not finite or fewer than three wide."""
    rows = tokens.detach().cpu().double().flatten(0, -2)
    if not rows.isfinite().all():
        raise ValueError("the features are not finite: this run has diverged")
    if rows.shape[1] < 3:
        raise ValueError(f"expected features at least 3 wide, given {rows.shape[1]}")
    mean = rows.mean(dim=0)
    energy, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean))
    energy, axes = energy.flip(0).clamp_min(0), axes.flip(1)[:, :3]
    axes = axes * torch.where(axes.gather(0, axes.abs().argmax(dim=0)[None]) < 0, -1.0, 1.0)
    values = (rows - mean) @ axes
    ordered = values.sort(dim=0).values  # torch.quantile refuses many rows
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (LOW, HIGH))
    total = energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Components(mean, axes, energy[:3] / total, low, high)


def pca_picture(
    clips: Sequence[Tensor], colours: Sequence[np.ndarray], titles: Sequence[str], tubelet: int, path: Path
) -> None:
    """Each clip [C, T, H, W] above its colours [slots, rows, columns, 3], a column a token slot in time, as a PNG."""
    with style():
        slots = len(colours[0])
        figure, axes = strip(2 * len(clips), slots)
        for number, (clip, maps, title) in enumerate(zip(clips, colours, titles)):
            for slot in range(slots):
                show(axes[2 * number, slot], pixels(clip)[slot * tubelet])
                show(axes[2 * number + 1, slot], maps[slot])
            name_row(axes[2 * number, 0], title)
            name_row(axes[2 * number + 1, 0], "features")
        name_columns(axes[0], tubelet)
        save(figure, path)
