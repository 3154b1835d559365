"""The packed execution beside the reference one in tiny models that a CPU can train: what `test_executions.py` times.

Both start from the same weights, clips and masks. `largest_difference` compares the loss and every gradient first. A
third contender takes the reference execution through an optimizer path like the public code's: AdamW as torch builds
it, a norm a tensor, one average a parameter.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from fastjepa.jepa import JEPA, Execution
from fastjepa.masks import MaskCollator, target_union
from fastjepa.models import VisionTransformer, vit_predictor
from fastjepa.noise import noise_draws
from fastjepa.optim import OptimizerPass, parameter_groups
from fastjepa.schedules import Schedule


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
    """The largest relative difference of a gradient between the executions.

    Errors: ValueError where losses or gradients differ by more than rounding.
    """
    batch, jepas = inputs(shape), [build(shape, execution) for execution in ("packed", "reference")]
    losses = [jepa(*batch).loss for jepa in jepas]
    for loss in losses:
        loss.backward()
    grads = [[p.grad for p in jepa.parameters() if p.requires_grad] for jepa in jepas]
    worst = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(*grads))
    if abs(losses[0].item() / losses[1].item() - 1) > 1e-5 or worst > 1e-4:
        raise ValueError(f"{shape}: the executions differ: losses {[x.item() for x in losses]}, gradients {worst:.1e}")
    return worst


def contenders(shape: str) -> dict[str, Callable[[], None]]:
    """One training step of each, by name; "packed" first."""
    batch = inputs(shape)
    return {
        "packed": our_step(build(shape, "packed"), batch),
        "reference": our_step(build(shape, "reference"), batch),
        "reference, public optimizer path": public_step(build(shape, "reference"), batch),
    }
