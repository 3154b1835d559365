"""Which video, which frames, which crop: pure functions of (seed, slot), decided before anything is decoded.

A slot is a number that counts all clips of a run from 0; the position in the data is one integer. Where a video gives
several clips, its video slot counts the videos: slot // clips_per_video.
"""

from dataclasses import astuple, dataclass
from fractions import Fraction
from math import exp, log
from typing import Literal

import numpy as np

from fastjepa.data.augment import Op, draw_ops
from fastjepa.streams import Purpose, stream

CROP_TRIES = 10
# Random erasing: tries, area as a share of the picture, aspect ratio (33.3 % and 3.33 are these numbers, rounded).
ERASE_TRIES = 100
ERASE_AREA, ERASE_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Box:
    """A crop in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Erase:
    """What stands in a box of the finished clip instead of the picture: float32 [3, T, height, width]."""

    box: Box
    noise: np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """Which draws there are beside crop and flip; none in the published pretraining.

    `motion_shift`: the crop box moves to a second one. `erase`: probability of random erasing; `crop` is the side of
    the clip that it needs to know. `auto_augment`: RandAugment on the decoded frames. Errors: ValueError for erasing
    without a crop.
    """

    motion_shift: bool = False
    erase: float = 0.0
    auto_augment: bool = False
    crop: int = 0

    def __post_init__(self) -> None:
        if self.erase and self.crop < 1:
            raise ValueError(f"random erasing needs the side of the clip, got crop {self.crop}")


@dataclass(frozen=True)
class ClipDraw:
    """What is cut out of one video: frame numbers int64 [T], crop box, mirrored or not.

    `end_box`: where the box has moved to in the last frame. `augment`: operations on the decoded frames; None leaves
    the pixels on their 0..255 scale, an empty tuple does not.
    """

    frames: np.ndarray
    box: Box
    flip: bool
    end_box: Box | None = None
    erase: Erase | None = None
    augment: tuple[Op, ...] | None = None


class ClipPlan:
    """Draws the clip of every slot.

    Videos come in a new permutation each pass over the data. `scale` and `aspect` are the ranges of the random resized
    crop. `duration` (seconds) takes the place of `stride`. With `clips_per_video` n, slot s is clip s % n of the video
    of video slot s // n: the clips of a video come from its n equal segments and have boxes and flips of their own.
    Source: the published sampler and transform (V-JEPA, arXiv 2404.08471, appendix).
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
        augmentation: Augmentation = Augmentation(),
        *,
        clips_per_video: int = 1,
        duration: float | None = None,
    ) -> None:
        self.seed, self.videos = seed, videos
        self.frames, self.stride, self.duration = frames, stride, duration
        self.scale, self.aspect, self.flip = scale, aspect, flip
        self.augmentation = augmentation
        self.clips_per_video = clips_per_video
        self._pass: tuple[int, np.ndarray] | None = None

    def video(self, video_slot: int) -> int:
        """Number of the video that this video slot asks for."""
        number, place = divmod(video_slot, len(self.videos))
        if self._pass is None or self._pass[0] != number:
            self._pass = (number, stream(self.seed, Purpose.PERMUTATION, number).permutation(self.videos))
        return int(self._pass[1][place])

    def replacement(self, video_slot: int, attempt: int) -> int:
        """Number of the video to take instead, after `attempt` that cannot be used."""
        return int(stream(self.seed, Purpose.REPLACEMENT, video_slot, attempt).choice(self.videos))

    def all_replacements(self, video_slot: int, attempt: int) -> list[int]:
        """Numbers of all videos in a random order of this slot, for when single replacements have failed."""
        return stream(self.seed, Purpose.REPLACEMENT, video_slot, attempt).permutation(self.videos).tolist()

    def window(self, rate: Fraction | None = None) -> int:
        """Source frames that a clip spans in a video of `rate` frames/s (needed with a duration only)."""
        return self.frames * clip_stride(self.frames, self.stride, self.duration, rate)

    def clip(self, slot: int, length: int, height: int, width: int, rate: Fraction | None = None) -> ClipDraw:
        """What to cut out of a video of `length` frames of `height` x `width` pixels, for the clip at this slot."""
        rng = stream(self.seed, Purpose.CLIP, slot)
        stride = clip_stride(self.frames, self.stride, self.duration, rate)
        number, clips = slot % self.clips_per_video, self.clips_per_video
        frames = clip_frames(length, self.frames, stride, rng, clip=number, clips=clips)
        box = random_box(height, width, self.scale, self.aspect, rng)
        flip = bool(self.flip and rng.random() < 0.5)
        return ClipDraw(frames, box, flip, *self._augmentation(height, width, slot))

    def _augmentation(
        self, height: int, width: int, slot: int
    ) -> tuple[Box | None, Erase | None, tuple[Op, ...] | None]:
        """Second box, erasing and operations: from streams of their own, so that none moves the draws of another."""
        a, end_box, erase, ops = self.augmentation, None, None, None
        if a.motion_shift:
            end_box = random_box(height, width, self.scale, self.aspect, stream(self.seed, Purpose.MOTION, slot))
        if a.erase:
            erase = random_erase(a.erase, a.crop, self.frames, stream(self.seed, Purpose.ERASE, slot))
        if a.auto_augment:
            ops = draw_ops(stream(self.seed, Purpose.AUGMENT, slot))
        return end_box, erase, ops


