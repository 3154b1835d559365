"""Between the loader and the step: clips that a batch decoder takes are decoded here, some batches ahead."""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Protocol

import torch
from torch import Tensor

from fastjepa.data.dataset import CHANCES, ClipDataset
from fastjepa.data.decoders.dali import EncodedClip
from fastjepa.data.loader import Batch, EncodedBatch

# One batch is decoded while the one before waits to be used: more would only take memory.
AHEAD = 2


class BatchDecoder(Protocol):
    """What `dali.DaliDecoder` is."""

    def begin(self, clips: list[EncodedClip]) -> None:
        """Start on a batch."""

    def finish(self) -> tuple[Tensor, dict[int, str]]:
        """The oldest batch begun: uint8 [B, C, T, H, W] on the device; reasons of the clips that failed, by place."""

    def close(self) -> None:
        """End its threads."""


class Decoding:
    """Decodes the clips of batches, and what has failed once more with PyAV, which reads past damaged places.

    A file that fails twice goes to PyAV at once from then on. `make` builds the decoder when the first batch is there:
    its threads must not be copied into the loader's processes. `say` is called once for each file that it fails on.
    """

    def __init__(self, make: Callable[[], BatchDecoder], name: str, dataset: ClipDataset, say: Callable[[str], None]):
        self.make, self.name, self.dataset, self.say = make, name, dataset, say
        self.failures: Counter[str] = Counter()

    def __call__(self, batches: Iterator[Batch | EncodedBatch]) -> Generator[Batch, None, None]:
        """The same batches in order, all of their clips decoded."""
        waiting: deque[tuple[Batch | EncodedBatch, list[int]]] = deque()
        with closing(_Lazy(self.make)) as decoder:
            for batch in batches:
                if isinstance(batch, Batch) and not waiting:
                    yield batch
                    continue
                begun = []
                if isinstance(batch, EncodedBatch):
                    begun = [n for n, c in enumerate(batch.clips) if isinstance(c, EncodedClip) and self._tries(c.path)]
                if begun:
                    decoder.begin([batch.clips[n] for n in begun])  # type: ignore[misc]
                waiting.append((batch, begun))
                if len(waiting) == AHEAD:
                    yield self._finished(decoder, *waiting.popleft())
            while waiting:
                yield self._finished(decoder, *waiting.popleft())

    def _tries(self, path: str) -> bool:
        return self.failures[path] < CHANCES

    def _finished(self, decoder: "_Lazy", batch: Batch | EncodedBatch, begun: list[int]) -> Batch:
        if isinstance(batch, Batch):
            return batch
        pixels, failed = decoder.finish() if begun else (torch.empty(0, dtype=torch.uint8), {})
        if len(begun) == len(batch.clips) and not failed:
            return batch.batch._replace(clips=pixels)
        clips: list[Tensor | EncodedClip] = list(batch.clips)
        for place, number in enumerate(begun):
            if place not in failed:
                clips[number] = pixels[place]
                continue
            path = batch.clips[number].path  # type: ignore[union-attr]
            if not self.failures[path]:
                self.say(f"decoder    {path}: {self.name} fails ({failed[place]}), so pyav reads it")
            self.failures[path] += 1
        return self._completed(batch.batch, clips, pixels.device)

    def _completed(self, batch: Batch, clips: list[Tensor | EncodedClip], device: torch.device) -> Batch:
        """Put in what PyAV makes of the clips that are not decoded yet, or another video where it fails too."""
        per_video = self.dataset.plan.clips_per_video
        bad, short = list(batch.bad), list(batch.short)
        for first in range(0, len(clips), per_video):
            if any(isinstance(clip, EncodedClip) for clip in clips[first : first + per_video]):
                # All clips of the video: where it cannot be read, another takes the place of the whole.
                sample = self.dataset.decoded(batch.slots[first] // per_video)
                clips[first : first + per_video] = sample.clips
                bad += sample.bad
                short += sample.short
        stacked = torch.stack([clip.to(device, non_blocking=True) for clip in clips])  # type: ignore[union-attr]
        return batch._replace(clips=stacked, bad=bad, short=short)


class _Lazy:
    """A decoder that is made when it is first needed."""

    def __init__(self, make: Callable[[], BatchDecoder]) -> None:
        self.make = make
        self.made: BatchDecoder | None = None

    def begin(self, clips: list[EncodedClip]) -> None:
        if self.made is None:
            self.made = self.make()
        self.made.begin(clips)

    def finish(self) -> tuple[Tensor, dict[int, str]]:
        assert self.made is not None, "a batch was begun"
        return self.made.finish()

    def close(self) -> None:
        if self.made is not None:
            self.made.close()
