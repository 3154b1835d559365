"""Between the loader and the step: clips that a batch decoder takes are decoded here, some batches ahead."""

import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastjepa.data.batches import Batch, EncodedBatch, MixedBatch
from fastjepa.data.dataset import CHANCES, ClipDataset
from fastjepa.data.decoders.encoded import EncodedClip

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


class Failures:
    """What a decoder failed on, by file: the numbers of the batches, and whether it is tried again.

    Kept in `listed`, a line each (path, reason, slot), so that a run that goes on from batch `first` knows what it knew
    then: which decoder reads a clip decides its last bits. For the same reason a failure counts for batches that are
    begun after it is known in any case, not for those that were begun already: two batches of this process lie at most
    `apart` slots apart.
    """

    def __init__(self, listed: Path | None, first_slot: int, apart: int = 0) -> None:
        self.listed, self.first_slot, self.apart = listed, first_slot, apart
        self.slots: dict[str, list[int]] = {}
        if listed is not None and listed.is_file():
            for line in listed.read_bytes().split(b"\n")[:-1]:
                one = json.loads(line)
                if one["slot"] < first_slot:
                    self.slots.setdefault(one["path"], []).append(one["slot"])

    def quarantined(self, path: str, slots: Sequence[int]) -> bool:
        """Whether this file is not tried any more in the batch of these slots."""
        # The first slot of which nothing may be known yet.
        known = slots[0] - (AHEAD - 1) * max(self.apart, len(slots))
        return len({slot for slot in self.slots.get(path, ()) if slot < known}) >= CHANCES

    def add(self, path: str, reason: str, slot: int) -> bool:
        """Write it down; whether it is the first failure of this file."""
        first = path not in self.slots
        self.slots.setdefault(path, []).append(slot)
        if self.listed is not None:
            with self.listed.open("a", encoding="ascii") as out:
                out.write(json.dumps({"path": path, "reason": reason, "slot": slot}) + "\n")
        return first


class Decoding:
    """Decodes the clips of batches, and what has failed once more with PyAV, which reads past damaged places.

    A file that fails twice goes to PyAV at once from then on. `make` builds the decoder when the first batch is there:
    its threads must not be copied into the loader's processes. `say` is called once for each file that it fails on.
    """

    def __init__(
        self,
        make: Callable[[], BatchDecoder],
        name: str,
        dataset: ClipDataset,
        say: Callable[[str], None],
        failures: Failures | None = None,
    ) -> None:
        self.make, self.name, self.dataset, self.say = make, name, dataset, say
        self.failures = failures or Failures(None, 0)

    def __call__(
        self, batches: Iterator[Batch | MixedBatch | EncodedBatch]
    ) -> Generator[Batch | MixedBatch, None, None]:
        """The same batches in order, all of their clips decoded; those of several lengths come so."""
        waiting: deque[tuple[Batch | MixedBatch | EncodedBatch, dict[int, EncodedClip]]] = deque()
        with closing(_Lazy(self.make)) as decoder:
            for batch in batches:
                if not isinstance(batch, EncodedBatch) and not waiting:
                    yield batch
                    continue
                begun = self._tried(batch) if isinstance(batch, EncodedBatch) else {}
                if begun:
                    decoder.begin(list(begun.values()))
                waiting.append((batch, begun))
                if len(waiting) == AHEAD:
                    yield self._finished(decoder, *waiting.popleft())
            while waiting:
                yield self._finished(decoder, *waiting.popleft())

    def _tried(self, batch: EncodedBatch) -> dict[int, EncodedClip]:
        """The clips that the decoder is asked for, by their place in the batch."""
        return {
            place: clip
            for place, clip in enumerate(batch.clips)
            if isinstance(clip, EncodedClip) and not self.failures.quarantined(clip.path, batch.batch.slots)
        }

    def _finished(
        self, decoder: "_Lazy", batch: Batch | MixedBatch | EncodedBatch, begun: dict[int, EncodedClip]
    ) -> Batch | MixedBatch:
        if not isinstance(batch, EncodedBatch):
            return batch
        pixels, failed = decoder.finish() if begun else (torch.empty(0, dtype=torch.uint8), {})
        if len(begun) == len(batch.clips) and not failed:
            return batch.batch._replace(clips=pixels)
        clips: list[Tensor | EncodedClip] = list(batch.clips)
        for number, (place, clip) in enumerate(begun.items()):
            if number not in failed:
                clips[place] = pixels[number]
            elif self.failures.add(clip.path, failed[number], batch.batch.slots[place]):
                self.say(f"decoder    {clip.path}: {self.name} fails ({failed[number]}), so pyav reads it")
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
