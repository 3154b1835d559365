"""Which frames of a video a clip has: the published rule by a stride, and that by frames per second."""

from fractions import Fraction
from math import ceil
from typing import Literal

import numpy as np


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


def rate_stride(fps: float, rate: Fraction | float | None) -> int:
    """Source frames from one frame of a clip to the next for about `fps` frames/s, by the average rate in frames/s.

    The rule of the public V-JEPA 2, ceil(rate) // fps: clips of a video at 30 frames/s have 4.29 of them at `fps` 4. At
    least 1: the public code fails on a video with fewer frames/s than are asked for. Errors: ValueError without a rate.
    """
    if rate is None:
        raise ValueError(f"the stride of a clip at {fps:g} frames/s follows from the frame rate, which is not known")
    return max(1, int(ceil(rate) // fps))


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


def timed_frames(
    times: np.ndarray, frames: int, fps: float, rng: np.random.Generator | None, *, clip: int = 0, clips: int = 1
) -> np.ndarray:
    """Frame numbers int64 [frames] of clip number `clip` of `clips`: what is shown every 1 / fps seconds.

    `times`: float64 [n], ascending, when each frame is shown, in s; the last is shown as long as frames are on average.
    The clip begins at a random time of its equal part of the video, or with rng None in the middle of what is free;
    where the part is too short it begins with it, and past the end of the video the last frame is repeated. Errors:
    ValueError for counts below 1, a rate that is not positive or a clip number outside 0..clips-1.
    """
    if min(len(times), frames, clips) < 1 or not fps > 0 or not 0 <= clip < clips:
        raise ValueError(f"no clip {clip} of {clips} with {frames} frames at {fps} frames/s in {len(times)} frames")
    part = (times[-1] - times[0] + frame_seconds(times)) / clips
    free = max(0.0, part - frames / fps)
    start = times[0] + part * clip + free * (0.5 if rng is None else rng.random())
    return shown_frames(times, start, frames, fps)


def shown_frames(times: np.ndarray, start: float, frames: int, fps: float) -> np.ndarray:
    """Frame numbers int64 [frames]: what is shown at `start` and every 1 / fps seconds from there."""
    # The tolerance, a microsecond, is for times that fall on a frame and are rounded below it.
    shown = np.searchsorted(times, start + np.arange(frames) / fps + 1e-6, side="right") - 1
    return np.maximum(shown, 0).astype(np.int64)


def window_frames(start: int, frames: int, window: int) -> np.ndarray:
    """Frame numbers int64 [frames], spread over the `window` source frames from `start` on: the first and the last too.

    The published rule for a window that lies inside of a video.
    """
    end = start + window
    return np.clip(np.linspace(start, end, frames), start, end - 1).astype(np.int64)


def known_times(length: int, times: np.ndarray | None) -> np.ndarray:
    """The times of all frames. Errors: ValueError where they are not known."""
    if times is None or len(times) != length:
        raise ValueError("frames per second can be taken only where the times of the frames are known")
    return times


def frame_seconds(times: np.ndarray) -> float:
    """Seconds that a frame is shown, on average; 0 for a single one."""
    return float(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


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
        return window_frames(end - window, frames, window) + clip * room
    if end is not None:
        raise ValueError(f"a segment of {room} frames has no place for a window of {window} that ends at {end}")
    last = min(window, length) - 1 if overlap else room
    if last < 1:
        return np.full(frames, clip * length // clips, dtype=np.int64)
    points = last // stride
    spread = np.concatenate([np.linspace(0, last, points), np.full(frames - points, last)])
    step = room if not overlap else (length - window) // (clips - 1) if length > window else 0
    return np.clip(spread, 0, last - 1).astype(np.int64) + clip * step
