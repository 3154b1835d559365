"""Numbers that follow from the settings, before a run spends anything: tokens, work, memory, batch, schedule ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import nn

from fastjepa.build import length_of_slots, masks_by_length
from fastjepa.config import DataSet, Settings
from fastjepa.costs import Network, SetTokens, StepShape, Work, step_work
from fastjepa.dense import context_loss_weight
from fastjepa.jepa import JEPA
from fastjepa.masks import GeneratorCollator, Ragged, TokenSet
from fastjepa.memory import STATE, held_bytes
from fastjepa.models import VisionTransformer, VisionTransformerPredictor
from fastjepa.models.layers import SwiGLU
from fastjepa.schedules import build_schedule

# Steps, each with its own block size, and clips whose masks are drawn to count tokens: a fraction of a second.
MOST_DRAWS, MOST_CLIPS = 128, 3072
# Larger forward passes are hardly faster, and every group of clips has its own masks anyway.
MOST_AUTOMATIC = 64


@dataclass(frozen=True)
class Length:
    """Clips of one length of several: frames, their share of all clips, and tokens of a clip, as means."""

    frames: int
    share: float
    tokens: int
    sets: tuple[SetTokens, ...]
    union: float


@dataclass(frozen=True)
class Plan:
    """Derived numbers of a run. Tokens are means a clip; FLOP and bytes are a model's figures, not measurements.

    `flop_per_clip` is the work that the mathematics needs, whatever `runtime.execution` does: what MFU counts. Of clips
    of several `lengths` it is the mean, but shape and memory are those of the longest: a batch may have no others.
    """

    shape: StepShape
    flop_per_clip: float
    held: dict[str, float]
    lengths: tuple[Length, ...] = ()

    @property
    def work(self) -> list[Work]:
        """All items of a step: of clips of several lengths, those of each by its share."""
        shapes = [(x.share, replace(self.shape, tokens=x.tokens, sets=x.sets, union=x.union)) for x in self.lengths]
        return [
            replace(item, count=item.count * share)
            for share, one in shapes or [(1.0, self.shape)]
            for item in step_work(one)
        ]

    @property
    def tokens(self) -> int:
        """Tokens of a clip."""
        return self.shape.tokens

    @property
    def context(self) -> tuple[float, ...]:
        """Context tokens of every mask set."""
        return tuple(s.context for s in self.shape.sets)

    @property
    def target(self) -> tuple[float, ...]:
        """Target tokens of every mask set."""
        return tuple(s.target for s in self.shape.sets)

    @property
    def batch_size(self) -> int:
        """Clips of one forward pass."""
        return self.shape.batch

    @property
    def accumulation(self) -> int:
        """Forward passes of one step."""
        return self.shape.parts

    @property
    def state_bytes(self) -> float:
        """Bytes that are held whatever the batch: weights, gradients, moments, target encoder."""
        return sum(self.held[name] for name in STATE)


def make_plan(
    s: Settings,
    jepa: JEPA,
    masks: GeneratorCollator,
    usable: float,
    before: int | None = None,
    *,
    compiled: bool = False,
    processes: int = 1,
    shards: int = 1,
) -> Plan:
    """Work out the derived numbers, and the batch size where it is `auto`.

    `usable` are the bytes that the run may hold (`fastjepa.memory.usable_memory`), `compiled` whether its blocks are.
    `before` is what `auto` came to when the run began: another size would round differently and end the bitwise resume.
    `processes` share a step, and hold a part of `shards` of every weight each.
    """
    shape = replace(_shape(s, jepa, masks, compiled), processes=processes, shards=shards)
    batch = s.data.batch_size
    if batch == "auto":
        kept = before in batch_sizes(s, processes)
        fitting = [b for b in batch_sizes(s, processes) if b <= max(MOST_AUTOMATIC, s.data.clips_per_video)]
        largest = largest_fitting(s, shape, usable, fitting) or fitting[0]
        batch = before if before is not None and kept else largest
    shape = at_batch(s, shape, batch)
    minimal = replace(shape, packed=True, batch=1, parts=1, recomputed=0)
    lengths = _lengths(s) if len(s.data.lengths) > 1 else ()
    flop = sum(item.flop for item in Plan(minimal, 0.0, {}, lengths).work)
    return Plan(shape, flop, held_bytes(shape), lengths)


def batch_sizes(s: Settings, processes: int = 1) -> list[int]:
    """Every possible batch, ascending: divisors of what a process has of the global batch, in whole videos."""
    clips, own = s.data.clips_per_video, s.videos_per_step // processes
    return [clips * videos for videos in range(1, own + 1) if own % videos == 0]


def largest_fitting(s: Settings, shape: StepShape, usable: float, sizes: Sequence[int]) -> int | None:
    """The largest of these batches whose step holds at most `usable` bytes, or None."""
    fitting = [size for size in sizes if sum(held_bytes(at_batch(s, shape, size)).values()) <= usable]
    return max(fitting, default=None)


def at_batch(s: Settings, shape: StepShape, batch: int) -> StepShape:
    """The same step with another batch a forward pass."""
    videos = batch // s.data.clips_per_video
    group = {"tube": videos, "multiblock": 1 if s.mask.truncation == "none" else s.group}[s.mask.kind]
    runs = ceil(videos / group)  # with one length each: tubes all have the same
    return replace(shape, batch=batch, parts=s.optim.global_batch // (batch * shape.processes), runs=runs)


def describe(s: Settings, plan: Plan, jepa: JEPA) -> list[str]:
    """The plan in lines for a person."""
    million = {n: sum(p.numel() for p in getattr(jepa, n).parameters()) / 1e6 for n in ("encoder", "predictor")}
    schedule = build_schedule(s)
    last = s.optim.steps - 1
    lengths = [
        f"lengths    {one.share:.1%} of the clips have {one.frames} frames: {one.tokens} tokens; {_told(one.sets)}"
        for one in plan.lengths
    ]
    noise = f", noise: {s.model.noise}" if s.model.targets == "noised" else ""
    state, kept = plan.state_bytes, plan.held["activations"]
    # Where nothing leads up to it and nothing stays there, the run never has the rate that the line begins with.
    peak = [s.optim.lr] if s.optim.warmup_steps or schedule.lr_at(0) == s.optim.lr else []
    lrs = " -> ".join(f"{lr:.3g}" for lr in (schedule.lr_at(0), *peak, schedule.lr_at(last))) + _decay(s)
    decays = " -> ".join(f"{schedule.weight_decay_at(step):.3g}" for step in (0, last))
    momenta = " -> ".join(f"{schedule.momentum_at(step):.5g}" for step in (0, last))
    return [
        f"model      {s.model.name}, {million['encoder']:.1f} M + predictor {million['predictor']:.1f} M parameters, "
        f"targets: {s.model.targets}{noise}{_generation(s, plan.shape.levels)}",
        f"tokens     {plan.tokens} a clip; {_told(plan.shape.sets)}; {_rule(s)}",
        *lengths,
        f"clips      {_clips(s)}",
        f"batch      {s.optim.global_batch} clips a step = {plan.batch_size} x {plan.accumulation} accumulated"
        f"{'' if plan.shape.processes == 1 else f' x {plan.shape.processes} processes'}, "
        f"{s.optim.dtype}, execution {s.runtime.execution}",
        f"work       {plan.flop_per_clip / 1e12:.3g} TFLOP a clip; memory by the model: "
        f"{_gigabytes(state)} state + {_gigabytes(kept)} activations",
        f"schedule   {s.optim.steps} steps, {s.optim.warmup_steps} of warm-up; lr {lrs}, weight decay {decays}, "
        f"momentum {momenta}",
    ]


def _told(sets: Sequence[SetTokens]) -> str:
    return "; ".join(f"set {i}: {one.context:.0f} context, {one.target:.0f} target" for i, one in enumerate(sets))


def _decay(s: Settings) -> str:
    """How the learning rate falls, where that is not half a cosine after the warm-up; and where it is cut off."""
    o, told = s.optim, []
    if o.decay == "constant":
        return " (constant after the warm-up)"
    if o.decay_steps is not None:
        told.append(f"{o.decay} over the last {o.decay_steps} steps, constant before them")
    elif o.decay != "cosine":
        told.append(f"{o.decay} after the warm-up" if o.warmup_steps else f"{o.decay} from the first step")
    if told and s.compat.ipe_scale > 1:
        told.append(f"cut off before {o.final_lr:.3g} by compat.ipe_scale {s.compat.ipe_scale:g}")
    return f" ({'; '.join(told)})" if told else ""


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2g} GB" if number < 1e11 else f"{number / 1e9:.0f} GB"


def _rule(s: Settings) -> str:
    """How masks are drawn, and cut where they are."""
    if s.mask.kind == "tube":
        return f"tube masks, ratio {s.mask.ratio:g}"
    videos = s.data.clips_per_video > 1
    group = f"group of {s.group}" + " videos" * videos + (" (the whole batch)" if s.group < s.mask.group else "")
    return f"{s.mask.kind} masks, truncation {s.mask.truncation}, {group}"


def _clips(s: Settings) -> str:
    d = s.data
    cuts = dict.fromkeys("single frames" if one.frames == 1 else f"{one.frames} frames {_pace(one)}" for one in d.sets)
    parts = [f"{' or '.join(cuts)} of {d.crop} px"]
    if len(cuts) == 1 and d.sets[0].frames != 1:
        parts = [f"{d.frames} frames of {d.crop} px {_pace(d.sets[0])}"]
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


def _pace(one: DataSet) -> str:
    """How far the frames of a clip lie apart."""
    if one.fps is not None:
        return f"at {one.fps:g} frames/s"
    return f"over {one.duration:g} s at any frame rate" if one.duration is not None else f"at stride {one.stride}"


def _lengths(s: Settings) -> tuple[Length, ...]:
    """Tokens of every length, and how many of the clips have it."""
    found, shares = [], s.data.shares
    for frames, masks in masks_by_length(s).items():
        tokens = frames // s.data.tubelet * (s.data.crop // s.data.patch) ** 2
        sets, union = _mean_tokens(s, masks, tokens, _slots_of_length(s, frames))
        # With the dense loss every token is compared.
        found.append(Length(frames, shares[frames], tokens, sets, tokens if s.loss.context else union))
    return tuple(found)


def _generation(s: Settings, levels: int) -> str:
    """What is not of the first generation."""
    positions = {"table": "", "rope": ", rotary positions", "rope_v2": ", rotary positions as in the released V-JEPA 2"}
    deep = f", of {levels} levels" if s.model.levels == "deep" else ""
    dense = ""
    if s.loss.context:
        loss = s.loss
        reached = context_loss_weight(s.optim.steps - 1, loss.context, loss.context_start, loss.context_full)
        share = f"{reached:.3g} at the last step, of " if reached < loss.context else ""
        dense = f", context tokens too (weight {share}{loss.context:g})"
    gated = {"mlp": s.model.mlp, "predictor_mlp": s.model.predictor_mlp}
    layers = "".join(f", {name}: {kind}" for name, kind in gated.items() if kind != "gelu")
    dropped = f", drop path up to {s.model.drop_path:g}" if s.model.drop_path else ""
    return positions[s.model.positions] + layers + dropped + deep + dense


def fuses(s: Settings) -> bool:
    """Whether kernels run the elementwise work of the blocks, which is most of it."""
    kernels = s.runtime.kernels
    chosen = [kernels] * 2 if isinstance(kernels, str) else [kernels.get("norm"), kernels.get("mlp")]
    return all(name in ("triton", "fused") for name in chosen)


def _shape(s: Settings, jepa: JEPA, masks: GeneratorCollator, compiled: bool) -> StepShape:
    """The step at one clip a forward pass."""
    encoder, predictor = jepa.encoder, jepa.predictor
    assert isinstance(encoder, VisionTransformer) and isinstance(predictor, VisionTransformerPredictor)  # noqa: PT018
    alike = _slots_of_length(s, s.data.lengths[-1]) if len(s.data.lengths) > 1 else None
    sets, union = _mean_tokens(s, masks, encoder.num_patches, alike)
    if s.loss.context:  # every token is compared
        union = encoder.num_patches
    packed, half = s.runtime.execution == "packed", s.optim.dtype != "float32"
    shape = StepShape(
        encoder=_network(encoder, encoder.blocks),
        predictor=_network(predictor, predictor.predictor_blocks),
        tokens=encoder.num_patches,
        patch_values=3 * s.data.tubelet * s.data.patch**2,
        sets=sets,
        union=union,
        batch=1,
        parts=1,
        runs=1,
        packed=packed,
        fused=fuses(s),
        compiled=compiled,
        recomputed=s.runtime.recompute,
        value_bytes=2 if half else 4,
        pixel_bytes=4 if s.data.erase else 1,  # erased boxes hold noise that bytes cannot
        masters=packed and s.optim.dtype == "bfloat16",
        loss_scaled=s.optim.dtype == "float16",
        noised=s.model.targets == "noised",
        clipped=s.optim.clip_grad is not None,
        regularised=s.loss.reg_coeff > 0,
        rotary=s.model.positions != "table",
        levels=encoder.number_of_levels,
        dense=s.loss.context > 0,
    )
    return at_batch(s, shape, s.data.clips_per_video)


def _network(network: nn.Module, blocks: nn.ModuleList) -> Network:
    block, counts = blocks[0], {True: 0, False: 0}
    for parameter in network.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    first = block.mlp.fc1  # type: ignore[union-attr]
    assert isinstance(first, nn.Linear)
    heads = block.attn.num_heads  # type: ignore[union-attr]
    assert isinstance(heads, int)
    gated = isinstance(block.mlp, SwiGLU)
    return Network(first.in_features, len(blocks), heads, first.out_features, counts[True], counts[False], gated)


def _slots_of_length(s: Settings, frames: int) -> Callable[[int], bool]:
    length_of = length_of_slots(s)
    return lambda slot: length_of(slot) == frames


def _mean_tokens(
    s: Settings, masks: GeneratorCollator, tokens: int, alike: Callable[[int], bool] | None
) -> tuple[tuple[SetTokens, ...], float]:
    """Means over clips of the masks that the run draws, a mask set each, and of the tokens that any set predicts.

    Where clips have several lengths, `alike` are the slots of those with the length of these masks: only they count,
    and only they are cut together. If it is so rare that none of the slots looked at is, all of them count.
    """
    # In videos: their clips share masks, so the mean over videos is the mean over clips.
    group = s.group if s.mask.truncation != "none" else min(8, s.videos_per_step)
    draws = max(1, min(MOST_DRAWS, MOST_CLIPS // group))
    groups = [[step * s.videos_per_step + place for place in range(group)] for step in range(draws)]
    found = groups if alike is None else [[slot for slot in slots if alike(slot)] for slots in groups]
    if not any(found):
        found, alike = groups, None
    counted: list[list[tuple[int, int]]] = [[] for _ in range(s.mask.number_of_sets)]
    union = 0
    for step, slots in enumerate(found):
        if not slots:
            continue
        context, target = masks.draw(step, slots) if alike is None else masks.draw(step, slots, alike)
        for pairs, c_set, t_set in zip(counted, context, target):
            pairs.extend((len(c), len(t)) for c, t in zip(_by_clip(c_set), _by_clip(t_set)))
        asked = torch.zeros(len(slots), tokens, dtype=torch.bool)
        for t_set in target:
            for clip, index in enumerate(_by_clip(t_set)):
                asked[clip, index] = True
        union += int(asked.sum())
    return tuple(_set_tokens(pairs) for pairs in counted), union / sum(map(len, found))


def _by_clip(token_set: TokenSet) -> Sequence[torch.Tensor]:
    return token_set.index.split(list(token_set.lengths)) if isinstance(token_set, Ragged) else list(token_set)


def _set_tokens(pairs: list[tuple[int, int]]) -> SetTokens:
    def mean(values: list[int]) -> float:
        return sum(values) / len(values)

    return SetTokens(
        mean([c for c, _ in pairs]),
        mean([t for _, t in pairs]),
        mean([c * c for c, _ in pairs]),
        mean([(c + t) ** 2 for c, t in pairs]),
        mean([t * (c + t) for c, t in pairs]),
    )
