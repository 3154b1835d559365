"""Once in a while, and at the end: probe the features and draw the pictures."""

import hashlib
import json
import shlex
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastjepa import config, probe
from fastjepa.build import build_reader, draw_encoder
from fastjepa.config import Settings
from fastjepa.data.crashes import LISTED, Crashes
from fastjepa.data.labelled import open_labelled, with_test
from fastjepa.data.source import Videos
from fastjepa.jepa import JEPA
from fastjepa.log import Log
from fastjepa.models import VisionTransformer
from fastjepa.opened import load_encoder
from fastjepa.pictures import Drawn, Wanted, draw_all
from fastjepa.probe import Protocol
from fastjepa.viz import read_record

BASELINES = "untrained.json"
# What eval.probe stands for.
ASKED = {"auto": (probe.KNN, probe.LINEAR), "all": probe.KINDS, "none": ()}


def should_probe(s: Settings, videos: Videos) -> tuple[bool, str]:
    """(whether features are probed, why not). Errors: ValueError where a probe is asked for that needs labels."""
    if s.eval.probe == "none":
        return False, ""
    if not probed_videos(s, videos).tasks:
        where = "eval.data" if s.eval.data else "eval.test" if s.eval.test else "data.path"
        if s.eval.probe != "auto" or where != "data.path":
            raise ValueError(
                f"eval.probe: {s.eval.probe} needs labels, and {where} has none (a list file can carry them, and "
                "eval.data can name a folder of class folders)"
            )
        return False, "no probe: the videos have no labels"
    return True, ""


def probed_videos(s: Settings, videos: Videos) -> Videos:
    """The labelled videos that a run is probed on: its own, or those of eval.data and eval.test.

    Errors: ValueError, OSError.
    """
    if s.eval.data is None and s.eval.test is None:
        return videos
    own = videos if s.eval.data is None else _opened("eval.data", s.eval.data, s.optim.seed)
    if s.eval.test is None or not own.tasks:
        return own
    try:
        return with_test(own, _opened("eval.test", s.eval.test, s.optim.seed))
    except ValueError as error:
        raise ValueError(f"eval.test: {str(error).removeprefix('eval.test: ')}") from None


@cache
def _opened(setting: str, path: str, seed: int) -> Videos:
    """A labelled collection, searched once in a process."""
    try:
        return open_labelled(path, seed)
    except ValueError as error:
        raise ValueError(f"{setting}: {str(error).removeprefix('data.path: ')}") from None


def protocol(s: Settings, kinds: tuple[str, ...], heads: int, segments: int = 1, views: int = 1) -> Protocol:
    """How an encoder with these settings is probed; `heads` are its attention heads."""
    d = s.data
    cut = probe.Cut(d.frames, d.stride, d.crop, d.duration, d.fps, segments, views)
    return Protocol(kinds, cut, heads, s.optim.seed)


def baselines(s: Settings, videos: Videos, how: Protocol, folder: Path) -> probe.Baselines:
    """Those of `folder`, under a key of all that they depend on."""
    networks = {
        key: value
        for key, value in config.flat(s).items()
        if key.startswith(("model.", "compat.", "mask.", "data.frame_rate", "data.patch", "data.tubelet"))
    }
    labels = {name: [task.classes, task.labels.tolist()] for name, task in videos.tasks.items()}
    splits = {name: split.tolist() for name, split in videos.splits.items()}
    cut = [how.cut, how.heads, how.seed, how.most]
    content = json.dumps([networks, videos.fingerprint, videos.paths, labels, splits, repr(cut)], default=str)
    key = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()[:16]
    return probe.Baselines(key, folder / BASELINES)


def untrained_encoder(s: Settings, device: torch.device) -> VisionTransformer:
    """The encoder that a run with these settings begins with; the state of the generators stays as it is."""
    # Weights are drawn on the CPU, but torch.manual_seed moves the generator of the GPU too.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return draw_encoder(s).to(device).eval()


