"""The loader of a training run, by itself and beside steps."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch

from bench.data.batches import entry_of
from bench.measure import Call, synchronize
from bench.step.ways import CLIPPING, QUICK, ROOT, Batches, Draw, Runner
from fastjepa import configfile
from fastjepa.build import build_dataset, build_decoding, build_masks
from fastjepa.config import Settings
from fastjepa.configchecks import needs_frames
from fastjepa.data.decoders.choose import choose_decoder
from fastjepa.data.loader import Batch, make_loader, running
from fastjepa.data.processes import processors
from fastjepa.data.source import open_videos
from fastjepa.data.upload import uploaded
from fastjepa.loop import Clock

LISTED = 10_000  # videos of a list: more than the clips that are read, so that each is new, as in a large data set
STEPS = 100_000
CLIPS = {"cuda": 24, "cpu": 4}  # of a batch: the published ones; on a CPU such a batch would take seconds
LOADED = "340x256", 250  # size and group of pictures of the videos
PREPARED = "340x256", 12  # much as `python -m fastjepa data PATH --prepare OUT` makes them
WARM_UP = 3
LEAST_CLIPS = 48  # of a block
FIRST = 56  # the batch that a timed block begins with: what is decoded from there on is like all that a run decodes
TINY = (*QUICK, "data.frames=16", "optim.dtype=float32")


def why_not(workers: int) -> str:
    """Why so many loader processes are not measured here; empty where they are."""
    return f"{workers} workers are more than this machine's {processors()} processors" * (workers > processors())


def settings_of(video: Path, clips: int, *more: str) -> Settings:
    """ViT-L as published with so many clips a step, all of them from this file: each time as from a new one."""
    listed = video.with_suffix(".txt")
    listed.write_text(f'"{video}"\n' * LISTED)
    batch = (f"optim.global_batch={clips}", f"data.batch_size={clips}")
    return configfile.load(ROOT / "configs" / "vitl.yaml", [f"data.path={listed}", *batch, CLIPPING, *more])


@contextmanager
def batches_of(s: Settings, workers: int, device: torch.device, first: int = 0) -> Iterator[Iterator[Batch]]:
    """The batches of a training run with these settings, on the device, from the one of step `first` on.

    They come by the decoder that the run would take. Worker processes end with the block.
    """
    d = s.data
    assert isinstance(d.path, str), "one list of one file"
    videos = open_videos(d.path, s.optim.seed)
    entry = entry_of(Path(videos.paths[0]))
    decoder = choose_decoder(d.decoder, device, needs_frames(s), lambda: [entry] * len(videos.paths))
    dataset = build_dataset(s, videos, decoder)
    decoding = build_decoding(s, decoder, dataset, s.optim.global_batch, device, _refuse)
    loader = make_loader(
        dataset,
        build_masks(s),
        first_step=first,
        last_step=STEPS,
        global_batch=s.optim.global_batch,
        batch_size=s.optim.global_batch,
        workers=workers,
        pin_memory=device.type == "cuda",
        tokens=d.frames // d.tubelet * (d.crop // d.patch) ** 2,
    )
    with (
        running(loader) as loaded,
        closing(decoding(loaded)) as ready,
        closing(uploaded(ready, device)) as batches,
    ):
        yield batches


def _refuse(said: str) -> None:
    """Errors: ValueError: what a decoder fails on is not what is measured."""
    raise ValueError(said)


class Stretch(NamedTuple):
    """Steps in a row: milliseconds of all of them, and the share of these in which the host waited for data."""

    ms: float
    waited: float


def stretch(batches: Iterator[Batch], step: Callable[[Batch], None], count: int, device: torch.device) -> Stretch:
    """So many batches through `step`, timed as the training loop does.

    Errors: ValueError where a file could not be read: another one's clip was measured.
    """
    synchronize(device)
    clock = Clock(started=time.perf_counter())
    for _ in range(count):
        began = time.perf_counter()
        batch = next(batches)
        clock.waited += time.perf_counter() - began
        if batch.bad:
            raise ValueError(f"{batch.bad[0][0]}: {batch.bad[0][1]}")
        step(batch)
    synchronize(device)
    seconds = time.perf_counter() - clock.started
    return Stretch(1e3 * seconds, clock.waited / seconds)


def pass_by(batch: Batch) -> None:
    """In place of a step: nothing."""


def block_of(workers: int, clips: int) -> int:
    """Batches that are timed together: as many of each worker, for those of all come at about the same time.

    They have some dozens of clips, for what is decoded for a clip goes by its place in the video.
    """
    turn = max(1, workers)
    return turn * -(-LEAST_CLIPS // (clips * turn))


def fresh(
    s: Settings, workers: int, device: torch.device, step: Callable[[Batch], None] = pass_by, block: int | None = None
) -> Stretch:
    """One block behind a loader of its own, which has not had a pause to fill its queue in.

    What workers begin with comes before it: the time until their first batches, and as many as they have ready by then.
    The block begins with the same clip for any number of workers. It has `block` batches, by default `block_of` them.
    """
    begin = workers + 1
    with batches_of(s, workers, device, FIRST - begin) as batches:
        stretch(batches, step, begin, device)
        return stretch(batches, step, block or block_of(workers, s.optim.global_batch), device)


class Beside:
    """A model that trains on the loader's batches; "steps with the loader" and each of the two alone, by name.

    `decoders`: the loader decodes by each of them in turn.
    """

    def __init__(self, s: Settings, workers: int, device: torch.device, decoders: Sequence[str]) -> None:
        self.settings, self.workers, self.device, self.decoders = s, workers, device, decoders
        self.runner = Runner(s, device)
        with batches_of(s, 0, device) as batches:
            self.held = [next(batches) for _ in range(2)]
        self.waited: dict[str, list[float]] = {name: [] for name in decoders}
        stretch(cycle(self.held), self.step, WARM_UP, device)

    def step(self, batch: Batch) -> None:
        """One training step."""
        draw = Draw(batch.masks_context, batch.masks_target, batch.union)
        self.runner.step(Batches([batch.clips], [draw]))

    @property
    def steps(self) -> int:
        """Steps of a block."""
        return block_of(self.workers, self.settings.optim.global_batch)

    def variants(self) -> dict[tuple[str, str], Callable[[], float]]:
        """By (what, decoder): each gives the milliseconds of one block; the first note the share waited for data."""

        def settings(decoder: str) -> Settings:
            return self.settings.model_copy(update={"data": self.settings.data.model_copy(update={"decoder": decoder})})

        def together(decoder: str) -> float:
            found = fresh(settings(decoder), self.workers, self.device, self.step)
            self.waited[decoder].append(found.waited)
            return found.ms

        variants: dict[tuple[str, str], Callable[[], float]] = {}
        for name in self.decoders:
            variants["steps with the loader", name] = lambda name=name: together(name)
            variants["loader alone", name] = lambda name=name: fresh(settings(name), self.workers, self.device).ms
        variants["steps alone", "-"] = lambda: stretch(cycle(self.held), self.step, self.steps, self.device).ms
        return variants


def own_clock(call: Call) -> float:
    """For calls that time a part of themselves, and return its milliseconds."""
    ms = call()
    assert isinstance(ms, float)
    return ms
