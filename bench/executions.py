"""The packed execution beside the reference one: CPU time of a whole training step, on one thread.

    python bench/executions.py

Both start from the same weights, clips and masks. First the loss and every gradient are compared; then steps alternate
and process CPU time is taken, so that other work on the machine counts as little as it can. `speed` is the ratio of
the fastest steps, its spread that of the ratios of neighbours. A third contender takes the reference execution through
an optimizer path like the public code's: AdamW as torch builds it, a norm a tensor, one average a parameter.

On a CPU only arithmetic shows: the memory traffic, launches and stalls that packing saves on a GPU hardly do.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from measure import Row, facts, slug, write_results

from fastjepa.jepa import JEPA, Execution
from fastjepa.masks import MaskCollator, target_union
from fastjepa.models import VisionTransformer, vit_predictor
from fastjepa.noise import noise_draws
from fastjepa.optim import OptimizerPass, Schedule, parameter_groups

ROOT = Path(__file__).parents[1]


class Shape(NamedTuple):
    """Sizes of a step: encoder, predictor (with the encoder's heads), crop in pixels, clips; targets as in settings."""

    width: int
    depth: int
    heads: int
    predictor_width: int
    predictor_depth: int
    crop: int
    clips: int
    targets: Literal["mask_tokens", "noised"] = "mask_tokens"


SHAPES = {
    "64x3": Shape(64, 3, 2, 32, 2, 64, 8),
    "64x3-noised": Shape(64, 3, 2, 32, 2, 64, 8, "noised"),
    "192x12": Shape(192, 12, 3, 96, 6, 112, 4),
}
PUBLISHED_MASKS = [
    {"num_blocks": blocks, "spatial_scale": (scale, scale), "aspect_ratio": (0.75, 1.5)}
    for blocks, scale in ((8, 0.15), (2, 0.7))
]
SCHEDULE = Schedule(1000, 100, 1e-4, 1e-5, 1e-6, 0.04, 0.4, 0.998, 1.0)
CLIP_GRAD = 10.0
FRAMES = 16


def build(shape: str, execution: Execution) -> JEPA:
    """A JEPA of this shape: the same weights for every execution."""
    torch.manual_seed(0)
    s = SHAPES[shape]
    grid = {"img_size": s.crop, "patch_size": 16, "num_frames": FRAMES, "tubelet_size": 2, "uniform_power": True}
    norm = partial(nn.LayerNorm, eps=1e-6)
    encoder = VisionTransformer(**grid, embed_dim=s.width, depth=s.depth, num_heads=s.heads, norm_layer=norm)
    predictor = vit_predictor(
        **grid,
        embed_dim=s.width,
        predictor_embed_dim=s.predictor_width,
        depth=s.predictor_depth,
        num_heads=s.heads,
        use_mask_tokens=s.targets == "mask_tokens",
        noise="linear",
    )
    return JEPA(encoder, predictor, execution=execution)


def inputs(shape: str) -> tuple:
    """What a training run gives a JEPA: uint8 clips, context and target sets, noise or None, False, the union."""
    s = SHAPES[shape]
    context, target = MaskCollator(PUBLISHED_MASKS, s.crop, FRAMES, 16, 2, group=s.clips).draw(0, range(s.clips))
    size, generator = (s.clips, 3, FRAMES, s.crop, s.crop), torch.Generator().manual_seed(1)
    clips = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    noised = s.targets == "noised"
    draws = noise_draws(0, range(s.clips), target, s.predictor_width, clips.device) if noised else None
    return clips, context, target, draws, False, target_union(target, FRAMES // 2 * (s.crop // 16) ** 2)


def our_step(jepa: JEPA, batch: tuple) -> Callable[[], None]:
    """Forward, backward and the optimizer pass of a training run."""
    update = OptimizerPass(jepa, SCHEDULE, clip_grad=CLIP_GRAD)

    def step() -> None:
        loss = jepa(*batch).loss
        update.backward(loss)
        update.step(0, loss.detach())

    return step


def public_step(jepa: JEPA, batch: tuple) -> Callable[[], None]:
    """The same step through an optimizer path like the public code's."""
    optimizer = torch.optim.AdamW(parameter_groups(jepa), lr=SCHEDULE.lr_at(0))

    def step() -> None:
        jepa(*batch).loss.backward()
        for network in (jepa.encoder, jepa.predictor):
            nn.utils.clip_grad_norm_(network.parameters(), CLIP_GRAD)
        optimizer.step()
        matrices = [p for n in (jepa.encoder, jepa.predictor) for p in n.parameters() if p.ndim > 1]
        for parameter in matrices:
            if parameter.grad is not None:
                float(parameter.grad.norm())
        optimizer.zero_grad()
        for moments in optimizer.state.values():
            float(moments["exp_avg"].abs().mean()), float(moments["exp_avg_sq"].abs().mean())
        with torch.no_grad():
            for target, online in zip(jepa.target_encoder.parameters(), jepa.encoder.parameters()):
                target.data.mul_(0.998).add_(0.002 * online.detach().data)

    return step


def largest_difference(shape: str) -> float:
    """The largest relative difference of a gradient between the executions; stops where losses or gradients differ."""
    batch, jepas = inputs(shape), [build(shape, execution) for execution in ("packed", "reference")]
    losses = [jepa(*batch).loss for jepa in jepas]
    for loss in losses:
        loss.backward()
    grads = [[p.grad for p in jepa.parameters() if p.requires_grad] for jepa in jepas]
    worst = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(*grads))
    if abs(losses[0].item() / losses[1].item() - 1) > 1e-5 or worst > 1e-4:
        raise SystemExit(f"{shape}: the executions differ: losses {[x.item() for x in losses]}, gradients {worst:.1e}")
    return worst


def compare(shape: str, repeats: int) -> list[Row]:
    """Rows of one shape: ms of each contender, and how many times the speed of the others packed has."""
    batch = inputs(shape)
    steps = {
        "packed": our_step(build(shape, "packed"), batch),
        "reference": our_step(build(shape, "reference"), batch),
        "reference, public optimizer path": public_step(build(shape, "reference"), batch),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-3, repeats):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if turn >= 0:
                times[name].append(1e3 * (time.process_time() - began))
    where = {"shape": shape, "threads": 1}
    rows: list[Row] = [
        {"name": f"step {name}", "value": min(ms), "unit": "ms", "median": statistics.median(ms), "max": max(ms),
         "n": repeats, "parameters": where}
        for name, ms in times.items()
    ]  # fmt: skip
    for name in list(steps)[1:]:
        pairs = [slow / fast for slow, fast in zip(times[name], times["packed"])]
        rows.append(
            {"name": f"speed of packed over {name}", "value": min(times[name]) / min(times["packed"]), "unit": "x",
             "median": statistics.median(pairs), "min": min(pairs), "max": max(pairs), "n": repeats,
             "parameters": where}
        )  # fmt: skip
    difference = {"name": "largest gradient difference", "value": largest_difference(shape), "unit": "relative"}
    return [*rows, {**difference, "parameters": where}]


def main(arguments: list[str]) -> None:
    """Measure every shape and write one result file."""
    parser = argparse.ArgumentParser(prog="executions.py", description="Packed beside reference, on one CPU thread.")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=25, help="steps of each contender (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="result folder")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shapes = options.shapes.split(",")
    unknown = [shape for shape in shapes if shape not in SHAPES]
    if unknown or options.repeats < 1:
        wrong = f"--shapes: expected some of {', '.join(SHAPES)}, given {unknown[0]}" if unknown else ""
        parser.error(wrong or f"--repeats: expected at least 1, given {options.repeats}")
    command = f"python bench/executions.py --shapes {options.shapes} --repeats {options.repeats}"
    header = facts(torch.device("cpu"), command, quick=options.repeats < 15)
    path = options.out / f"executions-{slug(header['device'])}-{header['date'][:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for shape in shapes:
        rows += compare(shape, options.repeats)
        write_results(path, header, rows, complete=shape == shapes[-1])
    for row in rows:
        print(f"{row['parameters']['shape']:<8} {row['name']:<52} {row['value']:.4g} {row['unit']}")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