def within_space(how: Protocol, encoder: VisionTransformer, videos: Videos, folder: Path) -> tuple[Protocol, str]:
    """The protocol with as many videos as may keep their tokens in `folder`, and what is to be said of it.

    Only the attentive probe keeps tokens.
    """
    total = sum(len(split) for split in videos.splits.values())
    wanted = min(total, how.most)
    if probe.ATTENTIVE not in how.kinds or not total:
        return how, ""
    learned = len(videos.splits["train"])
    rows = (learned + (total - learned) * how.cut.views) / total  # of a video
    most = int(probe.most_clips(encoder.num_patches * how.cut.segments, encoder.embed_dim, folder) / rows)
    if most >= wanted:
        return how, ""
    said = f"probe of only {most} videos: the tokens of more do not fit in {folder} (or in 16 GB)"
    return Protocol(how.kinds, how.cut, how.heads, how.seed, most), said


def run_probe(
    s: Settings,
    jepa: JEPA,
    videos: Videos,
    log: Log,
    step: int,
    stopped: Callable[[], bool],
    state: dict[str, Tensor] | None = None,
) -> None:
    """Probe the target encoder beside an untrained one; console, probe/ and the curves of this step.

    `state` are the weights of the target encoder where the networks of this process hold a part of them only; it is
    emptied. `stopped` is asked often. At most one encoder is held beside those of `jepa`.
    """
    log.say(f"probing the features of step {step} ...")
    device = next(jepa.parameters()).device
    training = jepa.training
    target = jepa.target_encoder.eval()
    assert isinstance(target, VisionTransformer)
    kinds = ASKED.get(s.eval.probe, (s.eval.probe,))
    videos = probed_videos(s, videos)
    how, said = within_space(protocol(s, kinds, target.num_heads), target, videos, log.folder)
    too_few = "too few of the labelled videos can be read"
    if said:
        log.say(said)
        too_few = f"those of {how.most} videos are too few"
    reader = build_reader(s, videos)  # without a cache: every video is read once
    Crashes(videos.paths, log.folder / LISTED, log.say).keep_from(reader)

    def trained() -> VisionTransformer:
        if state is None:
            return target
        whole = load_encoder(s, state, "the target encoder").to(device)
        state.clear()
        return whole

    try:
        results = probe.probe(
            trained,
            lambda: untrained_encoder(s, device),
            videos,
            reader,
            how,
            stopped,
            folder=log.folder,
            known=baselines(s, videos, how, log.folder / "probe"),
        )
    finally:
        jepa.train(training)
    if not results:
        log.say(f"no probe: {too_few}")
        return
    for kind, rows in results.items():
        probe.write(rows, step, log.folder / "probe", kind)
        for line in probe.table(rows, kind):
            log.say(line)
    log.scalars(step, probe.numbers(results))


def draw_pictures(
    s: Settings,
    jepa: JEPA,
    videos: Videos,
    log: Log,
    step: int,
    state: dict[str, Tensor] | None = None,
    alive: Callable[[], None] = lambda: None,
) -> list[Path]:
    """viz/ of a run that is over: what `python -m fastjepa viz` draws, of the target encoder at hand; the files made.

    `state` as in `run_probe`; `alive` is called now and then. Pictures are no reason to end a run with a failure, and
    can be drawn again: whatever goes wrong is said.
    """
    record = read_record(log.folder)
    record = replace(record, status=record.status | {"state": "done", "step": step})
    drawn = Drawn()
    encoder = jepa.target_encoder
    training = encoder.training
    try:
        if state is not None:
            encoder = load_encoder(s, state, "target encoder").to(next(jepa.parameters()).device)
        features = f"Features of the target encoder of step {step:,}."
        draw_all(
            s, record, videos, encoder.eval(), log.folder / "viz", Wanted(), drawn,
            run=log.folder, features=features, alive=alive,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001
        log.note(traceback.format_exc())
        again = f"python -m fastjepa viz {shlex.quote(str(log.folder))} draws them again"
        drawn.notes.append(f"{str(error) or type(error).__name__} (details in train.log); {again}")
    finally:
        jepa.target_encoder.train(training)
    for note in drawn.notes:
        log.say(f"warning: pictures: {note}")
    if drawn.files:
        log.say(f"pictures   {log.folder / 'viz'}: {', '.join(path.name for path in drawn.files)}")
    return drawn.files


def show_pictures(log: Log, step: int, paths: list[Path]) -> None:
    """Hand images of the run folder to TensorBoard and W&B: viz/masks.png is viz/masks there."""
    for path in paths:
        if path.suffix == ".png":
            name = path.relative_to(log.folder).with_suffix("").as_posix().removesuffix(f"-step-{step:07d}")
            log.picture(name, path, step)
