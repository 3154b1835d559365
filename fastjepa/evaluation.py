"""Once in a while, and at the end: probe the features and draw the pictures."""

import shlex
import traceback
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastjepa import probe
from fastjepa.build import build_jepa, build_reader
from fastjepa.config import Settings
from fastjepa.data.crashes import LISTED, Crashes
from fastjepa.data.source import Videos
from fastjepa.jepa import JEPA
from fastjepa.log import Log
from fastjepa.models import VisionTransformer
from fastjepa.opened import load_encoder
from fastjepa.pictures import Drawn, Wanted, draw_all
from fastjepa.viz import read_record


def should_probe(s: Settings, videos: Videos) -> tuple[bool, str]:
    """(whether features are probed, why not). Errors: ValueError where a probe is asked for that needs labels."""
    if s.eval.probe == "none":
        return False, ""
    if not videos.tasks:
        if s.eval.probe != "auto":
            raise ValueError(
                f"eval.probe: {s.eval.probe} needs labels, and data.path has none (a list file can carry them)"
            )
        return False, "no probe: the videos have no labels"
    return True, ""


def run_probe(
    s: Settings,
    jepa: JEPA,
    videos: Videos,
    log: Log,
    step: int,
    stopped: Callable[[], bool],
    state: dict[str, Tensor] | None = None,
) -> None:
    """Probe the target encoder beside an untrained one; console, probe/ and metrics of this step.

    `state` are the weights of the target encoder where the networks of this process hold a part of them only.
    `stopped` is asked often.
    """
    log.say(f"probing the features of step {step} ...")
    device = next(jepa.parameters()).device
    training = jepa.training
    # Weights are drawn on the CPU, but torch.manual_seed moves the generator of the GPU too.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        untrained = build_jepa(s).target_encoder.to(device).eval()
    reader = build_reader(s, videos)  # without a cache: every video is read once
    Crashes(videos.paths, log.folder / LISTED, log.say).keep_from(reader)
    shape = probe.Cut(s.data.frames, s.data.stride, s.data.crop, s.data.duration, s.data.fps)
    kind = "attentive" if s.eval.probe == "attentive" else "linear"
    too_few = "too few of the labelled videos can be read"
    trained = jepa.target_encoder.eval()
    if state is not None:
        trained = deepcopy(untrained)
        trained.load_state_dict(state)
    try:
        if kind == "attentive":
            assert isinstance(trained, VisionTransformer)
            most = probe.most_clips(trained.num_patches, trained.embed_dim, log.folder)
            if most < len(videos.paths) and most < probe.MOST_VIDEOS:
                log.say(f"probe of only {most} videos: the tokens of more do not fit in {log.folder} (or in 16 GB)")
                too_few = f"those of {most} videos are too few"
            results = probe.attentive_probe(
                trained, untrained, videos, reader, shape, stopped,
                heads=trained.num_heads, seed=s.optim.seed, folder=log.folder, most=most,
            )  # fmt: skip
        else:
            results = probe.probe(trained, untrained, videos, reader, shape, stopped)
    finally:
        jepa.train(training)
    if not results:
        log.say(f"no probe: {too_few}")
        return
    probe.write(results, step, log.folder / "probe", kind)
    for line in probe.table(results, kind):
        log.say(line)


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
