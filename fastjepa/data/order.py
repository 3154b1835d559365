"""Which video comes at which slot: a pure function of (seed, video slot), for one collection or a weighted mixture.

Passes go over a collection in a new permutation each. A collection in shards is read shard by shard instead, in a new
order of the shards each pass, and shuffled inside a window: what a window names lies close together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastjepa.streams import Purpose, stream

# Video slots among which each collection has its share, to one slot: no share is off by more than 1 / BLOCK.
BLOCK = 1 << 16


@dataclass(frozen=True)
class Collection:
    """Numbers of videos, int64 [n], that have `weight` among several collections.

    `shards`: int64 [n], ascending, the shard that each of them lies in; None where they are files of their own.
    """

    videos: np.ndarray
    weight: float = 1.0
    shards: np.ndarray | None = None


class VideoOrder:
    """Draws the video of every slot: `without` replacement by permutations, or with it, each draw by itself.

    Without replacement shares are exact in each block of 65,536 slots, and every collection goes on where it was:
    no video of it comes twice before all have come. `window` is that of collections in shards. Errors: ValueError for
    no collection, an empty one or a weight that is not positive.
    """

    def __init__(
        self, seed: int, collections: Sequence[Collection], *, replacement: bool = False, window: int = 1024
    ) -> None:
        if not collections or any(len(c.videos) == 0 or not c.weight > 0 for c in collections):
            raise ValueError("a video order needs collections with videos and with weights above 0")
        self.seed, self.collections, self.replaces, self.window = seed, tuple(collections), replacement, window
        self.videos = np.concatenate([c.videos for c in collections])
        weights = np.array([c.weight for c in collections], dtype=np.float64)
        self.bounds = np.cumsum(weights / weights.sum())
        self.shares = _shares(self.bounds)
        self._kept: dict[tuple[str, int], tuple[int, np.ndarray]] = {}

    def video(self, video_slot: int) -> int:
        """Number of the video that this slot asks for."""
        if self.replaces:
            rng = stream(self.seed, Purpose.DRAW, video_slot)
            return int(rng.choice(self.collections[self._drawn(rng.random())].videos))
        number, turn = self._turn(video_slot)
        past, place = divmod(turn, len(self.collections[number].videos))
        return int(self._remembered("pass", number, past, self._pass)[place])

    def number(self, video_slot: int) -> int:
        """Number of the collection that this slot draws from."""
        if len(self.collections) == 1:
            return 0
        if self.replaces:
            return self._drawn(stream(self.seed, Purpose.DRAW, video_slot).random())
        return self._turn(video_slot)[0]

    def replacement(self, video_slot: int, attempt: int) -> int:
        """Number of a video of the same collection, to take instead after `attempt` that cannot be used."""
        videos = self._collection(video_slot).videos
        return int(stream(self.seed, Purpose.REPLACEMENT, video_slot, attempt).choice(videos))

    def all_replacements(self, video_slot: int, attempt: int) -> list[int]:
        """All videos in a random order of this slot, its own collection's first: where single ones have failed."""
        rng, own = stream(self.seed, Purpose.REPLACEMENT, video_slot, attempt), self._collection(video_slot)
        first = rng.permutation(own.videos).tolist()
        return first + [int(v) for c in self.collections if c is not own for v in rng.permutation(c.videos)]

    def _collection(self, video_slot: int) -> Collection:
        return self.collections[self.number(video_slot)]

    def _drawn(self, share: float) -> int:
        return min(int(np.searchsorted(self.bounds, share, side="right")), len(self.collections) - 1)

    def _turn(self, video_slot: int) -> tuple[int, int]:
        """(number of the collection, how many slots before this one were that collection's)."""
        if len(self.collections) == 1:
            return 0, video_slot
        block, place = divmod(video_slot, BLOCK)
        number = int(self._remembered("block", 0, block, self._block)[place])
        before = int(self._remembered("rank", 0, block, self._ranks)[place])
        return number, block * int(self.shares[number]) + before

    def _block(self, _: int, block: int) -> np.ndarray:
        numbers = np.repeat(np.arange(len(self.collections)), self.shares)
        return stream(self.seed, Purpose.MIXTURE, block).permutation(numbers)

    def _ranks(self, _: int, block: int) -> np.ndarray:
        """For every slot of a block: the slots of its collection before it, in the block."""
        numbers = self._remembered("block", 0, block, self._block)
        ranks = np.empty(BLOCK, dtype=np.int64)
        for number in range(len(self.collections)):
            of_it = numbers == number
            ranks[of_it] = np.arange(of_it.sum())
        return ranks

    def _pass(self, number: int, past: int) -> np.ndarray:
        """The videos of a collection in the order of one pass."""
        collection = self.collections[number]
        rng = stream(self.seed, Purpose.PERMUTATION, past, number)
        if collection.shards is None:
            return rng.permutation(collection.videos)
        starts = np.flatnonzero(np.diff(collection.shards, prepend=collection.shards[0] - 1))
        shards = np.split(collection.videos, starts[1:])
        in_order = np.concatenate([shards[i] for i in rng.permutation(len(shards))])
        windows = np.split(in_order, range(self.window, len(in_order), self.window))
        return np.concatenate([rng.permutation(window) for window in windows])

    def _remembered(self, kind: str, number: int, time: int, make: Callable[[int, int], np.ndarray]) -> np.ndarray:
        """The newest array of this kind, made anew where it is of another time: slots come nearly in order."""
        known = self._kept.get((kind, number))
        if known is None or known[0] != time:
            known = self._kept[kind, number] = (time, make(number, time))
        return known[1]


def _shares(bounds: np.ndarray) -> np.ndarray:
    """Slots of each collection in a block, int64 [collections], at least one of each: they add up to BLOCK."""
    shares = np.maximum(np.diff(np.rint(bounds * BLOCK).astype(np.int64), prepend=0), 1)
    shares[np.argmax(shares)] += BLOCK - shares.sum()
    return shares
