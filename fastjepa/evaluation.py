"""Once in a while, and at the end: probe the features and draw the pictures."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjepa import probe, viz
from fastjepa.build import build_dataset, build_jepa, build_masks, build_reader
from fastjepa.config import Settings
from fastjepa.data.crashes import LISTED, Crashes
from fastjepa.data.source import Videos
from fastjepa.jepa import JEPA
from fastjepa.log import Log, read_metrics
from fastjepa.models import VisionTransformer

CLIPS_SHOWN = 4


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


def draw_pictures(s: Settings, videos: Videos, log: Log) -> None:
    """viz/loss.png, viz/clips.png and viz/masks.png: the curves so far, and the first clips with the first masks."""
    rows = read_metrics(log.folder)
    if rows:
        viz.loss_curve(rows, log.folder / "viz" / "loss.png")
    dataset = build_dataset(s, videos)
    Crashes(videos.paths, log.folder / LISTED, log.say).keep_from(dataset.reader)
    shown = min(CLIPS_SHOWN, s.optim.global_batch)
    clips = [clip for slot in range(ceil(shown / s.data.clips_per_video)) for clip in dataset.decoded(slot).clips][
        :shown
    ]
    titles = [f"clip {slot}" for slot in range(len(clips))]
    viz.clip_picture(clips, titles, s.data.tubelet, log.folder / "viz" / "clips.png")
    context, target = build_masks(s).draw(0, [0])
    viz.mask_picture(clips[0], context, target, s.data.tubelet, s.data.patch, log.folder / "viz" / "masks.png")
    log.say(f"pictures   {log.folder / 'viz'}: " + ", ".join(p.name for p in sorted((log.folder / "viz").iterdir())))


def show_probe(log: Log, step: int) -> None:
    """Hand what probe/ has of this step to TensorBoard and W&B: its numbers, and its pictures."""
    folder = log.folder / "probe"
    for path in sorted(folder.glob(f"*step-{step:07d}.json")):
        log.scalars(step, dict(_numbers("probe", json.loads(path.read_text()))))
    show_pictures(log, step, sorted(folder.glob(f"*{step:07d}*.png")))


def show_pictures(log: Log, step: int, paths: list[Path]) -> None:
    """Hand image files of the run folder to TensorBoard and W&B: viz/masks.png is viz/masks there."""
    for path in paths:
        name = path.relative_to(log.folder).with_suffix("").as_posix().removesuffix(f"-step-{step:07d}")
        log.picture(name, path, step)


def _numbers(name: str, content: Any) -> Iterator[tuple[str, float]]:
    """Every number in JSON by its place: probe/motion/trained; entries of a list by their task or kind."""
    if isinstance(content, bool) or content is None:
        return
    if isinstance(content, int | float):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            inside = name if key == "results" else f"{name}/{key}"
            yield from () if key in ("step", "videos") else _numbers(inside, value)
    elif isinstance(content, list):
        for number, entry in enumerate(content):
            own = entry.get("task", number) if isinstance(entry, dict) else None
            yield from () if own is None else _numbers(f"{name}/{own}", entry)
