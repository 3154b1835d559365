"""Where the clips of a video lie: windows over all of it, or one in the middle. W: windows, T: frames of a clip."""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastjepa.data.decode import VideoError, VideoInfo
from fastjepa.data.frames import (
    clip_frames,
    clip_stride,
    frame_seconds,
    known_times,
    segment_frames,
    shown_frames,
    timed_frames,
    window_frames,
)

MOST_WINDOWS = 1_000_000  # of one video: a hop so small is a mistake
SAME_TIME = 1e-6  # s


@dataclass(frozen=True)
class Hop:
    """From the start of one window to that of the next."""

    value: float
    unit: Literal["frames", "seconds"]

    @classmethod
    def of(cls, text: str | float) -> "Hop":
        """A whole number is source frames, "0.5s" seconds. Errors: ValueError."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s?)", str(text).strip())
        value = float(found[1]) if found else 0.0
        if found is None or not value > 0 or (not found[2] and value != int(value)):
            raise ValueError(
                f"expected a number of source frames, such as 32, or seconds, such as 0.5s, given {text!r}"
            )
        return cls(value, "seconds" if found[2] else "frames")


@dataclass(frozen=True)
class Windows:
    """How a clip of `frames` frames is cut, by `stride`, or in its place by `duration` in s or at `fps` frames/s.

    `hop` None puts windows side by side; the last one ends with the video in any case. `central`: one clip, in the
    middle.
    """

    frames: int
    stride: int
    duration: float | None = None
    fps: float | None = None
    hop: Hop | None = None
    central: bool = False

    def places(self, info: VideoInfo) -> np.ndarray:
        """Where windows begin, float64 [W], W at least 1: source frames, or with `fps` seconds.

        A video that is not longer than a window has one, which repeats its last frame. Errors: VideoError where the
        frame rate is needed and not known, or there are too many windows.
        """
        if self.central:
            return np.zeros(1)
        if self.fps is not None:
            times = self._times(info)
            length, window = float(times[-1] - times[0]) + frame_seconds(times), self.frames / self.fps
        else:
            length, window = float(info.frames), float(self._window(info))
        if length <= window + SAME_TIME:
            return np.zeros(1)
        hop, last = self._hop(info, window), length - window
        if last / hop > MOST_WINDOWS:
            raise VideoError(f"it has {last / hop:,.0f} windows, more than {MOST_WINDOWS:,}", info.path)
        places = np.arange(int(np.floor((last + SAME_TIME) / hop)) + 1) * hop
        return places if last - places[-1] <= SAME_TIME else np.append(places, last)

    def numbers(self, info: VideoInfo, place: float) -> np.ndarray:
        """Source frames of the window at this place, int64 [T]. Errors: VideoError."""
        if self.fps is not None:
            times = self._times(info)
            if self.central:
                return timed_frames(times, self.frames, self.fps, rng=None)
            return shown_frames(times, float(times[0]) + place, self.frames, self.fps)
        stride, window = self._window(info) // self.frames, self._window(info)
        if self.central:
            return clip_frames(info.frames, self.frames, stride, rng=None)
        if info.frames <= window:
            return segment_frames(info.frames, self.frames, stride, None)
        return window_frames(round(place), self.frames, window)

    def _window(self, info: VideoInfo) -> int:
        if self.duration is not None and info.rate is None:
            raise VideoError("its frame rate is not known, and a clip in seconds needs it", info.path)
        return self.frames * clip_stride(self.frames, self.stride, self.duration, info.rate)

    def _hop(self, info: VideoInfo, window: float) -> float:
        if self.hop is None:
            return window
        if (self.hop.unit == "seconds") == (self.fps is not None):
            return self.hop.value
        if self.fps is not None:
            return self.hop.value * frame_seconds(self._times(info))
        if info.rate is None:
            raise VideoError("its frame rate is not known, and windows every so many seconds need it", info.path)
        return float(max(1, round(self.hop.value * info.rate)))

    @staticmethod
    def _times(info: VideoInfo) -> np.ndarray:
        try:
            return known_times(info.frames, info.times)
        except ValueError:
            raise VideoError("its frame rate is not known, and frames per second need it", info.path) from None


def seconds_of(info: VideoInfo, frame: int) -> float:
    """When a frame is shown, in s from the first one on; NaN where nothing tells."""
    return float("nan") if info.times is None else float(info.times[frame])
