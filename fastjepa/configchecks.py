"""Checks that need more than one setting. Each gives (keys involved, one sentence)."""

from collections.abc import Iterator
from math import isfinite
from typing import Any

from fastjepa.config import Data, DataSet, Mask, MaskSet, Settings

Mistake = tuple[tuple[str, ...], str]


def cross_checks(s: Settings, *, stored: bool = False) -> Iterator[Mistake]:
    """Every contradiction between settings that are valid one by one.

    Those that are `stored` with a run may hold what nothing reads: it does no harm, and an earlier version took it.
    """
    yield from _networks(s)
    if not stored:
        yield from _unread(s)
    yield from _clips(s)
    yield from _masks(s)
    yield from _lengths(s)
    yield from _batches(s)
    yield from _schedule(s)
    yield from _context_loss(s)
    yield from _ranges(s)
    yield from _execution(s)
    yield from _profile(s)
    if s.init.optimizer and s.init.from_ is None:
        yield ("init.optimizer", "init.from"), "init.optimizer: expected false without init.from, given true"
    if s.accept_changes and s.resume in ("auto", "never"):
        yield (
            ("accept_changes", "resume"),
            f"accept_changes: expected false unless resume names the run to go on with, given true with resume "
            f"{s.resume}",
        )


# Heads of the named encoders, which the predictor shares unless it is given its own.
HEADS = {
    "vit_nano": 2, "vit_tiny": 3, "vit_small": 6, "vit_base": 12,
    "vit_large": 16, "vit_huge": 16, "vit_giant": 16, "vit_gigantic": 16,
    "vit_giant_xformers": 22, "vit_gigantic_xformers": 26,
}  # fmt: skip

# How far the frames of a clip lie apart, in one of three ways.
PACES = ("stride", "duration", "fps")

# Channels of the narrowest head that rotary positions can turn: a pair for each of three axes.
NARROWEST_ROTARY = 6


def _networks(s: Settings) -> Iterator[Mistake]:
    heads = s.model.predictor_heads or HEADS[s.model.name]
    if s.model.predictor_dim % heads:
        whose = "model.predictor_heads" if s.model.predictor_heads else f"the {s.model.name} heads"
        yield (
            ("model.predictor_dim", "model.predictor_heads", "model.name"),
            f"model.predictor_dim: expected a multiple of {whose} {heads}, given {s.model.predictor_dim}",
        )
    elif s.model.positions != "table" and s.model.predictor_dim // heads < NARROWEST_ROTARY:
        which = "model.predictor_heads" if s.model.predictor_heads else "model.name"
        yield (
            ("model.predictor_dim", which, "model.positions"),
            f"model.predictor_dim: expected at least {NARROWEST_ROTARY} channels for each of the {heads} heads "
            f"({which}) with model.positions {s.model.positions}, which turns pairs of them along three axes, given "
            f"{s.model.predictor_dim}",
        )


def _unread(s: Settings) -> Iterator[Mistake]:
    """Settings that nothing reads beside another one: they would give another run the same numbers."""
    unread = [("model.targets", "model.noise" if s.model.targets == "mask_tokens" else "model.zero_init_mask_tokens")]
    if s.model.targets == "noised":
        unread.append(("model.targets", "compat.mask_token_by_length"))
    elif s.mask.kind == "tube":  # one mask set, and so one mask token
        unread.append(("mask.kind", "compat.mask_token_by_length"))
    if s.model.positions != "table":
        unread += [("model.positions", "model.uniform_power"), ("model.positions", "compat.ema_positions")]
    if not s.loss.context:
        unread += [("loss.context", f"loss.context_{name}") for name in ("start", "full", "distance")]
    if s.optim.clip_grad is None:
        unread += [("optim.clip_grad", f"compat.clip_{name}") for name in ("per_network", "after_warmup")]
    if s.optim.decay == "constant":
        unread.append(("optim.decay", "optim.final_lr"))
    if s.data.sampling == "replacement":
        unread.append(("data.sampling", "data.shuffle_window"))
    yield from _paces_of_single_frames(s.data)
    default = Settings()
    for reader, key in unread:
        (expected, given), kind = (_value(one, key) for one in (default, s)), _value(s, reader)
        if given != expected:
            shown = f"{kind:g}" if isinstance(kind, float) else "null" if kind is None else kind
            yield (
                (key, reader),
                f"{key}: expected the default {str(expected).lower()} with {reader} {shown}, "
                f"given {str(given).lower()}",
            )


