"""Which videos are probed, how their clips are cut, and what a classifier gets to see of them.

A row is one view of a video: its S segments (clips of one place in the frame, in time order), which the classifier sees
together. A video that is learned from is one row; others have V rows, a view each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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
from fastjepa.data.views import views
from fastjepa.models import ClipAggregation
from fastjepa.probe.tokens import TokenFile

# A probe of more takes hours on a large collection and tells nothing new.
MOST_VIDEOS = 2000
BATCH = 16  # clips in one pass of the encoder
LEARNED = "train"  # the split that classifiers learn from

Progress = Callable[[int, int], None]


class ProbeStopped(RuntimeError):
    """The run was asked to end while it was probing."""


@dataclass(frozen=True)
class Cut:
    """How clips are cut out for evaluation: frames and stride, side in pixels; seconds or frames/s in its place.

    `segments` clips are spread over a video. Of validation and test videos `views` squares are evaluated. Source: the
    frozen evaluation of V-JEPA (arXiv 2404.08471, appendix), without its random draws, so that features can be kept.
    """

    frames: int
    stride: int
    crop: int
    duration: float | None = None
    fps: float | None = None
    segments: int = 1
    views: int = 1

    def numbers(self, info: VideoInfo, segment: int = 0) -> np.ndarray:
        """int64 [frames]: those in the middle of a segment; the windows of segments too short for them overlap.

        Errors: ValueError where the rate is needed and not known.
        """
        if self.fps is not None:
            times = known_times(info.frames, info.times)
            return timed_frames(times, self.frames, self.fps, rng=None, clip=segment, clips=self.segments)
        stride = clip_stride(self.frames, self.stride, self.duration, info.rate)
        overlap = self.segments > 1
        return clip_frames(
            info.frames, self.frames, stride, rng=None, clip=segment, clips=self.segments, overlap=overlap
        )

    def rows(self, info: VideoInfo, frames: np.ndarray, count: int) -> list[Tensor]:
        """`count` views of frames uint8 [S * T, H, W, 3]: float32 [S, C, T, crop, crop] each.

        One view is the central square, several are the published ones: squares side by side along the longer side.
        """
        if info.still:  # one picture stands for all frames
            frames = frames[:1]
        if count == 1:
            found = [cut(frames, central_box(info.height, info.width), False, self.crop)]
        else:
            found = views(frames, self.crop, count)
        if info.still:
            found = [view.expand(-1, self.segments * self.frames, -1, -1) for view in found]
        return [view.unflatten(1, (self.segments, self.frames)).transpose(0, 1) for view in found]


def members_of(videos: Videos, most: int = MOST_VIDEOS) -> dict[str, np.ndarray]:
    """The video numbers of each split that are probed: at most about `most` in all, the same share of every split."""
    # The splits are in random order, so their first parts are a fair draw.
    share = min(1.0, most / max(1, sum(len(split) for split in videos.splits.values())))
    return {name: split[: int(np.ceil(share * len(split)))] for name, split in videos.splits.items()}


def rows_of(members: dict[str, np.ndarray], numbers: list[int]) -> dict[str, Tensor]:
    """For each split the rows of its videos, int64 [M, V]; `numbers` are the videos of all rows, of a video together.

    Videos without rows are left out. Empty where too few are left to learn from two, to choose on one and to test on
    one.
    """
    place: dict[int, list[int]] = {}
    for row, video in enumerate(numbers):
        place.setdefault(video, []).append(row)
    rows = {name: torch.tensor([place[v] for v in split if v in place]) for name, split in members.items()}
    enough = len(rows["train"]) >= 2 and len(rows["validation"]) and len(rows["test"])
    return rows if enough else {}


def read_clips(
    members: dict[str, np.ndarray],
    reader: Reader,
    cut_out: Cut,
    stopped: Callable[[], bool],
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of (video number of each row, clips float32 [R * S, C, T, H, W]), in the order of the video numbers.

    Unreadable videos are left out. `progress` is told (videos done, videos). Errors: ProbeStopped, asked before each
    batch is given out.
    """
    numbers: list[int] = []
    rows: list[Tensor] = []
    learned = set(members.get(LEARNED, np.empty(0, np.int64)).tolist())
    every = sorted(np.concatenate(list(members.values())).tolist())
    most = max(1, BATCH // cut_out.segments)
    for done, video in enumerate(every, start=1):
        try:
            info = reader.info(video)
            wanted = np.concatenate([cut_out.numbers(info, segment) for segment in range(cut_out.segments)])
            frames = reader.read(video, wanted)  # one read for all segments: a video is decoded once
        except VideoError:
            continue  # named in bad_files.jsonl when pretraining meets it; a probe of the rest is still a probe
        for row in cut_out.rows(info, frames, 1 if video in learned else cut_out.views):
            numbers.append(video)
            rows.append(row)
            if len(rows) == most:
                yield _unless(stopped, numbers, rows)
                numbers, rows = [], []
        if progress is not None:
            progress(done, len(every))
    if rows:
        yield _unless(stopped, numbers, rows)


def _unless(stopped: Callable[[], bool], numbers: list[int], rows: list[Tensor]) -> tuple[list[int], Tensor]:
    if stopped():
        raise ProbeStopped
    return numbers, torch.cat(rows)


@dataclass
class Seen:
    """What was kept of every row: its video, the mean of its tokens float32 [R, E], a coarse copy of its pixels."""

    numbers: list[int] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def encode(
    encoder: nn.Module,
    members: dict[str, np.ndarray],
    reader: Reader,
    cut_out: Cut,
    stopped: Callable[[], bool],
    *,
    tokens: TokenFile | None = None,
    pixels: bool = True,
    progress: Progress | None = None,
) -> Seen:
    """Run the encoder, [B, C, T, H, W] -> [B, N, E] on its own device, over the clips of all members.

    The tokens of a row, those of its segments one after another, go into `tokens` where it is given. Errors:
    ProbeStopped; OSError where the disk is full.
    """
    seen, segments = Seen(), cut_out.segments
    device = next(encoder.parameters()).device
    joined = ClipAggregation(encoder, attend_across_segments=True)
    for numbers, clips in read_clips(members, reader, cut_out, stopped, progress):
        seen.numbers += numbers
        if pixels:
            seen.pixels.append(coarse_pixels(clips).unflatten(0, (-1, segments)).mean(dim=1))
        parts = clips.unflatten(0, (-1, segments)).unbind(dim=1)
        (x,) = joined([[part.to(device)] for part in parts])
        seen.means.append(x.float().mean(dim=1).cpu())
        if tokens is not None:
            tokens.append(x)
    return seen


def coarse_pixels(clips: Tensor) -> Tensor:
    """A coarse copy of the clip, 4 x 12 x 12 x 3 values: what a linear classifier gets without any features."""
    size = (min(4, clips.shape[2]), 12, 12)
    return F.adaptive_avg_pool3d(clips, size).flatten(1)


def majority_accuracy(labels: Tensor, rows: dict[str, Tensor]) -> float:
    """Chance: the accuracy on test of always saying the most frequent class of train; `labels` are those of rows."""
    majority = torch.bincount(labels[rows["train"][:, 0]]).argmax()
    return (labels[rows["test"][:, 0]] == majority).double().mean().item()
