"""Slots to clips: decode, cut, and replace what cannot be read."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from fastjepa.data.badfiles import TooManyBadFiles
from fastjepa.data.decode import VideoError, VideoInfo, probe, read_frames
from fastjepa.data.sampling import ClipDraw, ClipPlan
from fastjepa.data.transforms import transform

RANDOM_REPLACEMENTS = 16
INFOS_KEPT = 20_000


@dataclass
class Sample:
    """One clip: normalised float32 [C, T, H, W], its slot, and the files that could not be read on the way to it."""

    clip: Tensor
    slot: int
    bad: list[tuple[str, str]]


class Reader:
    """Decodes videos of a list. Remembers what a probe said, and keeps whole decoded videos up to `cache_bytes`."""

    def __init__(self, paths: list[str], least_frames: int, cache_bytes: int = 0) -> None:
        self.paths, self.least_frames = paths, least_frames
        self.cache_bytes = cache_bytes
        # Of a bad file the reason is kept, not the error: raised again and again, that would keep the clips of every
        # function it passed through.
        self._infos: OrderedDict[int, VideoInfo | str] = OrderedDict()
        self._decoded: dict[int, np.ndarray] = {}
        self._decoded_bytes = 0

    def info(self, video: int) -> VideoInfo:
        """What is known of a video. Errors: VideoError where it cannot be read or is shorter than a tubelet."""
        if video not in self._infos:
            self._infos[video] = self._probe(video)
            if len(self._infos) > INFOS_KEPT:
                self._infos.popitem(last=False)
        known = self._infos[video]
        if isinstance(known, str):
            raise VideoError(known, self.paths[video])
        return known

    def _probe(self, video: int) -> VideoInfo | str:
        try:
            info = probe(self.paths[video])
        except VideoError as error:
            return str(error)
        if info.frames < self.least_frames:
            frames = "1 frame" if info.frames == 1 else f"{info.frames} frames"
            return f"it has {frames}, fewer than one tubelet of {self.least_frames}"
        return info

    def read(self, video: int, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3]. Errors: VideoError."""
        info = self.info(video)
        if video in self._decoded:
            return self._decoded[video][frames]
        size = info.frames * info.height * info.width * 3
        if self._decoded_bytes + size > self.cache_bytes:
            return read_frames(info, frames)
        self._decoded[video] = read_frames(info, np.arange(info.frames))
        self._decoded_bytes += size
        return self._decoded[video][frames]


class ClipDataset(Dataset[Sample]):
    """The clip of every slot. A video that cannot be read is replaced by another, chosen by the slot alone."""

    def __init__(self, reader: Reader, plan: ClipPlan, crop: int) -> None:
        self.reader, self.plan, self.crop = reader, plan, crop

    def __getitem__(self, slot: int) -> Sample:
        """The sample of a slot. Errors: TooManyBadFiles where no video at all can be read."""
        bad: list[tuple[str, str]] = []
        tried: set[int] = set()
        for video in self._candidates(slot):
            if video in tried:
                continue
            tried.add(video)
            try:
                info = self.reader.info(video)
                draw: ClipDraw = self.plan.clip(slot, info.frames, info.height, info.width)
                frames = self.reader.read(video, draw.frames)
            except VideoError as error:
                bad.append((self.reader.paths[video], str(error)))
                continue
            return Sample(transform(frames, draw, self.crop), slot, bad)
        reasons = Counter(reason for _, reason in bad).most_common(3)
        shown = "; ".join(f"{count} times: {reason}" for reason, count in reasons)
        raise TooManyBadFiles(
            f"none of the {len(self.plan.videos)} files can be read, {bad[-1][0]} among them ({shown})"
        )

    def _candidates(self, slot: int) -> Iterator[int]:
        yield self.plan.video(slot)
        for attempt in range(RANDOM_REPLACEMENTS):
            yield self.plan.replacement(slot, attempt)
        yield from (int(video) for video in self.plan.videos)
