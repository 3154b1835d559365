"""A clip that a decoder of batches is asked for."""

from dataclasses import dataclass

import numpy as np

from fastjepa.data.sampling import Box


@dataclass(frozen=True)
class EncodedClip:
    """One clip to decode.

    `encoded`: uint8 [bytes], a file that holds at least the frames of the clip, not to be changed before the clip is
    finished; `frames`: int64 [T], their numbers in it, in any order, repeats allowed; `path`: what it was taken from;
    `box`, `flip`: as in ClipDraw, of the picture as displayed, which has
    `height` x `width` pixels; `rotation`: degrees clockwise that the stored picture is turned for that
    (VideoInfo.rotation). Errors: ValueError for a box outside the picture and an angle that is no quarter turn.
    """

    path: str
    encoded: np.ndarray
    frames: np.ndarray
    box: Box
    flip: bool
    height: int
    width: int
    rotation: int = 0

    def __post_init__(self) -> None:
        if self.rotation not in (0, 90, 180, 270):
            raise ValueError(f"{self.path}: expected a rotation of 0, 90, 180 or 270 degrees, given {self.rotation}")
        top, left, height, width = self.box.top, self.box.left, self.box.height, self.box.width
        inside = 0 <= top < top + height <= self.height and 0 <= left < left + width <= self.width
        if not inside:
            raise ValueError(f"{self.path}: {self.box} does not lie in a picture of {self.height} x {self.width}")

    def stored_size(self) -> tuple[int, int]:
        """Height and width of the picture in the file, before it is turned."""
        return (self.height, self.width) if self.rotation % 180 == 0 else (self.width, self.height)

    def stored_box(self) -> Box:
        """Where the box lies in the picture of the file."""
        box = self.box
        below, right = self.height - box.top - box.height, self.width - box.left - box.width
        if self.rotation == 90:
            return Box(right, box.top, box.width, box.height)
        if self.rotation == 180:
            return Box(below, right, box.height, box.width)
        if self.rotation == 270:
            return Box(box.left, below, box.width, box.height)
        return box