def _value(s: Settings, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(s, section), name)


# Pieces of the packed step whose kernels can compute the matrix product too.
WITH_PRODUCT = ("embed", "mlp")
MOST_PROFILED = 100


def _execution(s: Settings) -> Iterator[Mistake]:
    r = s.runtime
    named = r.kernels if isinstance(r.kernels, dict) else {}
    taken = {r.kernels} if isinstance(r.kernels, str) else set(named.values())
    if r.execution == "reference":
        for key, expected, given, wrong in (
            ("kernels", "auto or library", _shown(r.kernels), taken - {"auto", "library"}),
            ("attention", "auto", r.attention, r.attention != "auto"),
        ):
            if wrong:
                yield (
                    (f"runtime.{key}", "runtime.execution"),
                    f"runtime.{key}: expected {expected} with runtime.execution reference, which runs like the public "
                    f"code, given {given}",
                )
    if r.parallel == "fsdp2":
        for key, expected, given in (
            ("runtime.execution", "packed", r.execution),
            ("optim.dtype", "bfloat16 or float32", s.optim.dtype),
        ):
            if given not in expected:
                yield (
                    (key, "runtime.parallel"),
                    f"{key}: expected {expected} with runtime.parallel fsdp2, given {given}",
                )
    for piece, name in named.items():
        if name == "fused" and piece not in WITH_PRODUCT:
            yield (
                ("runtime.kernels",),
                f"runtime.kernels: expected fused for {' or '.join(WITH_PRODUCT)}, whose kernels have a matrix "
                f"product, given it for {piece}",
            )
    own = r.kernels if isinstance(r.kernels, str) else named.get("attention", "auto")
    if r.attention != "auto" and named.get("attention", "auto") != "auto":
        yield (
            ("runtime.attention", "runtime.kernels"),
            f"runtime.attention: expected auto beside attention in runtime.kernels, which names another way, given "
            f"{r.attention}",
        )
    if r.attention == "xformers" and r.compile is True:
        yield (
            ("runtime.attention", "runtime.compile"),
            "runtime.attention: expected another than xformers with runtime.compile true: its mask is built on the "
            "host, and compiled code would be made anew in every step",
        )
    indexed = r.attention == "indexed" or (r.attention == "auto" and own in ("reference", "triton"))
    size = s.model.predictor_dim // (s.model.predictor_heads or HEADS[s.model.name])
    if indexed and (size % 8 or not 16 <= size <= 128):
        key, expected = ("attention", "another") if r.attention == "indexed" else ("kernels", "auto or library")
        yield (
            (f"runtime.{key}", "model.predictor_dim", "model.predictor_heads"),
            f"runtime.{key}: expected {expected} with a predictor head size of {size} (the kernels take 16 to "
            f"128 in steps of 8), given {r.attention if key == 'attention' else _shown(r.kernels)}",
        )


def _profile(s: Settings) -> Iterator[Mistake]:
    given = s.runtime.profile
    if given is None:
        return
    first, last = map(int, given.split(".."))
    every = s.eval.every
    expected = ""
    if last < first:
        expected = "the first step before the last"
    elif last > s.last_step:
        expected = f"steps up to the last of this run, {s.last_step}"
    elif last - first >= MOST_PROFILED:
        expected = f"at most {MOST_PROFILED} steps, whose trace is large already"
    elif every and (last - 1) // every > (first - 1) // every:
        step = (last - 1) // every * every
        expected = f"steps without a probe between them (eval.every {every} has one after step {step})"
    if expected:
        keys = ("runtime.profile", "runtime.stop_at", "optim.steps", "eval.every")
        yield keys, f"runtime.profile: expected {expected}, given {given}"


