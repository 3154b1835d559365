"""Whole batches of uint8 clips: a batch decoder beside one process of PyAV, from the same encoded videos."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from bench.measure import synchronize
from fastjepa.data.dataset import ClipDataset, Reader
from fastjepa.data.decoders.dali import DaliDecoder
from fastjepa.data.decoders.encoded import EncodedClip
from fastjepa.data.index import CPU_CODECS, GPU_CODECS, examine
from fastjepa.data.indexfile import Entry
from fastjepa.data.sampling import ClipPlan

FRAMES, STRIDE, CROP = 16, 4, 224
SIZE = {"cuda": 24, "cpu": 8}  # clips of a batch
BATCHES = {"cuda": 12, "cpu": 2}  # of one timed call
THREADS = {"cuda": (1, 4, 8, 16, 32), "cpu": (1, 2)}
PREFETCH = {"cuda": (1, 2, 3), "cpu": (1, 2)}  # batches under way
CODECS = {"cuda": GPU_CODECS, "cpu": CPU_CODECS}
SAME = 3.0  # mean grey levels of a batch: DALI upsamples colours otherwise, by about 1.2
NOT_A_VIDEO = np.frombuffer(b"this is no video " * 4000, np.uint8)


def entry_of(path: Path) -> Entry:
    """What an index says of a file."""
    found = path.stat()
    return examine((str(path), found.st_size, found.st_mtime_ns))


class Source:
    """Clips of one video, as a run plans them: encoded for a batch decoder, or decoded by PyAV."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.size, count = SIZE[device.type], BATCHES[device.type]
        self.entry = entry_of(path)
        plan = ClipPlan(0, np.arange(1), FRAMES, STRIDE, (0.3, 1.0), (0.75, 1.35), True)
        reader = Reader([str(path)], 2, known=[self.entry])
        self.dataset = ClipDataset(reader, plan, CROP, encoded=np.array([True]))
        self.batches = [[self.encoded(slot) for slot in self.slots(batch)] for batch in range(count)]

    def slots(self, batch: int) -> range:
        """Those of a batch."""
        return range(batch * self.size, (batch + 1) * self.size)

    def encoded(self, slot: int) -> EncodedClip:
        """What a loader process hands over."""
        (clip,) = self.dataset[slot].clips
        assert isinstance(clip, EncodedClip), "all videos of this data set are left encoded"
        return clip

    @property
    def clips(self) -> int:
        """Of one timed call."""
        return self.size * len(self.batches)

    @cached_property
    def right(self) -> Tensor:
        """Batch 0 by PyAV."""
        return self.by_pyav(0).float()

    def by_pyav(self, batch: int) -> Tensor:
        """uint8 [B, 3, T, CROP, CROP], decoded and cut in this process."""
        return torch.stack([self.dataset.decoded(slot).clips[0] for slot in self.slots(batch)])


def decoder(device: torch.device, threads: int, prefetch: int) -> DaliDecoder:
    """That of a run."""
    return DaliDecoder(
        frames=FRAMES, crop=CROP, most=SIZE[device.type], device=device, threads=threads, prefetch=prefetch
    )


def decoded(dali: DaliDecoder, batches: list[list[EncodedClip]], prefetch: int) -> Iterator[Tensor]:
    """All batches through a decoder, `prefetch` of them under way. Errors: ValueError where a clip fails."""
    for number in range(len(batches) + prefetch - 1):
        if number < len(batches):
            dali.begin(batches[number])
        if number >= prefetch - 1:
            pixels, failed = dali.finish()
            if failed:
                raise ValueError(f"{batches[0][0].path}: {next(iter(failed.values()))}")
            yield pixels


def check(source: Source, pixels: Tensor, first: int = 0) -> None:
    """Errors: ValueError where clips from `first` on of batch 0 are not, up to colours, what PyAV makes of them."""
    apart = (pixels.cpu().float() - source.right)[first:].abs().mean(dim=(1, 2, 3, 4))
    if apart.max() > SAME:
        raise ValueError(f"{source.entry.path}: clips differ by {apart.max():.1f} grey levels from PyAV's")


class Timed:
    """A call by the clock on the wall, with the processor time of this process that each took beside it."""

    def __init__(self, call: Callable[[], None], device: torch.device) -> None:
        self.call, self.device = call, device
        self.processor: list[float] = []

    def __call__(self) -> float:
        synchronize(self.device)
        began, worked = time.perf_counter(), time.process_time()
        self.call()
        synchronize(self.device)
        self.processor.append(time.process_time() - worked)
        return 1e3 * (time.perf_counter() - began)


@contextmanager
def engines_watched() -> Iterator[list[float]]:
    """The use of the GPU's video decoders in percent, ten times a second while the block runs; empty without a tool."""
    seen: list[float] = []
    query = ["nvidia-smi", "--query-gpu=utilization.decoder", "--format=csv,noheader,nounits", "--loop-ms=100"]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        yield seen
        return
    assert process.stdout is not None, "it was asked for"
    reader = threading.Thread(target=_note, args=(process.stdout, seen), daemon=True)
    reader.start()
    try:
        yield seen
    finally:
        process.terminate()
        process.wait()
        reader.join()


def _note(lines: IO[str], seen: list[float]) -> None:
    seen.extend(float(line) for line in lines if line.strip().replace(".", "").isdecimal())
