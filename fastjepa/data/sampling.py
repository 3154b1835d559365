"""Which video, which frames, which crop: pure functions of (seed, slot), decided before anything is decoded.

A slot is a number that counts all clips of a run from 0; the position in the data is one integer.
"""

from dataclasses import dataclass
from math import exp, log

import numpy as np

from fastjepa.streams import Purpose, stream

CROP_TRIES = 10


@dataclass(frozen=True)
class Box:
    """A crop in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class ClipDraw:
    """What is cut out of one video: frame numbers int64 [T], crop box, mirrored or not."""

    frames: np.ndarray
    box: Box
    flip: bool


class ClipPlan:
    """Draws the clip of every slot.

    Videos come in a new permutation each pass over the data. `scale` and `aspect` are the ranges of the random resized
    crop. Source: the published sampler and transform (V-JEPA, arXiv 2404.08471, appendix).
    """

    def __init__(
        self,
        seed: int,
        videos: np.ndarray,
        frames: int,
        stride: int,
        scale: tuple[float, float],
        aspect: tuple[float, float],
        flip: bool,
    ) -> None:
        self.seed, self.videos = seed, videos
        self.frames, self.stride = frames, stride
        self.scale, self.aspect, self.flip = scale, aspect, flip
        self._pass: tuple[int, np.ndarray] | None = None

    def video(self, slot: int) -> int:
        """Number of the video that this slot asks for."""
        number, place = divmod(slot, len(self.videos))
        if self._pass is None or self._pass[0] != number:
            self._pass = (number, stream(self.seed, Purpose.PERMUTATION, number).permutation(self.videos))
        return int(self._pass[1][place])

    def replacement(self, slot: int, attempt: int) -> int:
        """Number of the video to take instead, after `attempt` unreadable ones."""
        return int(stream(self.seed, Purpose.REPLACEMENT, slot, attempt).choice(self.videos))

    def clip(self, slot: int, length: int, height: int, width: int) -> ClipDraw:
        """What to cut out of a video of `length` frames of `height` x `width` pixels."""
        rng = stream(self.seed, Purpose.CLIP, slot)
        frames = clip_frames(length, self.frames, self.stride, rng)
        box = random_box(height, width, self.scale, self.aspect, rng)
        return ClipDraw(frames, box, bool(self.flip and rng.random() < 0.5))


def clip_frames(length: int, frames: int, stride: int, rng: np.random.Generator | None) -> np.ndarray:
    """Frame numbers int64 [frames] of one clip out of `length` frames, at random or (rng None) from the middle.

    The published rule: both ends of a window of frames * stride are included, so the real stride is slightly larger; a
    video shorter than the window is read at the stride and its last frame repeated.
    """
    window = frames * stride
    if length > window:
        end = (length + window) // 2 if rng is None else int(rng.integers(window, length))
        start = end - window
        return np.clip(np.linspace(start, end, frames), start, end - 1).astype(np.int64)
    points = length // stride
    spread = np.concatenate([np.linspace(0, length, points), np.full(frames - points, length)])
    return np.clip(spread, 0, length - 1).astype(np.int64)


def random_box(
    height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A box of random area share and aspect ratio; the central one of allowed aspect where ten draws do not fit."""
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        ratio = exp(rng.uniform(log(aspect[0]), log(aspect[1])))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
    w, h = width, height
    if width / height < aspect[0]:
        h = max(1, min(height, round(width / aspect[0])))
    elif width / height > aspect[1]:
        w = max(1, min(width, round(height * aspect[1])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def central_box(height: int, width: int) -> Box:
    """The largest central square, for evaluation."""
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)
