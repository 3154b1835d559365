"""Numbers that follow from the settings, before a run spends anything: tokens, work, memory, batch, schedule ends."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fastjepa.build import build_schedule
from fastjepa.config import Settings
from fastjepa.jepa import JEPA
from fastjepa.masks import GeneratorCollator, Ragged, TokenSet
from fastjepa.models import VisionTransformer

DRAWS = 32
# bf16 tensor-core peak of one chip, dense, in FLOP/s: what MFU is counted against.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}


@dataclass(frozen=True)
class Plan:
    """Derived numbers of a run. Tokens are means a clip; FLOP and bytes are a model's figures, not measurements."""

    tokens: int
    context: tuple[float, ...]
    target: tuple[float, ...]
    flop_per_clip: float
    state_bytes: int
    activation_bytes_per_clip: float
    batch_size: int
    accumulation: int


def make_plan(
    s: Settings, jepa: JEPA, masks: GeneratorCollator, device: torch.device, before: int | None = None
) -> Plan:
    """Work out the derived numbers, and the batch size where it is `auto`.

    `before` is what `auto` came to when the run began: another size would round differently and end the bitwise resume.
    """
    encoder = jepa.encoder
    assert isinstance(encoder, VisionTransformer)
    context, target = _mean_tokens(s, masks)
    state = sum(p.nbytes * (4 if p.requires_grad else 1) for p in jepa.parameters())
    activations = _activation_bytes(s, encoder, context, target)
    batch = s.data.batch_size
    if batch == "auto":
        usable = before and s.optim.global_batch % before == 0 and before % s.data.clips_per_video == 0
        batch = before if before is not None and usable else _fitting(s, state, activations, device)
    return Plan(
        encoder.num_patches,
        context,
        target,
        _flop(s, encoder, context, target),
        state,
        activations,
        batch,
        s.optim.global_batch // batch,
    )


def describe(s: Settings, plan: Plan, jepa: JEPA) -> list[str]:
    """The plan in lines for a person."""
    million = {n: sum(p.numel() for p in getattr(jepa, n).parameters()) / 1e6 for n in ("encoder", "predictor")}
    schedule = build_schedule(s)
    last = s.optim.steps - 1
    sets = "; ".join(
        f"set {i}: {c:.0f} context, {t:.0f} target" for i, (c, t) in enumerate(zip(plan.context, plan.target))
    )
    noise = f", noise: {s.model.noise}" if s.model.targets == "noised" else ""
    state, kept = plan.state_bytes / 1e9, plan.activation_bytes_per_clip * plan.batch_size / 1e9
    lrs = " -> ".join(f"{lr:.3g}" for lr in (schedule.lr_at(0), s.optim.lr, schedule.lr_at(last)))
    decays = " -> ".join(f"{schedule.weight_decay_at(step):.3g}" for step in (0, last))
    momenta = " -> ".join(f"{schedule.momentum_at(step):.5g}" for step in (0, last))
    return [
        f"model      {s.model.name}, {million['encoder']:.1f} M + predictor {million['predictor']:.1f} M parameters, "
        f"targets: {s.model.targets}{noise}",
        f"tokens     {plan.tokens} a clip; {sets}; {_rule(s)}",
        f"clips      {_clips(s)}",
        f"batch      {s.optim.global_batch} clips a step = {plan.batch_size} x {plan.accumulation} accumulated, "
        f"{s.optim.dtype}, execution {s.runtime.execution}",
        f"work       {plan.flop_per_clip / 1e12:.3g} TFLOP a clip; memory by the model: "
        f"{state:.2g} GB state + {kept:.2g} GB activations",
        f"schedule   {s.optim.steps} steps, {s.optim.warmup_steps} of warm-up; lr {lrs}, weight decay {decays}, "
        f"momentum {momenta}",
    ]


def _rule(s: Settings) -> str:
    """How masks are drawn, and cut where they are."""
    if s.mask.kind == "tube":
        return f"tube masks, ratio {s.mask.ratio:g}"
    videos = s.data.clips_per_video > 1
    group = f"group of {s.group}" + " videos" * videos + (" (the whole batch)" if s.group < s.mask.group else "")
    return f"{s.mask.kind} masks, truncation {s.mask.truncation}, {group}"


