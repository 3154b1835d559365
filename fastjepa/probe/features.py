"""Which videos are probed, how their clips are cut, and what a classifier gets to see of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.data.dataset import Reader
from fastjepa.data.decode import VideoError, VideoInfo
from fastjepa.data.frames import clip_frames, clip_stride, known_times, timed_frames
from fastjepa.data.sampling import central_box
from fastjepa.data.source import Videos
from fastjepa.data.transforms import cut

# A probe of more takes hours on a large collection and tells nothing new.
MOST_VIDEOS = 2000
BATCH = 16


class ProbeStopped(RuntimeError):
    """The run was asked to end while it was probing."""


@dataclass(frozen=True)
class Cut:
    """How a clip is cut out for evaluation: frames and stride, side in pixels; seconds or frames/s in its place."""

    frames: int
    stride: int
    crop: int
    duration: float | None = None
    fps: float | None = None

    def numbers(self, info: VideoInfo) -> np.ndarray:
        """int64 [frames]: those in the middle of a video. Errors: ValueError where its rate is needed and not known."""
        if self.fps is not None:
            return timed_frames(known_times(info.frames, info.times), self.frames, self.fps, rng=None)
        return clip_frames(
            info.frames, self.frames, clip_stride(self.frames, self.stride, self.duration, info.rate), rng=None
        )


def members_of(videos: Videos, most: int = MOST_VIDEOS) -> dict[str, np.ndarray]:
    """The video numbers of each split that are probed: at most about `most` in all, the same share of every split."""
    # The splits are in random order, so their first parts are a fair draw.
    share = min(1.0, most / max(1, sum(len(split) for split in videos.splits.values())))
    return {name: split[: int(np.ceil(share * len(split)))] for name, split in videos.splits.items()}


def rows_of(members: dict[str, np.ndarray], numbers: list[int]) -> dict[str, Tensor]:
    """For each split the int64 places of its videos in `numbers`; those that are not in there are left out.

    Empty where too few are left to learn from two, to choose on one and to test on one.
    """
    place = {video: row for row, video in enumerate(numbers)}
    rows = {name: torch.tensor([place[v] for v in split if v in place]) for name, split in members.items()}
    enough = len(rows["train"]) >= 2 and len(rows["validation"]) and len(rows["test"])
    return rows if enough else {}


def read_clips(
    members: dict[str, np.ndarray], reader: Reader, cut_out: Cut, stopped: Callable[[], bool]
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of (video numbers, clips float32 [B, C, T, H, W]): the middle of the video, the centre of the frame.

    Unreadable videos are left out. Errors: ProbeStopped, asked before each batch is given out.
    """
    numbers: list[int] = []
    clips: list[Tensor] = []
    for video in sorted(np.concatenate(list(members.values())).tolist()):
        try:
            info = reader.info(video)
            frames = reader.read(video, cut_out.numbers(info))
        except VideoError:
            continue  # named in bad_files.jsonl when pretraining meets it; a probe of the rest is still a probe
        numbers.append(video)
        clips.append(cut(frames, central_box(info.height, info.width), False, cut_out.crop))
        if len(clips) == BATCH:
            yield _unless(stopped, numbers, clips)
            numbers, clips = [], []
    if clips:
        yield _unless(stopped, numbers, clips)


def _unless(stopped: Callable[[], bool], numbers: list[int], clips: list[Tensor]) -> tuple[list[int], Tensor]:
    if stopped():
        raise ProbeStopped
    return numbers, torch.stack(clips)


@torch.no_grad()
def mean_tokens(encoder: nn.Module, clips: Tensor) -> Tensor:
    """The mean over the tokens, float32 [B, E] on the CPU."""
    return encoder(clips).float().mean(dim=1).cpu()


def coarse_pixels(clips: Tensor) -> Tensor:
    """A coarse copy of the clip, 4 x 12 x 12 x 3 values: what a linear classifier gets without any features."""
    size = (min(4, clips.shape[2]), 12, 12)
    return F.adaptive_avg_pool3d(clips, size).flatten(1)


def majority_accuracy(labels: Tensor, rows: dict[str, Tensor]) -> float:
    """Chance: the accuracy on test of always saying the most frequent class of train."""
    majority = torch.bincount(labels[rows["train"]]).argmax()
    return (labels[rows["test"]] == majority).double().mean().item()
