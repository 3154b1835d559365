"""`python -m fastjepa probe WEIGHTS`: what did the features learn? Classifiers on the frozen encoder.

WEIGHTS is the folder of a run (its newest checkpoint, also while it trains), one checkpoint in it, or a published
checkpoint of V-JEPA (.pth.tar) or V-JEPA 2 (.pt). Labels come from the videos of the run, or from --data.
"""

import argparse
import difflib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastjepa import evaluation, probe
from fastjepa.build import build_reader
from fastjepa.config import Settings
from fastjepa.data.crashes import LISTED, Crashes
from fastjepa.data.dataset import Reader
from fastjepa.data.labelled import open_labelled, with_test
from fastjepa.data.source import Videos
from fastjepa.exits import Exit
from fastjepa.log import duration
from fastjepa.opened import Opened, open_encoder
from fastjepa.verbs.parsing import Parser, complain, say, whole_number


def main(arguments: Sequence[str]) -> Exit:
    """Probe, print the tables and keep them. Errors: ValueError with one sentence."""
    given = _parser().read(arguments)
    kinds = _kinds(given.probe)
    device = _device(given.device)
    opened = open_encoder(_checkpoint(given.weights, given.step), given.network, device)
    s = opened.settings
    videos = _videos(given.data, given.test, s)
    how = evaluation.protocol(s, kinds, opened.encoder.num_heads, given.segments, given.views)
    how = probe.Protocol(how.kinds, how.cut, how.heads, how.seed, given.most)
    folder = given.out or (opened.run / "probe" if opened.run else Path(f"probe-{opened.path.name.split('.')[0]}"))
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(len(split) for split in videos.splits.values())
    say(f"weights    {opened.path}: {given.network} of {opened.description}")
    say(f"videos     {videos.description}")
    how, said = evaluation.within_space(how, opened.encoder, videos, folder)
    if said:
        say(said)
    elif how.most < total:
        say(f"probed     about {how.most} of {total} videos, the same share of each part (--most)")
    say(
        f"clips      {given.segments} of a video, {given.views} {'view' if given.views == 1 else 'views'} in tests, "
        f"{s.data.frames} frames of {s.data.crop} x {s.data.crop} pixels; encoder on {device}"
    )
    with _Progress() as progress:
        results = probe.probe(
            lambda: opened.encoder,
            None if given.no_untrained else lambda: evaluation.untrained_encoder(s, device),
            videos,
            _reader(s, videos, opened),
            how,
            lambda: False,
            folder=folder,
            known=evaluation.baselines(s, videos, how, folder),
            progress=progress.show,
        )
    if not results:
        complain(
            "no probe: too few of the labelled videos can be read to learn from two, choose on one and test on one"
        )
        return Exit.FAILED
    _report(results, opened, folder, given)
    return Exit.DONE