def _shown(kernels: str | dict) -> str:
    if isinstance(kernels, str):
        return kernels
    return "{" + ", ".join(f"{piece}: {name}" for piece, name in kernels.items()) + "}"


def _clips(s: Settings) -> Iterator[Mistake]:
    d = s.data
    if d.frames < d.tubelet:
        yield (
            ("data.frames", "data.tubelet"),
            f"data.frames: expected at least one tubelet of {d.tubelet} frames, given {d.frames}",
        )
    elif d.frames % d.tubelet:
        yield (
            ("data.frames", "data.tubelet"),
            f"data.frames: expected a multiple of data.tubelet {d.tubelet}, given {d.frames}",
        )
    yield from _data_sets(d)
    if d.crop % d.patch:
        yield (
            ("data.crop", "data.patch"),
            f"data.crop: expected a multiple of data.patch {d.patch}, given {d.crop}",
        )
    stride = type(d)().stride
    if d.duration is not None and d.stride != stride:
        yield (
            ("data.stride", "data.duration"),
            f"data.stride: expected its default {stride} beside data.duration, which takes its place, given {d.stride} "
            f"(over a recipe that has one, add data.stride={stride})",
        )
    if d.fps is not None and d.stride != stride:
        yield (
            ("data.stride", "data.fps"),
            f"data.stride: expected its default {stride} beside data.fps, which takes its place, given {d.stride} "
            f"(over a recipe that has one, add data.stride={stride})",
        )
    if s.compat.fps_whole_stride and all(one.fps is None for one in d.sets):
        yield (
            ("compat.fps_whole_stride", "data.fps", "data.path"),
            "compat.fps_whole_stride: expected false without data.fps, which it rounds, given true",
        )
    if d.fps is not None and d.duration is not None:
        yield (
            ("data.fps", "data.duration"),
            f"data.fps: expected null beside data.duration, which says the same in seconds, given {d.fps:g}",
        )
    if d.decoder in ("dali_gpu", "dali_cpu") and len(d.lengths) > 1:
        yield (
            ("data.decoder", "data.path"),
            "data.decoder: expected auto, pyav or torchcodec where data.path has clips of several lengths, which DALI "
            f"does not decode together, given {d.decoder}",
        )
    elif d.decoder in ("dali_gpu", "dali_cpu") and (own := needs_frames(s)):
        yield (
            ("data.decoder", own),
            f"data.decoder: expected auto, pyav or torchcodec beside {own}, which works on whole frames in the loader "
            f"processes, given {d.decoder}",
        )


def _paces_of_single_frames(d: Data) -> Iterator[Mistake]:
    for path, one in d.path.items() if isinstance(d.path, dict) else ():
        if not isinstance(one, DataSet) or one.frames != 1:
            continue
        key = next((key for key in PACES if getattr(one, key) is not None), None)
        if key is not None:
            yield (
                ("data.path",),
                f"data.path: expected no {key} beside frames 1, for there is no next frame, given "
                f"{getattr(one, key):g} for {path}",
            )


