"""Slots to clips: decode, cut, and replace what cannot be read or is too short."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from fastjepa.data.decode import VideoError, VideoInfo
from fastjepa.data.decoders.encoded import EncodedClip
from fastjepa.data.excerpt import excerpt
from fastjepa.data.indexfile import Entry
from fastjepa.data.media import probe, read_frames, status
from fastjepa.data.replaced import TooManyBadFiles
from fastjepa.data.sampling import ClipDraw, ClipPlan
from fastjepa.data.transforms import transform

RANDOM_REPLACEMENTS = 16
INFOS_KEPT = 20_000
# A disk in the network may fail once; what fails twice is not tried again.
CHANCES = 2

Read = Callable[[VideoInfo, np.ndarray], np.ndarray]
Hold = Callable[[int, int], AbstractContextManager[None]]
Clip = TypeVar("Clip", Tensor, Tensor | EncodedClip, covariant=True)


@dataclass
class Sample(Generic[Clip]):
    """The clips of one video, and its video slot.

    `clips`: [C, T, H, W] each, uint8, or normalised float32 in a run that erases; or still encoded, for a decoder that
    takes whole batches. `bad` are the files that could not be read on the way to it, `short` those that were passed
    over for their length: (path, reason) pairs.
    """

    clips: Sequence[Clip]
    slot: int
    bad: list[tuple[str, str]]
    short: list[tuple[str, str]]


class Reader:
    """Decodes videos of a list with `read`. Keeps what a probe said, and whole decoded videos up to `cache_bytes`.

    Videos of fewer than `least_frames` frames (a single image is exempt), or of unknown frame rate where the setting
    `needs_rate` needs it, count as unreadable. `frame_rate`: that of videos which do not say it, frames/s. `known`:
    entries of an index, one a video: what those call unreadable is not opened.
    """

    def __init__(
        self,
        paths: list[str],
        least_frames: int,
        cache_bytes: int = 0,
        *,
        needs_rate: str = "",
        frame_rate: float | None = None,
        read: Read = read_frames,
        known: Sequence[Entry] | None = None,
    ) -> None:
        self.paths, self.least_frames, self.needs_rate = paths, least_frames, needs_rate
        self.frame_rate = None if frame_rate is None else Fraction(frame_rate)
        self.cache_bytes, self.read_frames, self.known = cache_bytes, read, known
        self._infos: OrderedDict[int, VideoInfo] = OrderedDict()
        # Of a bad file the reason is kept, not the error: raised again and again, that would keep the clips of every
        # function it passed through.
        self._failures: dict[int, tuple[int, str]] = {}
        self._decoded: dict[int, np.ndarray] = {}
        self._decoded_bytes = 0

    def info(self, video: int) -> VideoInfo:
        """What is known of a video. Errors: VideoError where it cannot be read or is shorter than a tubelet."""
        self._refuse_quarantined(video)
        if video not in self._infos:
            try:
                if self.known is not None and (reason := self.known[video].reason) is not None:
                    raise VideoError(reason, self.paths[video])
                self._infos[video] = self._usable(probe(self.paths[video]))
            except VideoError as error:
                raise self._failed(video, str(error)) from None
            if len(self._infos) > INFOS_KEPT:
                self._infos.popitem(last=False)
        return self._infos[video]

    def remember(self, video: int, info: VideoInfo) -> None:
        """Take what `info` has said of this video in another process, as far as there is room."""
        if len(self._infos) < INFOS_KEPT:
            self._infos[video] = info

    def excerpt(self, video: int, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """As `excerpt`. Errors: VideoError, also where the file is not the one that was indexed."""
        assert self.known is not None, "only an index tells what a batch decoder takes"
        info = self.info(video)
        try:
            if status(info.path)[0] != self.known[video].size:
                raise VideoError("it has changed since the index was made", info.path)
            return excerpt(info, frames)
        except VideoError as error:
            raise self._failed(video, str(error)) from None

    def _usable(self, info: VideoInfo) -> VideoInfo:
        if info.still:
            return replace(info, rate=self.frame_rate or Fraction(1))  # of one frame any rate is true
        if info.frames < self.least_frames:
            frames = "1 frame" if info.frames == 1 else f"{info.frames} frames"
            raise VideoError(f"it has {frames}, fewer than one tubelet of {self.least_frames}", info.path)
        if info.rate is None and self.frame_rate is not None:
            info = replace(info, rate=self.frame_rate)
        if self.needs_rate and (info.times if self.needs_rate == "data.fps" else info.rate) is None:
            raise VideoError(f"its frame rate is not known, and {self.needs_rate} needs it", info.path)
        return info

    def give_up(self, video: int, reason: str) -> None:
        """Refuse this video from now on, without opening it."""
        self._infos.pop(video, None)
        self._failures[video] = CHANCES, reason

    def _refuse_quarantined(self, video: int) -> None:
        failures, reason = self._failures.get(video, (0, ""))
        if failures >= CHANCES:
            raise VideoError(reason, self.paths[video])

    def _failed(self, video: int, reason: str) -> VideoError:
        self._infos.pop(video, None)  # the file may be another by now
        self._failures[video] = (self._failures.get(video, (0, ""))[0] + 1, reason)
        return VideoError(reason, self.paths[video])

    def read(self, video: int, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3]. Errors: VideoError."""
        info = self.info(video)
        if video in self._decoded:
            return self._decoded[video][frames]
        size = info.frames * info.height * info.width * 3
        try:
            if self._decoded_bytes + size > self.cache_bytes:
                return self.read_frames(info, frames)
            self._decoded[video] = self.read_frames(info, np.arange(info.frames))
        except VideoError as error:
            raise self._failed(video, str(error)) from None
        self._decoded_bytes += size
        return self._decoded[video][frames]


