"""An encoder over the windows of videos. W: windows in all, B: of one batch, N: tokens, t: time slots, E: width."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastjepa.config import Runtime
from fastjepa.data.processes import processors
from fastjepa.data.replaced import ALWAYS_TOLERATED, TooManyBadFiles
from fastjepa.data.source import Videos, open_videos
from fastjepa.features.clips import Clips, Item, Source, items_of
from fastjepa.features.files import FeatureFile, open_file
from fastjepa.features.windows import Hop, Windows
from fastjepa.opened import Opened, open_encoder
from fastjepa.parallel import autocast, set_up

Pool = Literal["mean", "slots", "tokens"]
POOLS = ("mean", "slots", "tokens")
Progress = Callable[[str, int, int], None]
SMALL, LARGE = 8, 32  # windows of a batch, without and with a GPU
MOST_WORKERS = 16


class Rows(NamedTuple):
    """Features of a batch, on the CPU: float32 [B, E], [B, t, E] or [B, N, E], and where they are from."""

    features: Tensor
    video: Tensor  # int64 [B]
    start_frame: Tensor  # int64 [B]
    start_seconds: Tensor  # float64 [B]; NaN where nothing tells


@dataclass(frozen=True)
class Features:
    """`features` float32 [W, ...]; row i is of the window of `videos[video[i]]` that begins at `start_frame[i]`.

    `labels`: by task, what each video is labelled. `bad`: (path, reason) of what could not be read.
    """

    features: Tensor
    video: Tensor
    start_frame: Tensor
    start_seconds: Tensor
    videos: list[str]
    labels: dict[str, list[str]]
    bad: list[tuple[str, str]]
    opened: Opened


@dataclass(frozen=True)
class Report:
    """What came of it: windows written and their shape, videos that they are of, and what could not be read."""

    windows: int
    shape: tuple[int, ...]
    videos: int
    bad: list[tuple[str, str]]


@dataclass
class Job:
    """What is embedded, and how. `lost` fills with (path, reason) of videos that cannot be read, as they are met."""

    opened: Opened
    videos: Videos
    windows: Windows
    pool: Pool
    batch: int
    dtype: str
    device: torch.device
    workers: int
    max_bad: float
    progress: Progress
    say: Callable[[str], None]
    lost: dict[int, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features of one window."""
        encoder = self.opened.encoder
        return {"mean": (), "slots": encoder.grid[:1], "tokens": (encoder.num_patches,)}[self.pool] + (
            encoder.embed_dim,
        )

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(path, reason) of what could not be read."""
        return [(self.videos.paths[video], reason) for video, reason in self.lost.items()]

    def labels(self) -> dict[str, list[str]]:
        """By task, the name of the class of each video."""
        tasks = self.videos.tasks.items()
        return {name: [task.classes[number] for number in task.labels.tolist()] for name, task in tasks}


def embed(weights: str | Path | Opened, path: str | Path | Sequence[str | Path], **how: Any) -> Features:
    """Features of every window of a video or a collection, in memory; `how` as in `prepare`.

    `weights` as `open_encoder` reads them, or what it gave. Errors: ValueError for a path or an option;
    TooManyBadFiles.
    """
    job = prepare(weights, path, **how)
    with closing(rows_of(job)) as rows:
        parts = list(rows)
    features, video, start_frame, start_seconds = (torch.cat(column) for column in zip(*parts))
    return Features(features, video, start_frame, start_seconds, job.videos.paths, job.labels(), job.bad, job.opened)


def embed_to_file(
    weights: str | Path | Opened,
    path: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    store: str = "float32",
    **how: Any,
) -> Report:
    """The same into a `.safetensors` or `.parquet` file, batch by batch; `store` float16 halves it.

    The file has its name only when it is whole. Errors: ValueError for a path, an option or a file that exists;
    TooManyBadFiles; OSError.
    """
    with open_file(Path(out).expanduser(), store) as make:
        job = prepare(weights, path, **how)
        opened, w = job.opened, job.windows
        facts = {
            "weights": f"{opened.description}, {opened.network.replace('_', ' ')}",
            "licence": opened.licence,
            "pool": job.pool,
            "clip": f"{w.frames} frames, {_pace(w)}, {opened.settings.data.crop} px",
        }
        file: FeatureFile = make(job.shape, job.videos.paths, job.labels(), facts)
        windows, seen = 0, set()
        with closing(rows_of(job)) as rows:
            for part in rows:
                file.append(part.features, part.video, part.start_frame, part.start_seconds)
                windows += len(part.video)
                seen.update(part.video.tolist())
        file.finish()
    return Report(windows, job.shape, len(seen), job.bad)


def prepare(
    weights: str | Path | Opened,
    path: str | Path | Sequence[str | Path],
    *,
    pool: Pool = "mean",
    every: str | float | None = None,
    central: bool = False,
    stride: int | None = None,
    fps: float | None = None,
    network: Literal["target_encoder", "encoder"] | None = None,
    batch: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    workers: int | None = 0,
    max_bad: float = 0.01,
    progress: Progress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Job:
    """What `embed` will do, checked.

    pool: `mean` over all tokens, over those of a time slot (`slots`), or none (`tokens`). every: from window to window,
    source frames or "0.5s"; None puts them side by side. central: one clip, in the middle of the video, as probes have
    it. stride, fps: in place of the model's. batch: windows of one forward pass. dtype: precision of matrix products.
    workers: processes that decode, 0 for none, None for one a processor. max_bad: share of unreadable videos that ends
    it (10 are always tolerated). progress: (what, done, total). say: sentences about videos. Errors: ValueError.
    """
    if pool not in POOLS:
        raise ValueError(f"pool: expected {', '.join(POOLS)}, given {pool!r}")
    if stride is not None and fps is not None:
        raise ValueError(f"stride: expected without fps, which takes its place, given {stride}")
    if central and every is not None:
        raise ValueError(f"every: expected without central, which is one clip of a video, given {every}")
    hop = None if every is None else Hop.of(every)
    # Videos before weights: a mistyped path is then told at once.
    videos = _listed(path) if isinstance(path, list | tuple) else _found(str(path))
    place = _device(device)
    opened = weights if isinstance(weights, Opened) else open_encoder(weights, network)
    opened.encoder.to(place)
    data = opened.settings.data
    own = stride is None and fps is None
    windows = Windows(
        data.frames,
        data.stride if stride is None else stride,
        data.duration if own else None,
        data.fps if own else fps,
        hop,
        central,
    )
    gpu = place.type == "cuda"
    return Job(
        opened,
        videos,
        windows,
        pool,
        batch or (LARGE if gpu else SMALL),
        dtype,
        place,
        min(MOST_WORKERS, processors()) if workers is None else workers,
        max_bad,
        progress,
        say,
    )


def rows_of(job: Job) -> Generator[Rows, None, None]:
    """Features batch by batch, in the order of the videos and of their windows; the same for any number of workers.

    Errors: TooManyBadFiles.
    """
    data = job.opened.settings.data
    source = Source(job.videos.paths, job.windows, data.crop, data.tubelet, job.workers, job.say)
    items: list[Item] = []
    with closing(source.look()) as found:
        for done, looked in enumerate(found, start=1):
            if looked.info is None:
                _lose(job, looked.video, looked.reason)
            else:
                items += items_of(looked, data.frames)
            job.progress("videos looked at", done, len(job.videos.paths))
    _check(job)
    total, done = sum(len(item.places) for item in items), 0
    waiting: tuple[Tensor, list[Tensor]] | None = None
    with closing(source.decode(items, pin_memory=job.device.type == "cuda")) as decoded:
        for clips, where in _batches(decoded, job.batch, lambda one: _lose(job, one.video, one.reason)):
            ahead = _pooled(job, clips), where
            # A batch late: a GPU computes the next one while this one is copied and written.
            if waiting is not None:
                yield Rows(waiting[0].cpu(), *waiting[1])
            waiting = ahead
            done += len(clips)
            job.progress("windows", done, total)
            _check(job)
    _check(job)
    if waiting is None:
        raise TooManyBadFiles(_sentence(job))
    yield Rows(waiting[0].cpu(), *waiting[1])


@torch.no_grad()
def _pooled(job: Job, clips: Tensor) -> Tensor:
    """float32 [B, ...] on the device."""
    encoder: nn.Module = job.opened.encoder
    clips = clips.to(job.device, non_blocking=True)
    with autocast(job.device, job.dtype):
        tokens = encoder(clips)
    tokens = tokens.float()
    if job.pool == "mean":
        return tokens.mean(dim=1)
    if job.pool == "slots":
        slots = job.opened.encoder.grid[0]
        return tokens.unflatten(1, (slots, -1)).mean(dim=2)
    return tokens


def _batches(
    decoded: Iterator[Clips], size: int, lose: Callable[[Clips], None]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(clips [B, 3, T, H, W], [video, frame, seconds] of each), of several videos side by side; the last is smaller."""
    held: list[tuple[Tensor, ...]] = []
    count = 0
    for one in decoded:
        if one.reason:
            lose(one)
            continue
        video = torch.full((len(one.clips),), one.video, dtype=torch.int64)
        held.append((one.clips, video, one.frames, one.seconds))
        count += len(one.clips)
        while count >= size:
            columns = [torch.cat(column) for column in zip(*held)]
            yield columns[0][:size], [column[:size] for column in columns[1:]]
            held = [tuple(column[size:] for column in columns)]
            count -= size
    if count:
        columns = [torch.cat(column) for column in zip(*held)]
        yield columns[0], columns[1:]


