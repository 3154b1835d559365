"""What the masks hide of a clip."""

from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from torch import Tensor

from fastjepa.masks import TokenSet, split_runs
from fastjepa.viz.palette import CONTEXT, GREY, TARGET, name_columns, name_row, pixels, save, show, strip, style

SEEN, PREDICTED = "hidden from the encoder", "not asked of the predictor"


def mask_picture(
    clip: Tensor, context: list[TokenSet], target: list[TokenSet], tubelet: int, patch: int, path: Path
) -> None:
    """The first clip of a batch with its masks, a column a token slot in time, as a PNG.

    `clip` is uint8 or normalised float32 [C, T, H, W]. A row with the clip, then for each mask set one row with what
    the encoder sees and one with what is predicted; the rest is darkened.
    """
    frames = pixels(clip)[::tubelet]
    grid = (len(frames), clip.shape[-2] // patch, clip.shape[-1] // patch)
    rows = [("clip", np.ones(grid, bool), GREY)]
    for number, (seen, wanted) in enumerate(zip(context, target)):
        for what, tokens, colour in (("seen", seen, CONTEXT), ("predicted", wanted, TARGET)):
            cells = token_grid(tokens, grid)
            rows.append((f"set {number}: {what}\n{cells.mean():.0%} of the clip", cells, colour))
    with style():
        figure, axes = strip(len(rows), len(frames), extra=0.3)
        for (title, kept, colour), line in zip(rows, axes):
            for slot, ax in enumerate(line):
                shown = np.kron(kept[slot], np.ones((patch, patch)))[..., None]
                show(ax, frames[slot] * shown + (1 - shown) * _dark(colour))
            name_row(line[0], title, colour)
        name_columns(axes[0], tubelet)
        handles = [
            Patch(color=tuple(_dark(colour).tolist()), label=text)
            for colour, text in ((CONTEXT, SEEN), (TARGET, PREDICTED))
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        save(figure, path)


def token_grid(token_set: TokenSet, grid: tuple[int, int, int]) -> np.ndarray:
    """bool [slots, rows, columns]: the tokens of the first clip that are in the set."""
    _, (dense,) = next(split_runs([token_set]))
    kept = np.zeros(int(np.prod(grid)), dtype=bool)
    kept[dense[0].numpy()] = True
    return kept.reshape(grid)


def _dark(colour: str) -> np.ndarray:
    return 0.12 + 0.18 * np.array(to_rgb(colour))