class ClipDataset(Dataset[Sample[Tensor | EncodedClip]]):
    """The clips of every video slot. A video that cannot be used is replaced by another, chosen by the slot alone.

    That is one that cannot be read, or with `filter_short` one of fewer frames than a clip spans. Clips are uint8,
    rounded to grey levels; where `plan` erases, all of them are normalised float32. `encoded`: bool [videos], those
    whose clips are planned here and decoded elsewhere. `antialias`: see `transform`. `hold`: the context, by video and
    slot, in which a video is opened and decoded; it may refuse one with a VideoError (see `guard.Guard`).
    """

    def __init__(
        self,
        reader: Reader,
        plan: ClipPlan,
        crop: int,
        *,
        filter_short: bool = False,
        antialias: bool = False,
        encoded: np.ndarray | None = None,
    ) -> None:
        self.reader, self.plan, self.crop, self.filter_short = reader, plan, crop, filter_short
        self.antialias, self.encoded = antialias, encoded
        self.hold: Hold = lambda video, slot: nullcontext()
        # One dtype for a whole run: clips of a batch are stacked.
        self.floats = plan.augmentation.erase > 0

    def __getitem__(self, slot: int) -> Sample[Tensor | EncodedClip]:
        """The sample of a video slot. Errors: TooManyBadFiles where no video at all can be used."""
        return self._sample(slot, self._decoded if self.encoded is None else self._encoded)

    def decoded(self, slot: int) -> Sample[Tensor]:
        """The same, decoded here in any case."""
        return self._sample(slot, self._decoded)

    def _sample(self, slot: int, clips_of: Callable[[int, int], Sequence[Clip]]) -> Sample[Clip]:
        bad: list[tuple[str, str]] = []
        short: list[tuple[str, str]] = []
        tried: set[int] = set()
        for video in self._candidates(slot):
            if video in tried:
                continue
            tried.add(video)
            try:
                with self.hold(video, slot):
                    return Sample(clips_of(video, slot), slot, bad, short)
            except _TooShort as error:
                short.append((self.reader.paths[video], str(error)))
            except VideoError as error:
                bad.append((self.reader.paths[video], str(error)))
        raise TooManyBadFiles(self._nothing_left(bad, short))

    def _decoded(self, video: int, slot: int) -> list[Tensor]:
        info = self.reader.info(video)
        draws = self._draws(info, slot)
        if info.still and not self.floats and all(draw.end_box is None for draw in draws):
            # One picture is cut once and stands for all frames.
            (picture,) = self.reader.read(video, np.zeros(1, np.int64))[:1]
            pictures = [transform(picture[None], draw, self.crop, antialias=self.antialias) for draw in draws]
            return [one.repeat(1, len(draws[0].frames), 1, 1) for one in pictures]
        # One read for all clips: a video is decoded once.
        frames = self.reader.read(video, np.concatenate([draw.frames for draw in draws]))
        parts = np.split(frames, len(draws))
        return [
            transform(part, draw, self.crop, floats=self.floats, antialias=self.antialias)
            for part, draw in zip(parts, draws)
        ]

    def _encoded(self, video: int, slot: int) -> Sequence[Tensor | EncodedClip]:
        assert self.encoded is not None, "a data set without encoded videos does not come here"
        if not self.encoded[video]:
            return self._decoded(video, slot)
        info = self.reader.info(video)
        clips = []
        for draw in self._draws(info, slot):
            found = self.reader.excerpt(video, draw.frames)
            if found is None:
                return self._decoded(video, slot)
            clips.append(EncodedClip(info.path, *found, draw.box, draw.flip, info.height, info.width, info.rotation))
        return clips

    def _draws(self, info: VideoInfo, slot: int) -> list[ClipDraw]:
        """What to cut out of this video. Errors: _TooShort, and VideoError where a rate is needed and not known."""
        shape = self.plan.shape(slot)
        times = info.times if shape.by_times else None
        for key, needs, known in (
            ("data.duration", shape.duration is not None, info.rate),
            ("compat.fps_whole_stride", shape.fps is not None and shape.whole_stride, info.rate),
            ("data.fps", shape.by_times, times),
        ):
            if needs and known is None:
                raise VideoError(f"its frame rate is not known, and {key} needs it", info.path)
        if self.filter_short and not info.still:
            reason = self.plan.too_short(info.frames, info.rate, times, video_slot=slot)
            if reason:
                raise _TooShort(reason)
        clips = self.plan.clips_per_video
        return [
            self.plan.clip(number, info.frames, info.height, info.width, info.rate, times)
            for number in range(slot * clips, (slot + 1) * clips)
        ]

    def _nothing_left(self, bad: list[tuple[str, str]], short: list[tuple[str, str]]) -> str:
        """The sentence for a list of which no video can be used."""
        total = len(self.plan.order.videos)
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
        order = self.plan.order
        yield order.video(slot)
        for attempt in range(RANDOM_REPLACEMENTS):
            yield order.replacement(slot, attempt)
        # Where most are too short this is reached often: one order for all slots would wear out a few videos.
        yield from order.all_replacements(slot, RANDOM_REPLACEMENTS)


class _TooShort(Exception):
    """A video that is passed over for its length; the text says why."""