def _parser() -> Parser:
    parser = Parser("probe", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("weights", metavar="WEIGHTS", help="a run, a checkpoint in it, or a .pth.tar or .pt file")
    add = parser.add_argument
    add(
        "--probe",
        default="knn,linear",
        metavar="KINDS",
        help="knn (nearest neighbours, nothing is trained), linear (on the mean of the tokens), attentive (a learned "
        "query on all tokens, as published), several with commas, or all; default knn,linear",
    )
    add(
        "--data",
        metavar="PATH",
        help="another labelled collection: a list (path and label a line), shards, or a folder with a folder of videos "
        "or images for each class",
    )
    add(
        "--test",
        metavar="PATH",
        help="labelled videos to test on (val.csv, say): a sixth of the others then chooses the classifier; without it "
        "5/8 of the collection are learned from, 1/8 chooses, 1/4 is tested on",
    )
    add("--segments", type=whole_number(1, 64), default=1, metavar="N", help="clips spread over each video; default 1")
    add("--views", type=whole_number(1, 16), default=1, metavar="K", help="squares of each test video; default 1")
    add(
        "--network",
        choices=("target_encoder", "encoder"),
        default="target_encoder",
        help="which of the two encoders; default target_encoder",
    )
    add("--step", type=whole_number(0), metavar="N", help="the checkpoint of this step of a run; default the newest")
    add(
        "--most",
        type=whole_number(4),
        default=probe.MOST_VIDEOS,
        metavar="N",
        help=f"videos that are probed at most, the same share of each part; default {probe.MOST_VIDEOS}",
    )
    add("--no-untrained", action="store_true", help="leave out the encoder before training, for half of the time")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N; default the GPU where there is one")
    add("--out", type=Path, metavar="FOLDER", help="where results go; default probe/ in the run")
    return parser


def _kinds(text: str) -> tuple[str, ...]:
    """Errors: ValueError."""
    asked = [word.strip() for word in text.split(",")]
    if "all" in asked:
        return probe.KINDS
    for word in asked:
        if word not in probe.KINDS:
            near = difflib.get_close_matches(word, (*probe.KINDS, "all"), n=1)
            nearest = f", nearest valid name: {near[0]}" if near else ""
            raise ValueError(f"--probe: expected {', '.join(probe.KINDS)} or all, given {word!r}{nearest}")
    return tuple(kind for kind in probe.KINDS if kind in asked)


def _device(name: str | None) -> torch.device:
    """Errors: ValueError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, given {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: this machine has {torch.cuda.device_count()} GPUs, given {name}")
    return device


def _checkpoint(weights: str, step: int | None) -> Path:
    """Errors: ValueError where there is no checkpoint of this step."""
    path = Path(weights).expanduser()
    if step is None:
        return path
    folder = path / "checkpoints"
    found = sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdecimal())
    if step not in found:
        there = ", ".join(map(str, found)) or "none"
        raise ValueError(f"--step: {path} has no checkpoint of step {step}; there are: {there}")
    return folder / f"step-{step:07d}"


def _videos(data: str | None, test: str | None, s: Settings) -> Videos:
    """The labelled collection. Errors: ValueError."""
    videos = _labelled("--data", s.data.path if data is None else data, s)
    if test is None:
        return videos
    try:
        return with_test(videos, _labelled("--test", test, s))
    except ValueError as error:
        raise ValueError(f"--test: {str(error).removeprefix('--test: ')}") from None


def _labelled(option: str, path: str | Mapping[str, object], s: Settings) -> Videos:
    try:
        videos = open_labelled(path, s.optim.seed)
    except ValueError as error:
        raise ValueError(f"{option}: {str(error).removeprefix('data.path: ')}") from None
    if not videos.tasks:
        raise ValueError(
            f"{option}: expected labels, found none in {path}: name a list with a path and a label a line, shards with "
            "labels, or a folder with a folder for each class"
        )
    return videos


def _reader(s: Settings, videos: Videos, opened: Opened) -> Reader:
    reader = build_reader(s, videos)
    if opened.run is not None:
        Crashes(videos.paths, opened.run / LISTED, complain, own=False).keep_from(reader)
    return reader


def _report(results: dict[str, list[probe.Accuracy]], opened: Opened, folder: Path, given: argparse.Namespace) -> None:
    """Tables, JSON and pictures."""
    variant = _variant(given)
    about = {
        "weights": str(opened.path),
        "network": given.network,
        "data": given.data,
        "test": given.test,
        "segments": given.segments,
        "views": given.views,
    }
    when = opened.path.name.split(".")[0] if opened.step is None else f"step {opened.step}"
    kept = []
    for kind, rows in results.items():
        for line in probe.table(rows, kind, more=True):
            say(line)
        kept.append(probe.write(rows, opened.step, folder, kind, variant=variant, about=about))
        for row in rows:
            assert row.confusion is not None, "every probe that was just made has one"
            name = "-".join(part for part in ("confusion", kind, variant, _word(row.task)) if part)
            title = f"{kind} probe, {row.task}, {when}: {row.trained:.1%} of {row.videos}"
            probe.confusion_picture(*row.confusion, title, folder / f"{name}.png")
            kept.append(folder / f"{name}.png")
    say(f"kept       {folder}: {', '.join(path.name for path in kept)}")


def _variant(given: argparse.Namespace) -> str:
    """What tells the files of this probe from those of the run's own ones."""
    parts = [
        "encoder" if given.network == "encoder" else "",
        f"{given.segments}x{given.views}" if (given.segments, given.views) != (1, 1) else "",
        *(_word(Path(path).stem or "data") for path in (given.data, given.test) if path is not None),
        f"most{given.most}" if given.most != probe.MOST_VIDEOS else "",
    ]
    return "-".join(part for part in parts if part)


def _word(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text)[:60].strip("_") or "data"


class _Progress:
    """Which encoder is at how many videos: a bar on a terminal, a line for each tenth elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._named, self._began, self._tenth = "", 0.0, 0

    def __enter__(self) -> "_Progress":
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, encoder: str, done: int, total: int) -> None:
        """`done` of `total` videos have been read for this encoder."""
        if encoder != self._named:
            self._named, self._began, self._tenth = encoder, time.perf_counter(), 0
            if self._bar is not None:
                self._task = self._bar.add_task(f"{encoder} encoder", total=total)
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            return
        tenth = 10 * done // total
        if tenth > self._tenth:
            self._tenth = tenth
            left = (time.perf_counter() - self._began) / done * (total - done)
            more = f", {duration(left)} left" if done < total else "; now the classifiers"
            say(f"{encoder} encoder: {done}/{total} videos{more}")
