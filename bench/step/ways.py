"""The ways of taking a training step that are compared, and the batches that all of them get.

A way is a handful of settings over a published settings file; what runs is what a training run would build from them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa import configfile, parallel
from fastjepa.build import build_jepa, build_masks, build_optimizer_pass, build_step
from fastjepa.compiling import compiles
from fastjepa.config import Settings
from fastjepa.masks import TargetUnion, TokenSet, target_union
from fastjepa.memory import STATE
from fastjepa.models.predictor import Draw as NoiseDraw
from fastjepa.noise import noise_draws
from fastjepa.pieces import PIECES
from fastjepa.plan import Plan, make_plan
from fastjepa.spreading import build_exchange

ROOT = Path(__file__).parents[2]
# Clips of a forward pass in the published runs: 24 (ViT-L, ViT-H at 224 px, V-JEPA 2) and 10 (384 px).
MODELS = {"vitl": 24, "vith": 24, "vith_384": 10, "vjepa2_vitl": 24, "vjepa2_vitg": 24}
_FUSED = {piece: "fused" if piece in ("mlp", "embed") else "triton" for piece in PIECES}
_REFERENCE = ("runtime.execution=reference", "runtime.compile=false")
# As configs/vitl_noised.yaml has them; the recipes of V-JEPA 2 say which mask token is read, of which there is none.
_NOISED = ("model.targets=noised", "model.noise=linear", "compat.mask_token_by_length=false")
WAYS: dict[str, tuple[str, ...]] = {
    "packed": (),
    "packed-eager": ("runtime.compile=false",),
    "packed-triton": ("runtime.kernels=triton",),
    "packed-fused": (f"runtime.kernels={{{', '.join(f'{piece}: {name}' for piece, name in _FUSED.items())}}}",),
    "packed-noised": _NOISED,
    "reference": _REFERENCE,
    "reference-compiled": ("runtime.execution=reference", "runtime.compile=true"),
    "reference-noised": (*_REFERENCE, *_NOISED),
}
# Two ways that are timed in turns, ours first. In the order in which they are measured: time may run out.
PAIRS = (
    ("packed", "reference"),
    ("packed", "reference-compiled"),
    ("packed-noised", "reference-noised"),
    ("packed-fused", "packed"),
    ("packed-triton", "packed"),
    ("packed", "packed-eager"),
    ("packed-noised", "packed"),
)
# The second generation is published with every block computed again.
RECOMPUTING = ("runtime.recompute=1000",)
# Most of a run clips its gradients; its first 12,300 steps, which these weights would be in, do not.
CLIPPING = "compat.clip_after_warmup=0"
QUICK = (
    "model.name=vit_nano", "model.predictor_depth=1", "model.predictor_dim=32", "model.predictor_heads=null",
    "data.crop=64", "data.frames=4", "runtime.threads=1",
)  # fmt: skip
QUICK_CLIPS = 4
CLIP_BATCHES = 2  # a run holds as many: the one that it works on and the next


class Draw(NamedTuple):
    """Mask sets of one step, on the device."""

    context: list[TokenSet]
    target: list[TokenSet]
    union: TargetUnion


class Batches(NamedTuple):
    """What steps are fed: batches of clips [B, C, T, H, W] uint8 and draws of masks, each taken in turn."""

    clips: list[Tensor]
    draws: list[Draw]

    def at(self, step: int) -> tuple[Tensor, Draw]:
        """Clips and masks of a step: the same for every way."""
        return self.clips[step % len(self.clips)], self.draws[step % len(self.draws)]


def settings_of(model: str, way: str, *, quick: bool, overrides: Sequence[str] = ()) -> Settings:
    """The published settings with one GPU's batch as the whole step, run in this way; `quick` has a tiny model."""
    clips = QUICK_CLIPS if quick else MODELS[model]
    batch = (f"mask.group={clips}", f"optim.global_batch={clips}", f"data.batch_size={clips}")
    again = RECOMPUTING if way.startswith("reference") and model.startswith("vjepa2") else ()
    more = (*batch, CLIPPING, *WAYS[way], *again, *(QUICK if quick else ()), *overrides)
    return configfile.load(ROOT / "configs" / f"{model}.yaml", list(more))


def prepare(s: Settings, draws: int, device: torch.device) -> Batches:
    """Random clips and so many draws of masks, each of a step of its own: on the device before any step is timed."""
    masks, d = build_masks(s), s.data
    batch = s.optim.global_batch
    tokens = d.frames // d.tubelet * (d.crop // d.patch) ** 2
    generator = torch.Generator(device).manual_seed(1)
    shape = (batch, 3, d.frames, d.crop, d.crop)
    clips = [
        torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator) for _ in range(CLIP_BATCHES)
    ]
    drawn = []
    for step in range(draws):
        context, target = masks.draw(step, range(step * batch, (step + 1) * batch))
        union = target_union(target, tokens)
        sets = ([one.to(device) for one in side] for side in (context, target))
        drawn.append(Draw(*sets, union.to(device)))
    return Batches(clips, drawn)


class Runner:
    """A way that is built: its JEPA, its optimizer pass, and the losses of the steps that it has taken.

    `kind` is alone, or ddp in one of several processes that train together (see `build_exchange`).
    """

    def __init__(self, s: Settings, device: torch.device, kind: str = "alone") -> None:
        """Errors: ValueError where something that the settings ask for cannot run on this machine."""
        self.settings, self.device = s, device
        self.jepa, _, self.how = build_step(s, device, move=False)
        self.exchange = build_exchange(kind, self.jepa, device, s.optim.dtype)
        scaler = parallel.gradient_scaler(device, s.optim.dtype)
        self.update = build_optimizer_pass(s, self.jepa, scaler, exchange=self.exchange)
        self.losses: list[Tensor] = []

    @property
    def taken(self) -> int:
        """Steps so far."""
        return len(self.losses)

    def forward(self, batches: Batches) -> Tensor:
        """The loss of the next step."""
        clips, draw = batches.at(self.taken)
        noise = self._noise(draw) if self.settings.model.targets == "noised" else None
        with parallel.autocast(self.device, self.settings.optim.dtype):
            return self.exchange.loss(clips, draw.context, draw.target, noise, union=draw.union).loss

    def _noise(self, draw: Draw) -> list[NoiseDraw]:
        s, clips = self.settings, self.settings.optim.global_batch
        slots = range(self.taken * clips, (self.taken + 1) * clips)
        keyed = self.jepa.operations.keyed_noise
        return noise_draws(s.optim.seed, slots, draw.target, s.model.predictor_dim, self.device, keyed=keyed)

    def step(self, batches: Batches) -> None:
        """One training step, from clips on the device to the target encoder; the host waits for nothing."""
        loss = self.forward(batches)
        self.update.backward(loss)
        loss = self.exchange.mean(loss.detach())
        self.update.step(self.taken, loss)
        self.losses.append(loss)


def plan_of(s: Settings, device: torch.device) -> Plan:
    """Work and memory by the model of them, without weights."""
    with torch.device("meta"):
        jepa = build_jepa(s)
    # A way that asks for what cannot be is planned all the same: it becomes a row with the reason when it is built.
    compiled = s.runtime.compile is True or compiles(s.runtime, device)
    return make_plan(s, jepa, build_masks(s), float("inf"), compiled=compiled)


def fit_together(plans: Sequence[Plan], usable: float) -> bool:
    """Whether the states of all these ways and the activations of any one of them are at most `usable` bytes."""
    states = sum(plan.state_bytes for plan in plans)
    most = max(sum(size for name, size in plan.held.items() if name not in STATE) for plan in plans)
    return states + most <= usable