def clip_stride(frames: int, stride: int, duration: float | None, rate: Fraction | float | None) -> int:
    """Source frames from one frame of a clip to the next: `stride`, or what makes the clip span `duration` seconds.

    The published rule, int(duration * rate / frames) with the average rate in frames/s, but at least 1: the public code
    comes to a stride of 0 where a video has fewer frames in that time than the clip, and fails. Errors: ValueError for
    a duration without a rate.
    """
    if duration is None:
        return stride
    if rate is None:
        raise ValueError(f"the stride of a clip of {duration:g} s follows from the frame rate, which is not known")
    return max(1, int(duration * float(rate) / frames))


def clip_frames(
    length: int,
    frames: int,
    stride: int,
    rng: np.random.Generator | None,
    *,
    clip: int = 0,
    clips: int = 1,
    overlap: bool = False,
    fixed: Literal["start", "middle"] = "middle",
) -> np.ndarray:
    """Frame numbers int64 [frames] of clip number `clip` of `clips` out of `length` frames, see `segment_frames`.

    The place in the clip's segment is random, or with rng None the `fixed` one: from the middle, or from the start (the
    published clip that is not random).
    """
    window, room = frames * stride, length // clips
    end = None
    if room > window:
        at_rest = window if fixed == "start" else (room + window) // 2
        end = at_rest if rng is None else int(rng.integers(window, room))
    return segment_frames(length, frames, stride, end, clip=clip, clips=clips, overlap=overlap)


def segment_frames(
    length: int, frames: int, stride: int, end: int | None, *, clip: int = 0, clips: int = 1, overlap: bool = False
) -> np.ndarray:
    """Frame numbers int64 [frames] of clip number `clip` of `clips`, each from its own segment of the video.

    The published rule. A segment has length // clips frames. In one longer than the window of frames * stride, the
    window ends before frame `end` of the segment, window <= end < segment. Both ends of the window are included, so
    the real stride is slightly larger. Any other (`end` None) is read at the stride and its last frame repeated; with
    `overlap` the windows leave their segments instead and start at equal distances over the whole video, each without
    its last frame, and all at 0 in a video that is not longer than one.

    The public code asks for a negative frame where a segment, or with `overlap` the window, has no frame to offer: here
    clip i of n then is frame i * length // n throughout. Errors: ValueError for counts below 1, a clip number outside
    0..clips-1 and an `end` that does not belong to the segment.
    """
    if min(length, frames, stride, clips) < 1 or not 0 <= clip < clips:
        raise ValueError(
            f"no clip {clip} of {clips} with {frames} frames at stride {stride} in a video of {length} frames"
        )
    window, room = frames * stride, length // clips
    if room > window:
        if end is None or not window <= end < room:
            raise ValueError(f"a window of {window} in a segment of {room} frames cannot end at {end}")
        spread = np.clip(np.linspace(end - window, end, frames), end - window, end - 1)
        return spread.astype(np.int64) + clip * room
    if end is not None:
        raise ValueError(f"a segment of {room} frames has no place for a window of {window} that ends at {end}")
    last = min(window, length) - 1 if overlap else room
    if last < 1:
        return np.full(frames, clip * length // clips, dtype=np.int64)
    points = last // stride
    spread = np.concatenate([np.linspace(0, last, points), np.full(frames - points, last)])
    step = room if not overlap else (length - window) // (clips - 1) if length > window else 0
    return np.clip(spread, 0, last - 1).astype(np.int64) + clip * step


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


def shifted_boxes(first: Box, last: Box, frames: int) -> list[Box]:
    """The box of every frame, moving linearly from `first` to `last`, in pixels rounded down."""
    if frames == 1:
        return [first]
    start, end = np.array(astuple(first)), np.array(astuple(last))
    step = np.arange(frames)[:, None]
    # In whole numbers: a place that is one exactly must not fall below it by rounding.
    return [Box(*row) for row in ((start * (frames - 1 - step) + end * step) // (frames - 1)).tolist()]


def random_erase(share: float, size: int, frames: int, rng: np.random.Generator) -> Erase | None:
    """Noise N(0, 1) for a random box of a clip of `size` x `size` pixels, for `share` of all draws.

    The box is that of all frames; each frame, pixel and channel has noise of its own. None too where a hundred boxes do
    not lie strictly inside. Source: Random Erasing (arXiv 1708.04896), pixel mode, as in the published transform.
    """
    if rng.random() >= share:
        return None
    for _ in range(ERASE_TRIES):
        area = size * size * rng.uniform(*ERASE_AREA)
        ratio = exp(rng.uniform(log(ERASE_ASPECT[0]), log(ERASE_ASPECT[1])))
        h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < h < size and 0 < w < size:
            box = Box(int(rng.integers(0, size - h + 1)), int(rng.integers(0, size - w + 1)), h, w)
            return Erase(box, rng.standard_normal((3, frames, h, w), dtype=np.float32))
    return None


def central_box(height: int, width: int) -> Box:
    """The largest central square, for evaluation."""
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)