def _fitting(s: Settings, state: int, activations: float, device: torch.device) -> int:
    """The largest divisor of the global batch, up to 64, in whole videos, whose activations fit beside the state."""
    room = max(0.0, 0.6 * (_memory(device) - state))
    clips = s.data.clips_per_video
    most = max(1, min(int(room // activations), s.optim.global_batch, 64) // clips)
    return clips * max(videos for videos in range(1, most + 1) if s.videos_per_step % videos == 0)


def _clips(s: Settings) -> str:
    d = s.data
    pace = f"at stride {d.stride}" if d.duration is None else f"over {d.duration:g} s at any frame rate"
    parts = [f"{d.frames} frames of {d.crop} px {pace}"]
    if d.clips_per_video > 1:
        parts.append(f"{d.clips_per_video} of each video with the same masks ({s.videos_per_step} videos a step)")
    if d.filter_short:
        parts.append("shorter videos are replaced")
    if d.motion_shift:
        parts.append("the crop moves")
    if d.auto_augment:
        parts.append("RandAugment")
    if d.erase:
        parts.append(f"a box is erased in {d.erase:.0%} of the clips")
    return "; ".join(parts)


def _mean_tokens(s: Settings, masks: GeneratorCollator) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # In videos: their clips share masks, so the mean over videos is the mean over clips.
    group = s.group if s.mask.truncation != "none" else min(8, s.videos_per_step)
    sums = [[0.0] * s.mask.number_of_sets, [0.0] * s.mask.number_of_sets]
    draws = max(1, min(DRAWS, 256 // group))
    for step in range(draws):
        slots = range(step * s.videos_per_step, step * s.videos_per_step + group)
        for side, sets in enumerate(masks.draw(step, slots)):
            for number, token_set in enumerate(sets):
                sums[side][number] += _tokens(token_set) / group / draws
    return tuple(sums[0]), tuple(sums[1])


def _tokens(token_set: TokenSet) -> int:
    return sum(token_set.lengths) if isinstance(token_set, Ragged) else token_set.numel()


def _flop(s: Settings, encoder: VisionTransformer, context: tuple[float, ...], target: tuple[float, ...]) -> float:
    """FLOP of one clip, forward and backward, with the work that the mathematics needs.

    A multiply-add counts 2; backward twice the forward; kept patches embedded once a pass; the predictor's last layer
    only for target rows.
    """
    width, depth = encoder.embed_dim, len(encoder.blocks)
    block = sum(p.numel() for p in encoder.blocks[0].parameters() if p.ndim > 1)
    narrow, layers = s.model.predictor_dim, s.model.predictor_depth
    pixels = 3 * s.data.tubelet * s.data.patch**2
    n = encoder.num_patches
    small = 12 * narrow**2
    target_pass = 2 * n * (pixels * width + depth * block) + depth * 4 * n * n * width
    total = float(target_pass)
    for c, t in zip(context, target):
        total += 3 * depth * (2 * c * block + 4 * c * c * width) + 2 * 2 * c * pixels * width
        rows = c + t
        total += 3 * (layers - 1) * (2 * rows * small + 4 * rows * rows * narrow)
        total += 3 * (2 * t * small + 2 * c * 2 * narrow**2 + 4 * t * rows * narrow)
        total += 3 * 2 * (c + t) * width * narrow
        if s.model.targets == "noised":  # target features are projected too; nothing flows back into them
            total += 2 * 2 * t * width * narrow
    return total


def _activation_bytes(
    s: Settings, encoder: VisionTransformer, context: tuple[float, ...], target: tuple[float, ...]
) -> float:
    """Bytes kept for the backward pass of one clip: about 34 values a token and channel in every block (eager)."""
    size = 4 if s.optim.dtype == "float32" else 2
    values = sum(context) * encoder.embed_dim * len(encoder.blocks)
    values += (sum(context) + sum(target)) * s.model.predictor_dim * s.model.predictor_depth * 1.5
    # The target pass keeps nothing, but its widest layer is alive for a moment.
    return 34.0 * size * values + 12.0 * size * encoder.num_patches * encoder.embed_dim


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, float(text))
    return available


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of the device, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)
