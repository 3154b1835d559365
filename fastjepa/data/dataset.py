"""Slots to clips: decode, cut, and replace what cannot be read or is too short."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from fastjepa.data.decode import VideoError, VideoInfo
from fastjepa.data.media import probe, read_frames
from fastjepa.data.replaced import TooManyBadFiles
from fastjepa.data.sampling import ClipDraw, ClipPlan
from fastjepa.data.transforms import transform

RANDOM_REPLACEMENTS = 16
INFOS_KEPT = 20_000


@dataclass
class Sample:
    """The clips of one video, [C, T, H, W] each: uint8, or normalised float32 in a run that erases; its video slot.

    `bad` are the files that could not be read on the way to it, `short` those that were passed over for their length:
    (path, reason) pairs.
    """

    clips: list[Tensor]
    slot: int
    bad: list[tuple[str, str]]
    short: list[tuple[str, str]]


class Reader:
    """Decodes videos of a list. Remembers what a probe said, and keeps whole decoded videos up to `cache_bytes`.

    Videos of fewer than `least_frames` frames, or with `need_rate` of unknown frame rate, count as unreadable; a single
    image is exempt from the first.
    """

    def __init__(self, paths: list[str], least_frames: int, cache_bytes: int = 0, *, need_rate: bool = False) -> None:
        self.paths, self.least_frames, self.need_rate = paths, least_frames, need_rate
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
        if info.frames < self.least_frames and not info.still:
            frames = "1 frame" if info.frames == 1 else f"{info.frames} frames"
            return f"it has {frames}, fewer than one tubelet of {self.least_frames}"
        if self.need_rate and info.rate is None:
            return "its frame rate is not known, and data.duration needs it"
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
    """The clips of every video slot. A video that cannot be used is replaced by another, chosen by the slot alone.

    That is one that cannot be read, or with `filter_short` one of fewer frames than a clip spans. Clips are uint8,
    rounded to grey levels; where `plan` erases, all of them are normalised float32.
    """

    def __init__(self, reader: Reader, plan: ClipPlan, crop: int, *, filter_short: bool = False) -> None:
        self.reader, self.plan, self.crop, self.filter_short = reader, plan, crop, filter_short
        # One dtype for a whole run: clips of a batch are stacked.
        self.floats = plan.augmentation.erase > 0

    def __getitem__(self, slot: int) -> Sample:
        """The sample of a video slot. Errors: TooManyBadFiles where no video at all can be used."""
        clips = self.plan.clips_per_video
        bad: list[tuple[str, str]] = []
        short: list[tuple[str, str]] = []
        tried: set[int] = set()
        for video in self._candidates(slot):
            if video in tried:
                continue
            tried.add(video)
            try:
                info = self.reader.info(video)
                window = self.plan.window(info.rate)
                if self.filter_short and info.frames < window:
                    reason = f"it has {info.frames} frames, fewer than the {window} that a clip spans"
                    short.append((self.reader.paths[video], reason))
                    continue
                draws: list[ClipDraw] = [
                    self.plan.clip(number, info.frames, info.height, info.width, info.rate)
                    for number in range(slot * clips, (slot + 1) * clips)
                ]
                # One read for all clips: a video is decoded once.
                frames = self.reader.read(video, np.concatenate([draw.frames for draw in draws]))
            except VideoError as error:
                bad.append((self.reader.paths[video], str(error)))
                continue
            parts = np.split(frames, clips)
            cuts = [transform(part, draw, self.crop, floats=self.floats) for part, draw in zip(parts, draws)]
            return Sample(cuts, slot, bad, short)
        raise TooManyBadFiles(self._nothing_left(bad, short))

    def _nothing_left(self, bad: list[tuple[str, str]], short: list[tuple[str, str]]) -> str:
        """The sentence for a list of which no video can be used."""
        total = len(self.plan.videos)
        reasons = Counter(reason for _, reason in bad).most_common(3)
        shown = "; ".join(f"{count} times: {reason}" for reason, count in reasons)
        if not short:
            return f"none of the {total} files can be read, {bad[-1][0]} among them ({shown})"
        unreadable = f"; {len(bad)} cannot be read ({shown})" if bad else ""
        return (
            f"none of the {total} files is long enough for data.filter_short: {len(short)} are too short, "
            f"{short[-1][0]} among them ({short[-1][1]}){unreadable}"
        )

    def _candidates(self, slot: int) -> Iterator[int]:
        yield self.plan.video(slot)
        for attempt in range(RANDOM_REPLACEMENTS):
            yield self.plan.replacement(slot, attempt)
        # Where most are too short this is reached often: one order for all slots would wear out a few videos.
        yield from self.plan.all_replacements(slot, RANDOM_REPLACEMENTS)
