"""Settings to objects."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fastjepa.compiling import compiles, run_blocks
from fastjepa.config import Data, DataSet, FeedForward, Settings
from fastjepa.data.batches import Lengths
from fastjepa.data.dataset import ClipDataset, Reader
from fastjepa.data.decoders.choose import Decoder
from fastjepa.data.decoders.dali import DaliDecoder
from fastjepa.data.decoders.stage import AHEAD, Decoding, Failures
from fastjepa.data.decoders.torchcodec import read_with_torchcodec
from fastjepa.data.media import read_frames
from fastjepa.data.order import Collection, VideoOrder
from fastjepa.data.processes import processors
from fastjepa.data.sampling import Augmentation, ClipPlan, ClipShape
from fastjepa.data.source import Videos
from fastjepa.exchange import Exchange
from fastjepa.jepa import JEPA
from fastjepa.masks import GeneratorCollator, MaskCollator, RandomTubeMaskCollator
from fastjepa.models import VisionTransformer, VisionTransformerPredictor, build_vit, vit_predictor
from fastjepa.models.initialise import redraw_linears
from fastjepa.models.layers import Attention
from fastjepa.models.operations import LIBRARY, Operations
from fastjepa.models.vision_transformer import SIZES, deep_levels
from fastjepa.optim import OptimizerPass
from fastjepa.parallel import DTYPES
from fastjepa.pieces import build_operations, explain_attention, update_kernels
from fastjepa.schedules import build_schedule

# A session of the GPU's decoder for each: more than its engines (seven on Hopper), so that none of them waits. An
# estimate from DALI's documentation until `bench/gpu.sh data` has measured it.
GPU_THREADS = 16


def build_jepa(s: Settings, operations: Operations = LIBRARY) -> JEPA:
    """Encoder, predictor and target encoder on the CPU, in float32: the same weights for the same seed."""
    torch.manual_seed(s.optim.seed)
    encoder = build_encoder(s)
    predictor = _predictor(s, encoder)
    if s.compat.reinit:
        redraw_linears(encoder, s.model.init_std)
        redraw_linears(predictor, s.model.init_std)
    if s.compat.mask_token_by_length and predictor.mask_tokens is not None:
        # All clips have one length: nothing reads the tokens after the first. AdamW leaves weights without a gradient
        # alone, but processes that train together would wait for it.
        for token in list(predictor.mask_tokens)[1:]:
            token.requires_grad_(False)
    return JEPA(
        encoder,
        predictor,
        loss_exp=s.loss.exponent,
        reg_coeff=s.loss.reg_coeff,
        execution=s.runtime.execution,
        operations=operations,
        mask_token_by="length" if s.compat.mask_token_by_length else "set",
        context_distance=s.loss.context_distance,
    )


def draw_encoder(s: Settings) -> VisionTransformer:
    """The encoder that `build_jepa` begins with, alone: the same weights for the same seed, without gradients."""
    torch.manual_seed(s.optim.seed)
    encoder = build_encoder(s)
    if s.compat.reinit:
        _predictor(s, encoder)  # its draws come before the encoder's second ones
        redraw_linears(encoder, s.model.init_std)
    return encoder.requires_grad_(False)


def _predictor(s: Settings, encoder: VisionTransformer) -> VisionTransformerPredictor:
    return vit_predictor(
        embed_dim=encoder.embed_dim,
        predictor_embed_dim=s.model.predictor_dim,
        depth=s.model.predictor_depth,
        num_heads=s.model.predictor_heads or encoder.num_heads,
        use_mask_tokens=s.model.targets == "mask_tokens",
        num_mask_tokens=s.mask.number_of_sets,
        zero_init_mask_tokens=s.model.zero_init_mask_tokens,
        noise=s.model.noise,
        levels=encoder.number_of_levels,
        predict_context=s.loss.context > 0,
        **_feed_forward(s.model.predictor_mlp),
        **_shared(s),
    )


def build_encoder(s: Settings) -> VisionTransformer:
    """An encoder alone; nothing is seeded."""
    levels = deep_levels(SIZES[s.model.name]["depth"]) if s.model.levels == "deep" else None
    several = {"short_clips": "cut"} if len(s.data.lengths) > 1 else {}
    shared = {**several, **_feed_forward(s.model.mlp), **_shared(s)}
    return build_vit(s.model.name, drop_path_rate=s.model.drop_path, levels=levels, **shared)


def _feed_forward(kind: FeedForward) -> dict[str, Any]:
    return {"use_silu": kind != "gelu", "wide_silu": kind == "swiglu"}


def _shared(s: Settings) -> dict[str, Any]:
    """Arguments that encoder and predictor both take."""
    return {
        "img_size": s.data.crop,
        "patch_size": s.data.patch,
        "num_frames": s.data.frames,
        "tubelet_size": s.data.tubelet,
        "uniform_power": s.model.uniform_power,
        "init_std": s.model.init_std,
        "qk_scale": s.model.qk_scale,
        "sdpa_ignores_scale": s.compat.sdpa_ignores_scale,
        "use_rope": s.model.positions != "table",
        "rope_style": "v2" if s.model.positions == "rope_v2" else "interleaved",
    }


class Step(NamedTuple):
    """A JEPA on its device, whether its blocks are compiled, and lines that tell how it runs."""

    jepa: JEPA
    compiled: bool
    lines: list[str]


def build_step(s: Settings, device: torch.device, *, move: bool = True) -> Step:
    """The JEPA, set up to run as the settings say; on the device where it may `move` there, else on the CPU.

    Errors: ValueError where something that was asked for cannot run on this machine.
    """
    place = device if move else torch.device("cpu")
    compiled = compiles(s.runtime, device)
    if s.runtime.execution == "reference":
        jepa = build_jepa(s).to(place)
        lines = ["kernels    torch's own functions: the reference execution takes no others"]
    else:
        # Without truncation every clip has a length of its own; of several lengths each batch has other numbers.
        own_lengths = s.mask.kind == "multiblock" and s.mask.truncation == "none"
        own_lengths = own_lengths or len(s.data.lengths) > 1
        group = 1 if own_lengths else s.group * s.data.clips_per_video
        operations, lines = build_operations(
            s.runtime.kernels,
            s.runtime.attention,
            device,
            deterministic=s.runtime.deterministic,
            flat=own_lengths and (compiled or device.type == "cuda"),
            group=group if compiled else None,
        )
        jepa = build_jepa(s, operations).to(place)
        like = torch.empty(0, device=device, dtype=DTYPES[s.optim.dtype])
        sizes = [attention_sizes(network) for network in (jepa.encoder, jepa.predictor)]
        lines.append(explain_attention(operations, sizes, like))
    lines.append(run_blocks(s.runtime, jepa, device, compiled))
    return Step(jepa, compiled, lines)


def attention_sizes(network: nn.Module) -> Attention:
    """The first attention of a network: the others have heads of the same size."""
    return next(module for module in network.modules() if isinstance(module, Attention))


def build_masks(s: Settings, frames: int | None = None) -> GeneratorCollator:
    """The mask streams of the clips of so many frames, or of the longest ones.

    Errors: ValueError for settings that leave a side empty.
    """
    shared: dict[str, Any] = {
        "crop_size": s.data.crop,
        "num_frames": s.data.frames if frames is None else frames,
        "patch_size": s.data.patch,
        "tubelet_size": s.data.tubelet,
        "seed": s.optim.seed,
    }
    if s.mask.kind == "tube":
        return RandomTubeMaskCollator([{"ratio": s.mask.ratio}], **shared)
    sets = [mask.model_dump() for mask in s.mask.sets]
    return MaskCollator(sets, **shared, truncation=s.mask.truncation, group=s.group)


def masks_by_length(s: Settings) -> dict[int, GeneratorCollator]:
    """The mask streams of every length of clips in frames. Errors: as `build_masks`."""
    return {frames: build_masks(s, frames) for frames in s.data.lengths}


def length_of_slots(s: Settings) -> Callable[[int], int]:
    """Frames of the clips of a video slot, as the run will draw them: that needs no data set."""
    lengths = [shape.length for shape in clip_shapes(s)]
    any_video = np.zeros(1, dtype=np.int64)
    collections = [Collection(any_video, one.weight) for one in s.data.sets]
    order = _order(s, collections)
    return lambda slot: lengths[order.number(slot)]


def _order(s: Settings, collections: Sequence[Collection]) -> VideoOrder:
    replacement = s.data.sampling == "replacement"
    return VideoOrder(s.optim.seed, collections, replacement=replacement, window=s.data.shuffle_window)


def build_loading(
    s: Settings, masks: Mapping[int, GeneratorCollator], dataset: ClipDataset
) -> tuple[GeneratorCollator | Lengths, int | dict[int, int]]:
    """What `make_loader` takes of masks and numbers of tokens; `masks` are those of every length."""
    d = s.data
    tokens = {frames: frames // d.tubelet * (d.crop // d.patch) ** 2 for frames in masks}
    if len(masks) == 1:
        return masks[d.frames], tokens[d.frames]
    return Lengths(masks, dataset.plan.length_of, s.loss.lengths == "equal"), tokens


def build_reader(
    s: Settings,
    videos: Videos,
    decoder: Decoder | None = None,
    cache_bytes: int = 0,
    sets: Sequence[Data | DataSet] | None = None,
) -> Reader:
    """What reads the videos of a run, with PyAV where no decoder is given.

    Clips are cut as `sets` say, or all of them as `data`, which is how probes and pictures cut.
    """
    d = s.data
    return Reader(
        videos.paths,
        d.tubelet,
        cache_bytes,
        needs_rate=_needs_rate(s, sets or (d,)),
        frame_rate=d.frame_rate,
        read=read_with_torchcodec if decoder is not None and decoder.name == "torchcodec" else read_frames,
        known=None if decoder is None else decoder.entries,
    )


def _needs_rate(s: Settings, sets: Sequence[Data | DataSet]) -> str:
    """The setting for which every video must tell its frame rate or times; empty where some data set does without."""
    for key in ("duration", "fps"):
        if all(getattr(one, key) is not None for one in sets):
            return "compat.fps_whole_stride" if key == "fps" and s.compat.fps_whole_stride else f"data.{key}"
    return ""


def clip_shapes(s: Settings) -> list[ClipShape]:
    """Which frames the clips of each data set have: where that is one, it fills a tubelet."""
    return [
        ClipShape(
            one.frames,
            one.stride or 1,
            one.duration,
            one.fps,
            s.data.tubelet if one.frames == 1 else 1,
            s.compat.fps_whole_stride,
        )
        for one in s.data.sets
        if one.frames is not None
    ]


def build_dataset(s: Settings, videos: Videos, decoder: Decoder | None = None) -> ClipDataset:
    """The clips of every video slot."""
    d = s.data
    reader = build_reader(s, videos, decoder, int(d.cache_gb * 1e9), d.sets)
    plan = ClipPlan(
        s.optim.seed,
        _order(s, videos.collections),
        d.frames,
        d.stride,
        d.scale,
        d.aspect,
        d.flip,
        Augmentation(d.motion_shift, d.erase, d.auto_augment, d.crop),
        clips_per_video=d.clips_per_video,
        duration=d.duration,
        fps=d.fps,
        shapes=clip_shapes(s),
    )
    return ClipDataset(
        reader,
        plan,
        d.crop,
        filter_short=d.filter_short,
        antialias=d.antialias,
        encoded=None if decoder is None else decoder.encoded,
    )


def build_decoding(
    s: Settings,
    decoder: Decoder,
    dataset: ClipDataset,
    batch_size: int,
    device: torch.device,
    say: Callable[[str], None],
    failures: Failures | None = None,
) -> Decoding:
    """What decodes the clips that the loader leaves encoded, in batches of at most `batch_size` clips."""
    on_gpu = decoder.name == "dali_gpu"

    def make() -> DaliDecoder:
        return DaliDecoder(
            frames=s.data.frames,
            crop=s.data.crop,
            most=batch_size,
            device=device if on_gpu else torch.device("cpu"),
            threads=min(GPU_THREADS, batch_size) if on_gpu else processors(),
            prefetch=AHEAD,
            antialias=s.data.antialias,
        )

    return Decoding(make, decoder.name, dataset, say, failures)


def build_optimizer_pass(
    s: Settings,
    jepa: JEPA,
    scaler: torch.amp.GradScaler | None,
    *,
    accumulation: int = 1,
    exchange: Exchange | None = None,
) -> OptimizerPass:
    """AdamW over the online networks, with the moving average of the target encoder.

    The packed step in bfloat16 computes with copies of the matrices, unless it is sharded, which rounds what it
    gathers; the reference one leaves casts to autocast, as the public code does.
    """
    sharded = exchange is not None and exchange.shards
    packed = s.runtime.execution == "packed"
    device = next(jepa.parameters()).device
    return OptimizerPass(
        jepa,
        build_schedule(s),
        betas=s.optim.betas,
        eps=s.optim.eps,
        clip_grad=s.optim.clip_grad,
        clip_from_step=s.compat.clip_after_warmup,
        clip_per_network=s.compat.clip_per_network,
        ema_positions=s.compat.ema_positions,
        scaler=scaler,
        copies=torch.bfloat16 if packed and s.optim.dtype == "bfloat16" and not sharded else None,
        accumulation=accumulation,
        kernels=update_kernels(s.runtime.kernels, device) if packed else None,
        exchange=exchange,
    )
