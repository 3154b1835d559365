"""Which frames, which crop: pure functions of (seed, slot), decided before anything is decoded.

A slot is a number that counts all clips of a run from 0; the position in the data is one integer. Where a video gives
several clips, its video slot counts the videos: slot // clips_per_video. Which video that is: `fastjepa.data.order`.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from fractions import Fraction
from math import exp, log

import numpy as np

from fastjepa.data.augment import Op, draw_ops
from fastjepa.data.frames import clip_frames, clip_stride, frame_seconds, known_times, rate_stride, timed_frames
from fastjepa.data.order import Collection, VideoOrder
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


@dataclass(frozen=True)
class ClipShape:
    """Which frames a clip has, as `ClipPlan` takes them, each of them `repeat` times.

    `whole_stride`: `fps` stands for the stride of `rate_stride`, in place of true times.
    """

    frames: int
    stride: int
    duration: float | None = None
    fps: float | None = None
    repeat: int = 1
    whole_stride: bool = False

    @property
    def by_times(self) -> bool:
        """Whether frames are found by the times at which they are shown."""
        return self.fps is not None and not self.whole_stride

    def source_stride(self, rate: Fraction | None) -> int:
        """Source frames from one frame to the next, where these are not found by times."""
        if self.fps is not None:
            return rate_stride(self.fps, rate)
        return clip_stride(self.frames, self.stride, self.duration, rate)

    @property
    def length(self) -> int:
        """Frames of the finished clip."""
        return self.frames * self.repeat


class ClipPlan:
    """Draws the clip of every slot.

    `videos`: in which order they come, or only their numbers, which then come in a new permutation each pass over the
    data. `scale` and `aspect` are the ranges of the random resized crop. In place of `stride` the clip spans `duration`
    seconds by the average frame rate, or has `fps` frames/s at the true times of the frames, with `whole_stride` in
    their place at a stride of whole frames that comes near it, see `rate_stride`. With `clips_per_video` n,
    slot s is clip s % n of the video of video slot s // n: the clips of a video come from its n equal segments and have
    boxes and flips of their own. `shapes`, one for all or one a collection of `videos`, take the place of `frames` and
    of what says how far these lie apart. Source: the published sampler and transform (V-JEPA, arXiv 2404.08471,
    appendix).
    """

    def __init__(
        self,
        seed: int,
        videos: np.ndarray | VideoOrder,
        frames: int,
        stride: int,
        scale: tuple[float, float],
        aspect: tuple[float, float],
        flip: bool,
        augmentation: Augmentation = Augmentation(),
        *,
        clips_per_video: int = 1,
        duration: float | None = None,
        fps: float | None = None,
        whole_stride: bool = False,
        shapes: Sequence[ClipShape] = (),
    ) -> None:
        self.seed = seed
        self.order = videos if isinstance(videos, VideoOrder) else VideoOrder(seed, [Collection(videos)])
        self.shapes = tuple(shapes) or (ClipShape(frames, stride, duration, fps, whole_stride=whole_stride),)
        if len(self.shapes) not in (1, len(self.order.collections)):
            raise ValueError(f"{len(self.order.collections)} collections need a shape each, got {len(self.shapes)}")
        self.scale, self.aspect, self.flip = scale, aspect, flip
        self.augmentation = augmentation
        self.clips_per_video = clips_per_video

    def shape(self, video_slot: int) -> ClipShape:
        """Which frames the clips of this video slot have."""
        return self.shapes[0 if len(self.shapes) == 1 else self.order.number(video_slot)]

    def length_of(self, video_slot: int) -> int:
        """Frames of the clips of this video slot."""
        return self.shape(video_slot).length

    def too_short(
        self, length: int, rate: Fraction | None = None, times: np.ndarray | None = None, *, video_slot: int = 0
    ) -> str:
        """Why a video of `length` frames has less than a clip of this slot spans; empty where it has enough."""
        s = self.shape(video_slot)
        if s.by_times and s.fps is not None:
            lasts, spans = length * frame_seconds(known_times(length, times)), s.frames / s.fps
            return f"it lasts {lasts:.3g} s, less than the {spans:.3g} s that a clip spans" * (lasts < spans)
        window = s.frames * s.source_stride(rate)
        count = "1 frame" if length == 1 else f"{length} frames"
        return f"it has {count}, fewer than the {window} that a clip spans" * (length < window)

    def clip(
        self,
        slot: int,
        length: int,
        height: int,
        width: int,
        rate: Fraction | None = None,
        times: np.ndarray | None = None,
    ) -> ClipDraw:
        """What to cut out of a video of `length` frames of `height` x `width` pixels, for the clip at this slot.

        `rate`, frames/s, is needed with a duration or `whole_stride`; `times` of the frames, float64 [length] in s,
        with `fps` alone.
        """
        rng = stream(self.seed, Purpose.CLIP, slot)
        number, clips = slot % self.clips_per_video, self.clips_per_video
        s = self.shape(slot // clips)
        if s.fps is None or s.whole_stride:
            frames = clip_frames(length, s.frames, s.source_stride(rate), rng, clip=number, clips=clips)
        else:
            frames = timed_frames(known_times(length, times), s.frames, s.fps, rng, clip=number, clips=clips)
        if s.repeat > 1:
            frames = np.repeat(frames, s.repeat)
        box = random_box(height, width, self.scale, self.aspect, rng)
        flip = bool(self.flip and rng.random() < 0.5)
        return ClipDraw(frames, box, flip, *self._augmentation(height, width, slot, s.length))

    def _augmentation(
        self, height: int, width: int, slot: int, frames: int
    ) -> tuple[Box | None, Erase | None, tuple[Op, ...] | None]:
        """Second box, erasing and operations: from streams of their own, so that none moves the draws of another."""
        a, end_box, erase, ops = self.augmentation, None, None, None
        if a.motion_shift:
            end_box = random_box(height, width, self.scale, self.aspect, stream(self.seed, Purpose.MOTION, slot))
        if a.erase:
            erase = random_erase(a.erase, a.crop, frames, stream(self.seed, Purpose.ERASE, slot))
        if a.auto_augment:
            ops = draw_ops(stream(self.seed, Purpose.AUGMENT, slot))
        return end_box, erase, ops


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