def _data_sets(d: Data) -> Iterator[Mistake]:
    """The clips that data sets have of their own, and their weights together."""
    if not isfinite(sum(one.weight for one in d.sets)):
        yield ("data.path",), "data.path: expected weights whose sum is a number, given weights that overflow"
    for path, one in d.path.items() if isinstance(d.path, dict) else ():
        if not isinstance(one, DataSet):
            continue
        if one.frames is not None and one.frames != 1 and (one.frames % d.tubelet or one.frames > d.frames):
            longest = max(other.frames or 0 for other in d.sets)
            longer = one.frames > d.frames and longest % d.tubelet == 0
            way_out = f" (or set data.frames={longest})" if longer else ""
            yield (
                ("data.path", "data.frames", "data.tubelet"),
                f"data.path: expected frames 1 or a multiple of data.tubelet {d.tubelet} up to data.frames {d.frames}, "
                f"the longest clip of the networks, given {one.frames} for {path}{way_out}",
            )
        named = [key for key in PACES if getattr(one, key) is not None]
        if len(named) > 1 and one.frames != 1:
            yield (
                ("data.path",),
                f"data.path: expected one of stride, duration and fps, which say the same, given {' and '.join(named)} "
                f"for {path}",
            )


def _lengths(s: Settings) -> Iterator[Mistake]:
    """What clips of several lengths go with."""
    d, lengths = s.data, s.data.lengths
    if lengths[-1] != d.frames and d.frames >= d.tubelet and not any(_data_sets(d)):
        yield (
            ("data.frames", "data.path"),
            f"data.frames: expected {lengths[-1]}, the longest clip of a data set in data.path, given {d.frames}",
        )
    if len(lengths) == 1:
        if s.loss.lengths != "clips":
            yield (
                ("loss.lengths", "data.path"),
                f"loss.lengths: expected the default clips where all clips have one length, given {s.loss.lengths}",
            )
    elif s.compat.mask_token_by_length:
        yield (
            ("compat.mask_token_by_length", "data.path"),
            "compat.mask_token_by_length: expected false where data.path has clips of several lengths, not all of "
            "which are in every batch, given true",
        )


def needs_frames(s: Settings) -> str:
    """The setting that needs decoded frames in the loader processes, which DALI does not give; empty where none is."""
    if len(s.data.lengths) > 1:
        return "a data.path with clips of several lengths"
    wanted = [key for key in ("motion_shift", "auto_augment", "erase", "cache_gb") if getattr(s.data, key)]
    return f"data.{wanted[0]}" if wanted else ""


def _masks(s: Settings) -> Iterator[Mistake]:
    """What only the other kind of mask reads must be at its default."""
    default, kind = Mask(), s.mask.kind
    # A recipe may set what tubes do not read, and single settings cannot take it back.
    way_out = "; mask={kind: tube} in the place of single settings of mask drops those of a recipe"
    way_out = way_out if kind == "tube" else ""
    for key in ("truncation", "group") if kind == "tube" else ("ratio",):
        expected, given = getattr(default, key), getattr(s.mask, key)
        if given != expected:
            yield (
                (f"mask.{key}", "mask.kind"),
                f"mask.{key}: expected the default {expected} with mask.kind {kind}, given {given}{way_out}",
            )
    if kind == "tube" and s.mask.sets != default.sets:
        yield (
            ("mask.sets", "mask.kind"),
            "mask.sets: expected the default with mask.kind tube, which draws one set by mask.ratio, given other sets"
            f"{way_out}",
        )
    for number, one in enumerate(s.mask.sets):
        yield from _mask_options(f"mask.sets.{number}", one, s.mask.truncation)


def _mask_options(where: str, one: MaskSet, truncation: str) -> Iterator[Mistake]:
    """An option of a mask set that another setting leaves without effect."""
    key, other = f"{where}.pred_full_complement", f"{where}.full_complement"
    if one.pred_full_complement and one.full_complement:
        yield (key, other), f"{key}: expected false beside full_complement, which also fills what cutting dropped"
    elif one.pred_full_complement and one.max_keep is not None:
        yield (
            (key, f"{where}.max_keep"),
            f"{key}: expected false beside max_keep, whose limit of the context it would undo",
        )
    # Without cutting, only max_keep drops tokens, and only from the context.
    for option, given in ((key, one.pred_full_complement), (other, one.full_complement and one.max_keep is None)):
        if given and truncation == "none":
            yield (option, "mask.truncation"), f"{option}: expected false with mask.truncation none, which cuts nothing"


