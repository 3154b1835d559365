"""Which patches are like a chosen one: the cosine of its features with those of all others, here and in other clips.

B clips, N = S x H x W tokens, E width.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from torch import Tensor

from fastjepa.viz.palette import name_columns, name_row, pixels, save, show, strip, style

COLOURS = "RdBu_r"
MARK = "#ffd400"


def similarities(tokens: Tensor, clip: int, token: int) -> Tensor:
    """Cosine of `tokens[clip, token]` with every token of [B, N, E], float32 [B, N]: 1 with itself."""
    units = F.normalize(tokens.float(), dim=-1)
    return units @ units[clip, token]


def most_salient(tokens: Tensor) -> int:
    """The token of features [N, E] without their position's mean (`pca.content`) that is least usual for its place."""
    return int(torch.linalg.vector_norm(tokens.float(), dim=-1).argmax())


def similarity_picture(
    clips: Sequence[Tensor],
    maps: Sequence[np.ndarray],
    chosen: tuple[int, int, int],
    titles: Sequence[str],
    tubelet: int,
    patch: int,
    path: Path,
) -> None:
    """Each clip [C, T, H, W] above its similarities [slots, rows, columns], with the chosen patch of the first one
    (slot, row, column) framed in both rows, as a PNG."""
    with style():
        slots = len(maps[0])
        figure, axes = strip(2 * len(clips), slots, extra=0.2)
        for number, (clip, values, title) in enumerate(zip(clips, maps, titles)):
            for slot in range(slots):
                show(axes[2 * number, slot], pixels(clip)[slot * tubelet])
                axes[2 * number + 1, slot].imshow(values[slot], cmap=COLOURS, vmin=-1, vmax=1, interpolation="nearest")
            name_row(axes[2 * number, 0], title)
            name_row(axes[2 * number + 1, 0], "similarity")
        slot, row, column = chosen
        for line, side in ((0, patch), (1, 1)):
            corner = (column * side - 0.5, row * side - 0.5)
            mark = Rectangle(corner, side, side, fill=False, edgecolor=MARK, linewidth=2, clip_on=False, zorder=5)
            axes[line, slot].add_patch(mark)
        name_columns(axes[0], tubelet)
        bar = figure.colorbar(
            ScalarMappable(Normalize(-1, 1), COLOURS),
            ax=axes,
            location="bottom",
            aspect=60,
            fraction=0.03,
            ticks=[-1, 0, 1],
            label="cosine with the chosen patch (yellow frame)",
        )
        bar.outline.set_visible(False)
        save(figure, path)
