"""`python -m fastjepa data PATH --prepare OUT`: what is said about it, before and after."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastjepa.config import Data
from fastjepa.data.index import Index
from fastjepa.data.indexfile import Entry
from fastjepa.data.pace import MOST_VIDEOS, Pace, measure_pace
from fastjepa.data.prepare import LEDGER, LIST, Ledger, Prepared, check_place, prepare
from fastjepa.data.reencode import UNKNOWN_RATE, Recipe, size_of
from fastjepa.data.source import Videos
from fastjepa.data.summary import byte_size, shown
from fastjepa.exits import Exit

MOST_NAMED = 10
PACE_SECONDS = 2.0  # of decoding, before and after


@dataclass(frozen=True)
class Preparation:
    """What was asked for: the folder, the recipe and how many processes. `ledger` tells what is there already."""

    out: Path
    workers: int
    ledger: Ledger


def open_preparation(out: Path, path: str, recipe: Recipe, workers: int) -> Preparation:
    """Refuses a folder that cannot be taken before the collection `path` is looked at. Errors: ValueError."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--prepare: expected a folder, given {out}, which is a file")
    check_place(out, os.path.expanduser(path))
    there = next(one for one in (out, *out.absolute().parents) if one.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(f"--prepare: expected a folder that can be written, given {out}: no permission for {there}")
    return Preparation(out, workers, Ledger(out, recipe))


def run_preparation(
    asked: Preparation,
    path: str,
    index: Index,
    data: Data,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Exit:
    """Re-encode, and say what comes of it. Errors: ValueError for a folder that overlaps the collection; OSError."""
    entries = {entry.path: entry for entry in index.entries}
    check_place(asked.out, os.path.expanduser(path), entries)
    if asked.ledger.done and not asked.ledger.done.keys() & entries.keys():
        raise ValueError(
            f"--prepare: expected the collection that {asked.out} was made of, such as "
            f"{next(iter(asked.ledger.done))}, given {path}"
        )
    good = [entry for entry in index.entries if entry.reason is None and not entry.still]
    if not good:
        raise ValueError(f"--prepare: {path} holds no video to encode among {len(entries):,} files")
    recipe = asked.ledger.recipe
    say(
        f"prepare    {len(good):,} videos as H.264 in {shown(str(asked.out))}: short side at most {recipe.short_side}, "
        f"a key frame every {recipe.gop} frames, quality {recipe.quality}, no sound"
    )
    say(
        f"expected   {_expected(good, recipe, data.frames * data.stride):.2g} times the clips/s of one process, an "
        "estimate by the pixels and frames that are decoded for a clip"
    )
    unknown = sum(entry.rate is None for entry in good)
    if unknown:
        say(f"rate       {unknown:,} videos and folders of frames do not say it and get {UNKNOWN_RATE} frames/s")
    result = prepare(index.videos, entries, _root(path, index.videos), asked.out, asked.ledger, asked.workers, progress)
    made = [one for one in good if one.path in result.done and result.done[one.path].reason is None]
    before, after = sum(one.size for one in made), sum(result.done[one.path].made for one in made)
    say(
        f"prepared   {len(made):,} of {len(good):,} videos, {len(result.new):,} of them now: {byte_size(before)} -> "
        f"{byte_size(after)}" + (f"; train with data.path={shown(str(asked.out / LIST))}" if made else "")
    )
    for line in _left(result, index, asked.out):
        say(line)
    say(f"gain       {_gain(made, result, asked.out, data)}")
    return Exit.FAILED if result.failed else Exit.DONE


def _root(path: str, videos: Videos) -> str:
    """Where names of a collection begin: the folder, or that of the list; of embedded clips that of their cache."""
    place = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(place):
        return place
    return os.path.dirname(place if os.path.exists(place) else videos.paths[0])


def _expected(good: list[Entry], recipe: Recipe, span: int) -> float:
    """How much less is decoded for a clip: from the key frame before it, or the file's start, to its last frame."""

    def pixels(gop: float, frames: int, width: int, height: int) -> float:
        return (min(gop, frames) / 2 + min(span, frames)) * width * height

    before = sum(pixels(e.gop if e.seekable else e.frames, e.frames, e.width, e.height) for e in good)
    after = sum(pixels(recipe.gop, e.frames, *size_of(e.width, e.height, recipe.short_side)) for e in good)
    return before / after


def _left(result: Prepared, index: Index, out: Path) -> list[str]:
    """What is not in the list, and why."""
    lines = [f"failed     {shown(one.source)}: {shown(str(one.reason))}" for one in result.failed[:MOST_NAMED]]
    if len(result.failed) > MOST_NAMED:
        lines.append(f"failed     {len(result.failed) - MOST_NAMED:,} more, see {shown(str(out / LEDGER))}")
    bad = sum(entry.reason is not None for entry in index.entries)
    stills = sum(entry.still for entry in index.entries)
    if bad or stills:
        lines.append(f"left out   {bad:,} unreadable files, {stills:,} single images")
    if result.gone:
        lines.append(
            f"gone       from the collection: {len(result.gone):,}, {shown(result.gone[0])} among them; what was made "
            "of it stays in the folder and is not in the list"
        )
    return lines


def _gain(made: list[Entry], result: Prepared, out: Path, data: Data) -> str:
    """Measured on the same videos, before and after."""
    long = [one for one in made if one.frames >= data.tubelet]
    if not long:
        return f"not measured: no video has a tubelet of {data.tubelet} frames"
    sample = [long[n] for n in np.unique(np.linspace(0, len(long) - 1, MOST_VIDEOS).astype(int))]
    shape = (data.frames, data.stride, data.crop, PACE_SECONDS)
    paces = [measure_pace([one.path for one in sample], *shape)]
    if isinstance(paces[0], Pace):  # of the new files as many as there was time for of the old ones: the same
        sample = sample[: paces[0].videos]
        paces.append(measure_pace([str(out / result.done[one.path].target) for one in sample], *shape))
    lost = [pace for pace in paces if not isinstance(pace, Pace)]
    if lost:
        return f"not measured: {shown(lost[0])}"
    old, new = (pace.rate for pace in paces if isinstance(pace, Pace))
    return (
        f"{old:.3g} -> {new:.3g} clips/s in one process with PyAV ({new / old:.2g} x), measured on {len(sample)} videos"
    )
