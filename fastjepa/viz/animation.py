"""Clips and their feature maps side by side, moving."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastjepa.viz.palette import COARSE, pixels

# Pixels of a frame, about; and of the space between them.
SIDE, GAP = 160, 4
# A loop that takes less time flickers: it is slowed down by a whole number.
SHORTEST_LOOP = 1.6
UNKNOWN = 0.2


def animation(
    clips: Sequence[Tensor], maps: Sequence[np.ndarray], tubelet: int, seconds: float | None, path: Path
) -> int:
    """An animated WebP without end: each clip [C, T, H, W] with its map [slots, rows, columns, 3] in 0..1 below.

    A frame a token slot, shown for its `seconds` (None where nobody knows), or longer where the whole is too short to
    be followed. Returns how many times slower than the clip it is.
    """
    slots = len(maps[0])
    pace = seconds or UNKNOWN
    slower = ceil(SHORTEST_LOOP / (slots * pace)) if slots * pace < SHORTEST_LOOP else 1
    columns = [(pixels(clip)[::tubelet], values) for clip, values in zip(clips, maps)]
    images = [
        Image.fromarray(_sheet([(_enlarged(frames[slot]), values[slot]) for frames, values in columns]))
        for slot in range(slots)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=round(1000 * pace * slower),
        loop=0,
        lossless=len(columns[0][0][0]) < COARSE,
        quality=85,
        method=4,
    )
    return slower


def _enlarged(frame: np.ndarray) -> np.ndarray:
    """uint8 [H', W', 3]: a small frame in whole multiples of its pixels, a large one made smaller."""
    picture = Image.fromarray((frame * 255).round().astype(np.uint8))
    height, width = frame.shape[:2]
    if height < COARSE:
        return np.asarray(
            picture.resize((width * (SIDE // height), height * (SIDE // height)), Image.Resampling.NEAREST)
        )
    return np.asarray(picture.resize((round(SIDE * width / height), SIDE), Image.Resampling.LANCZOS))


def _sheet(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """uint8 [H, W, 4]: frames beside each other with their maps below; what is between them is transparent."""
    height, width = pairs[0][0].shape[:2]
    sheet = np.zeros((2 * height + GAP, len(pairs) * (width + GAP) - GAP, 4), np.uint8)
    for number, (frame, values) in enumerate(pairs):
        cells = Image.fromarray((values * 255).round().astype(np.uint8))
        below = np.asarray(cells.resize((width, height), Image.Resampling.NEAREST))
        for top, picture in ((0, frame), (height + GAP, below)):
            place = sheet[top : top + height, number * (width + GAP) : number * (width + GAP) + width]
            place[..., :3], place[..., 3] = picture, 255
    return sheet