def _batches(s: Settings) -> Iterator[Mistake]:
    total, size, clips = s.optim.global_batch, s.data.batch_size, s.data.clips_per_video
    for key, number in (("optim.global_batch", total), ("data.batch_size", size)):
        if isinstance(number, int) and number % clips:
            yield (
                (key, "data.clips_per_video"),
                f"{key}: expected a multiple of data.clips_per_video {clips}, given {number}",
            )
    if isinstance(size, int) and total % size:
        yield (
            ("optim.global_batch", "data.batch_size"),
            f"optim.global_batch: expected a multiple of data.batch_size {size}, given {total}",
        )
    cut = s.mask.kind == "multiblock" and s.mask.truncation != "none"
    if cut and total % clips == 0 and s.videos_per_step % s.group:
        times = "" if clips == 1 else f" x data.clips_per_video {clips}"
        yield (
            ("optim.global_batch", "mask.group", "data.clips_per_video"),
            f"optim.global_batch: expected a multiple of mask.group {s.mask.group}{times}, given {total}",
        )


def _schedule(s: Settings) -> Iterator[Mistake]:
    o = s.optim
    if o.warmup_steps > o.steps:
        yield (
            ("optim.warmup_steps", "optim.steps"),
            f"optim.warmup_steps: expected at most optim.steps {o.steps}, given {o.warmup_steps}",
        )
    elif o.decay_steps is not None and o.warmup_steps + o.decay_steps > o.steps:
        yield (
            ("optim.decay_steps", "optim.warmup_steps", "optim.steps"),
            f"optim.decay_steps: expected at most the {o.steps - o.warmup_steps} steps of optim.steps {o.steps} after "
            f"optim.warmup_steps {o.warmup_steps}, given {o.decay_steps}",
        )
    if o.decay == "constant" and o.decay_steps is not None:
        yield (
            ("optim.decay_steps", "optim.decay"),
            f"optim.decay_steps: expected null with optim.decay constant, which has no decay, given {o.decay_steps}",
        )
    if s.runtime.stop_at is not None and s.runtime.stop_at > o.steps:
        yield (
            ("runtime.stop_at", "optim.steps"),
            f"runtime.stop_at: expected at most optim.steps {o.steps}, given {s.runtime.stop_at}",
        )
    for index, beta in enumerate(o.betas):
        if not 0 <= beta < 1:
            yield (
                ("optim.betas",),
                f"optim.betas: expected numbers from 0 to below 1, given {beta} at place {index + 1}",
            )


def _context_loss(s: Settings) -> Iterator[Mistake]:
    loss = s.loss
    if loss.context and loss.context_full < loss.context_start:
        yield (
            ("loss.context_full", "loss.context_start"),
            f"loss.context_full: expected at least loss.context_start {loss.context_start}, given {loss.context_full}",
        )
    if loss.context and loss.context_start >= s.optim.steps:
        yield (
            ("loss.context_start", "optim.steps"),
            f"loss.context_start: expected less than optim.steps {s.optim.steps}, given {loss.context_start}",
        )


def _ranges(s: Settings) -> Iterator[Mistake]:
    ranges = [("data.scale", s.data.scale, 1.0), ("data.aspect", s.data.aspect, None)]
    for number, mask in enumerate(s.mask.sets):
        where = f"mask.sets.{number}"
        ranges += [
            (f"{where}.spatial_scale", mask.spatial_scale, 1.0),
            (f"{where}.temporal_scale", mask.temporal_scale, 1.0),
            (f"{where}.aspect_ratio", mask.aspect_ratio, None),
        ]
    for key, (low, high), most in ranges:
        if not 0 < low <= high or (most is not None and high > most):
            limit = "" if most is None else f" <= {most:g}"
            yield (key,), f"{key}: expected 0 < low <= high{limit}, given [{low:g}, {high:g}]"