def _lose(job: Job, video: int, reason: str) -> None:
    """Note a video that cannot be read, and say so the first time."""
    if video not in job.lost:
        job.lost[video] = reason
        job.say(f"left out   {job.videos.paths[video]}: {reason}")


def _check(job: Job) -> None:
    """Errors: TooManyBadFiles where more cannot be read than is tolerated, or nothing can."""
    total = len(job.videos.paths)
    if len(job.lost) >= total:
        raise TooManyBadFiles(_sentence(job))
    allowed = max(ALWAYS_TOLERATED, int(total * job.max_bad))
    if len(job.lost) > allowed:
        raise TooManyBadFiles(
            f"{len(job.lost)} of {total} files cannot be read, more than the {allowed} that a share of {job.max_bad:g} "
            "allows (--max-bad)"
        )


def _sentence(job: Job) -> str:
    path, reason = job.bad[-1]
    return f"none of the {len(job.videos.paths)} files can be read, {path} among them ({reason})"


def _device(name: str) -> torch.device:
    """Errors: ValueError for what is no device, or none of this machine."""
    try:
        return set_up(Runtime(device=name))[0]
    except ValidationError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, given {name!r}") from None
    except ValueError as error:
        raise ValueError(str(error).removeprefix("runtime.")) from None


def _found(path: str) -> Videos:
    """Errors: ValueError with one sentence."""
    try:
        return open_videos(path, 0)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("data.path: ")) from None


def _listed(paths: Sequence[str | Path]) -> Videos:
    """Videos by their names, in this order. Errors: ValueError for none."""
    if not paths:
        raise ValueError("path: expected at least one video, given an empty list")
    names = [str(Path(path).expanduser()) for path in paths]
    return Videos(names, np.arange(len(names)), "", f"{len(names)} videos")


def _pace(windows: Windows) -> str:
    if windows.fps is not None:
        return f"{windows.fps:g} frames/s"
    return f"stride {windows.stride}" if windows.duration is None else f"over {windows.duration:g} s"
