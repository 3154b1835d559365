"""Videos to clips, ahead of the encoder: first every file is looked at, then windows are decoded, in processes.

A process that a video kills or hangs costs that video, not the rest. W: windows of one item.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastjepa.data.crashes import Crashes
from fastjepa.data.dataset import Reader
from fastjepa.data.decode import VideoError, VideoInfo
from fastjepa.data.guard import Guard
from fastjepa.data.loader import in_processes, running
from fastjepa.data.sampling import central_box
from fastjepa.data.transforms import cut
from fastjepa.features.windows import Windows, seconds_of

DECODE_SECONDS = 300.0  # of one item, before its process is given up
MOST_AT_ONCE = 8  # windows of one item: the longest that the encoder waits for one process
MOST_DECODED = 128e6  # bytes of decoded frames of one item, of large pictures


class Looked(NamedTuple):
    """A video that was opened: what it is and where its windows begin; or `reason`, why it cannot be read."""

    video: int
    info: VideoInfo | None
    places: np.ndarray
    reason: str


class Clips(NamedTuple):
    """Windows of one video: clips float32 [W, 3, T, H, W]; or `reason`, and the number of windows that are lost."""

    video: int
    clips: Tensor
    frames: Tensor  # int64 [W], the first source frame of each
    seconds: Tensor  # float64 [W], when that is shown
    lost: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Item:
    """Windows of one video that are decoded together."""

    video: int
    places: np.ndarray


class _InOrder(Sampler[list[int]]):
    """[0], [1], ...: every item is a batch of its own."""

    def __init__(self, items: int, skip: int) -> None:
        self.numbers = range(skip, items)

    def __iter__(self) -> Iterator[list[int]]:
        return ([number] for number in self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


class _Looking(Dataset[Looked]):
    def __init__(
        self, reader: Reader, windows: Windows, hold: Callable[[int, int], AbstractContextManager[None]]
    ) -> None:
        self.reader, self.windows, self.hold = reader, windows, hold

    def __getitem__(self, video: int) -> Looked:
        try:
            with self.hold(video, 0):
                info = self.reader.info(video)
                return Looked(video, info, self.windows.places(info), "")
        except VideoError as error:
            return Looked(video, None, np.empty(0), str(error))


class _Decoding(Dataset[Clips]):
    def __init__(
        self,
        reader: Reader,
        windows: Windows,
        crop: int,
        items: Sequence[Item],
        hold: Callable[[int, int], AbstractContextManager[None]],
    ) -> None:
        self.reader, self.windows, self.crop, self.items, self.hold = reader, windows, crop, items, hold

    def __getitem__(self, number: int) -> Clips:
        item = self.items[number]
        try:
            with self.hold(item.video, number):
                return self._decoded(item)
        except VideoError as error:
            nothing = torch.empty(0)
            return Clips(item.video, nothing, nothing, nothing, len(item.places), str(error))

    def _decoded(self, item: Item) -> Clips:
        info = self.reader.info(item.video)
        numbers = np.stack([self.windows.numbers(info, place) for place in item.places])
        # Windows may overlap: each source frame is decoded once.
        needed, where = np.unique(numbers, return_inverse=True)
        frames = self.reader.read(item.video, needed)
        box = central_box(info.height, info.width)
        clips = torch.stack([cut(frames[row], box, False, self.crop) for row in where.reshape(numbers.shape)])
        first = numbers[:, 0]
        seconds = [seconds_of(info, frame) for frame in first.tolist()]
        return Clips(item.video, clips, torch.from_numpy(first.copy()), torch.tensor(seconds, dtype=torch.float64))


def _one(items: list[Any]) -> Any:
    (item,) = items
    return item


class Source:
    """The clips of a list of videos. `say` gets a sentence where a loader process dies."""

    def __init__(
        self, paths: list[str], windows: Windows, crop: int, tubelet: int, workers: int, say: Callable[[str], None]
    ) -> None:
        self.paths, self.windows, self.crop, self.workers = paths, windows, crop, workers
        self.reader = Reader(paths, tubelet)
        self.guard = Guard(Crashes(paths, say=say), DECODE_SECONDS, say)

    def look(self) -> Generator[Looked, None, None]:
        """Open every video, in order."""
        workers = min(self.workers, len(self.paths))
        dataset = _Looking(self.reader, self.windows, self.guard.hold)
        loader = in_processes(
            dataset,
            lambda skip: _InOrder(len(self.paths), skip),
            _one,
            workers=workers,
            pin_memory=False,
            guard=self.guard,
        )
        with running(loader) as found:
            for looked in found:
                if looked.info is not None:
                    self.reader.remember(looked.video, looked.info)
                yield looked

    def decode(self, items: Sequence[Item], *, pin_memory: bool) -> Generator[Clips, None, None]:
        """The clips of all items, in their order."""
        workers = min(self.workers, len(items))
        dataset = _Decoding(self.reader, self.windows, self.crop, items, self.guard.hold)
        loader = in_processes(
            dataset,
            lambda skip: _InOrder(len(items), skip),
            _one,
            workers=workers,
            pin_memory=pin_memory,
            guard=self.guard,
        )
        with running(loader) as found:
            yield from found


def items_of(looked: Looked, frames: int) -> Iterator[Item]:
    """The windows of a readable video, as many together as memory takes; a clip has so many `frames`."""
    info = looked.info
    assert info is not None, "only what can be read is cut up"
    decoded = frames * info.height * info.width * 3
    at_once = int(max(1, min(MOST_AT_ONCE, MOST_DECODED // decoded)))
    for first in range(0, len(looked.places), at_once):
        yield Item(looked.video, looked.places[first : first + at_once])
