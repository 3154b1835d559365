"""How many clips a second one process of this machine makes of some videos: decoded, cropped, resized."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from fastjepa.data.decode import VideoError, VideoInfo
from fastjepa.data.media import probe, read_frames
from fastjepa.data.processes import Lost, each_apart
from fastjepa.data.sampling import ClipPlan
from fastjepa.data.transforms import transform

MOST_VIDEOS = 32
# Probing and the clip that warms up are not counted; with them a measurement takes this many times its length at most.
PATIENCE = 5
HANGING = 60.0


@dataclass(frozen=True)
class Pace:
    """`clips` of `videos` different videos took so many `seconds` of one process with one thread."""

    clips: int
    videos: int
    seconds: float

    @property
    def rate(self) -> float:
        """Clips/s of one process."""
        return self.clips / self.seconds


def measure_pace(paths: list[str], frames: int, stride: int, crop: int, seconds: float) -> Pace | str:
    """Make random clips of evenly chosen videos, as a run does, for so many seconds; or the reason why there are none.

    This happens in a process of its own: a file that could be opened may still crash the decoder further on.
    """
    chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, MOST_VIDEOS).astype(int))]
    job = (chosen, frames, stride, crop, seconds)
    (answer,) = [answer for _, answer in each_apart(_make_clips, [job], 1, lambda _: PATIENCE * seconds + HANGING)]
    if isinstance(answer, Lost):
        return answer.reason
    return answer if answer.clips else "no clip could be decoded"


def _make_clips(job: tuple[list[str], int, int, int, float]) -> Pace:
    paths, frames, stride, crop, seconds = job
    torch.set_num_threads(1)  # as in a process of the loader
    plan = ClipPlan(0, np.arange(len(paths)), frames, stride, (0.3, 1.0), (0.75, 1.35), True)
    infos: dict[str, VideoInfo] = {}
    failed: set[str] = set()
    clips, slot, spent = -1, 0, 0.0  # the first clip pays for what is loaded on demand
    seen: set[str] = set()
    begun = time.perf_counter()
    while spent < seconds and len(failed) < len(paths):
        if clips > 0 and time.perf_counter() - begun > PATIENCE * seconds:
            break
        path = paths[slot % len(paths)]
        slot += 1
        if path in failed:
            continue
        try:
            info = infos[path] = infos.get(path) or probe(path)
            start = time.perf_counter()
            draw = plan.clip(slot, info.frames, info.height, info.width)
            transform(read_frames(info, draw.frames), draw, crop)
        except VideoError:
            failed.add(path)
            continue
        clips += 1
        if clips:
            spent += time.perf_counter() - start
            seen.add(path)
    return Pace(max(0, clips), len(seen), spent)
