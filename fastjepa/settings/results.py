"""The settings that change results: networks, masks, data, loss, optimizer, initial weights."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fastjepa.settings.base import Count, Section, setting


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class DataSet(Section):
    """One data set of a mixture, where it has more of its own than a weight."""

    weight: float = setting(1.0, "share of the clips, beside the other weights", gt=0)
    frames: Count | None = setting(
        None, "frames of a clip; 1 gives clips of one tubelet, as images need; null takes data.frames"
    )
    stride: Count | None = setting(
        None, "source frames from one frame of a clip to the next; without one of these three, those of data hold"
    )
    duration: float | None = setting(None, "seconds that a clip spans, in place of the stride", gt=0)
    fps: float | None = setting(None, "frames/s of a clip, in place of the stride", gt=0)


Weights = Annotated[
    dict[Annotated[str, Field(min_length=1)], Annotated[float, Field(gt=0)] | DataSet], Field(min_length=1)
]
Pair = Annotated[tuple[float, float], BeforeValidator(_tuple)]
ModelName = Literal[
    "vit_nano",
    "vit_tiny",
    "vit_small",
    "vit_base",
    "vit_large",
    "vit_huge",
    "vit_giant",
    "vit_gigantic",
    "vit_giant_xformers",
    "vit_gigantic_xformers",
]
FeedForward = Literal["gelu", "swiglu", "swiglu_full"]


class Model(Section):
    """The networks."""

    name: ModelName = setting(
        "vit_large",
        "encoder size; vit_nano is for demonstrations on a CPU, vit_giant_xformers is the ViT-g of V-JEPA 2",
    )
    positions: Literal["table", "rope_v2", "rope"] = setting(
        "table",
        "where tokens lie: a table of sines that is added to them, or rotary attention, with the angles as in the "
        "released V-JEPA 2 (rope_v2; in float32, where it rounds frequencies to bfloat16) or in the usual order (rope)",
    )
    mlp: FeedForward = setting(
        "gelu", "feed-forward layer of the encoder; swiglu is gated, of two thirds of the width, swiglu_full of all"
    )
    predictor_mlp: FeedForward = setting("gelu", "feed-forward layer of the predictor, as model.mlp")
    levels: Literal["last", "deep"] = setting(
        "last",
        "what is predicted: features of the last block, or with deep supervision of four blocks (at every quarter of "
        "the depth, as in V-JEPA 2.1), each normalised by itself",
    )
    drop_path: float = setting(
        0.0,
        "stochastic depth of the encoder: the chance that a clip skips a half of its last block, less in those before; "
        "clips of a forward pass draw from one stream, so data.batch_size and runtime.execution change who does",
        ge=0,
        lt=1,
    )
    predictor_depth: Count = setting(12, "blocks of the predictor")
    predictor_dim: int = setting(384, "width of the predictor", ge=2, multiple_of=2)
    predictor_heads: Count | None = setting(
        None, "heads of the predictor; null takes the encoder's number, as published"
    )
    targets: Literal["mask_tokens", "noised"] = setting(
        "mask_tokens", "what enters the predictor at target places: learned tokens, or noised target features"
    )
    noise: Literal["published", "linear"] = setting(
        "published", "noise schedule of noised targets; published is nearly always pure noise"
    )
    uniform_power: bool = setting(True, "time, rows and columns share the position channels equally, as published")
    init_std: float = setting(0.02, "standard deviation of the initial weights", gt=0, le=1)
    zero_init_mask_tokens: bool = setting(True, "mask tokens start at zero instead of random")
    qk_scale: float | None = setting(None, "scale of attention scores; null is head_dim ** -0.5", gt=0)


class MaskSet(Section):
    """One mask set: how its target blocks are drawn."""

    num_blocks: Count = setting(8, "target blocks a clip")
    spatial_scale: Pair = setting((0.15, 0.15), "area of a block as a share of the frame: [low, high]")
    temporal_scale: Pair = setting((1.0, 1.0), "duration of a block as a share of the clip: [low, high]")
    aspect_ratio: Pair = setting((0.75, 1.5), "height / width of a block: [low, high]")
    max_temporal_keep: float = setting(1.0, "share of the clip, from its start, that the context may see", gt=0, le=1)
    max_keep: Count | None = setting(None, "most context tokens a clip keeps")
    full_complement: bool = setting(False, "predict every token outside of the context, those too that cutting dropped")
    pred_full_complement: bool = setting(
        False, "see every token outside of the targets, those too that cutting dropped"
    )
    inv_block: bool = setting(False, "exchange the sides: blocks are seen and what is around them is predicted")


class Mask(Section):
    """Which tokens are seen and which are predicted."""

    kind: Literal["multiblock", "tube"] = setting(
        "multiblock", "how masks are drawn: target blocks by mask.sets, or random places, the same at all times"
    )
    sets: Annotated[tuple[MaskSet, ...], BeforeValidator(_tuple), Field(min_length=1)] = setting(
        (MaskSet(), MaskSet(num_blocks=2, spatial_scale=(0.7, 0.7))), "mask sets; each is a task of its own every step"
    )
    truncation: Literal["group", "random", "none"] = setting(
        "group", "clips of a group keep equally many tokens: the first ones (published), a random subset, or all"
    )
    group: Count = setting(
        24,
        "clips that share a length; 24 is the published batch of one GPU, at any batch size "
        "(counted in videos where data.clips_per_video is above 1)",
    )
    ratio: float = setting(0.9, "share of the frame that tube masks hide", gt=0, lt=1)

    @property
    def number_of_sets(self) -> int:
        """Mask sets that every step draws: tubes are one set, whatever `sets` says."""
        return 1 if self.kind == "tube" else len(self.sets)


class Data(Section):
    """Clips: where they come from and what is cut out of them."""

    path: Annotated[str, Field(min_length=1)] | Weights = setting(
        "synthetic://moving-shapes",
        "folder (searched recursively) of videos, shards (.tar), images or folders of frames; a single video, shard or "
        "image; a list file (path and optional label a line); synthetic://moving-shapes?...; {PATH: WEIGHT, ...} "
        "mixes, and a group in place of a weight gives a data set clips of its own",
        "warn",
    )
    sampling: Literal["permutation", "replacement"] = setting(
        "permutation",
        "permutation takes every video once a pass; replacement draws each by itself, so that some come twice",
    )
    shuffle_window: Count = setting(
        1024, "videos in shards (.tar) that are shuffled with each other: they are read in order otherwise"
    )
    frames: Annotated[int, Field(ge=2)] = setting(16, "frames of a clip")
    stride: Count = setting(4, "source frames from one frame of a clip to the next")
    duration: float | None = setting(
        None, "seconds that a clip spans at any frame rate, in place of data.stride; null goes by the stride", gt=0
    )
    fps: float | None = setting(
        None,
        "frames/s of a clip, by the times at which frames are shown, in place of data.stride; null goes by the stride",
        gt=0,
    )
    frame_rate: float | None = setting(
        None, "frames/s of folders of frames, which do not say it themselves; null leaves it unknown", gt=0
    )
    clips_per_video: Count = setting(
        1, "clips of one video in a step, from as many segments of it; they share their masks, as published"
    )
    filter_short: bool = setting(
        False, "replace videos of fewer frames than a clip spans, instead of repeating their last frame"
    )
    crop: Count = setting(224, "height and width of a clip in pixels")
    tubelet: Count = setting(2, "frames of a token")
    patch: Count = setting(16, "height and width of a token in pixels")
    scale: Pair = setting((0.3, 1.0), "area of the random crop as a share of the frame: [low, high]")
    aspect: Pair = setting((0.75, 1.35), "aspect ratio of the random crop: [low, high]")
    flip: bool = setting(True, "mirror half of the clips")
    antialias: bool = setting(False, "resize crops with antialiasing; the published transform does not")
    motion_shift: bool = setting(False, "the crop moves during the clip, from one random box to another")
    erase: float = setting(0.0, "share of the clips in which a random box is replaced by noise", ge=0, le=1)
    auto_augment: bool = setting(False, "RandAugment (m7-n4-mstd0.5-inc1) on the decoded frames: colours and geometry")
    batch_size: Literal["auto"] | Count = setting("auto", "clips of one forward pass; auto fits the memory", "free")
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = setting(
        "auto",
        "loader processes; 0 decodes in the training process, which a decoder that crashes or hangs then takes with it",
        "free",
    )
    decode_seconds: float = setting(
        120.0,
        "longest time that one video may take in a loader process; it is tried once more, then counts as unreadable",
        "free",
        gt=0,
    )
    decoder: Literal["auto", "pyav", "torchcodec", "dali_gpu", "dali_cpu"] = setting(
        "auto",
        "what decodes: pyav and torchcodec in the loader processes, dali_gpu on the GPU, dali_cpu VP8, VP9 and MJPEG "
        "on the CPU; auto is dali_gpu where it can run, else pyav",
        "free",
    )
    cache_gb: float = setting(0.0, "decoded videos kept in memory by each loader process, in GB", "free", ge=0)
    max_bad_fraction: float = setting(
        0.01,
        "share of unreadable files that ends the run with exit code 3 (10 files are always tolerated)",
        "free",
        ge=0,
        le=1,
    )

    @property
    def sets(self) -> tuple[DataSet, ...]:
        """The data sets of `path` in its order, with the clips of each: what a set leaves open is filled in."""
        values = self.path.values() if isinstance(self.path, dict) else [1.0]
        return tuple(self._filled(one if isinstance(one, DataSet) else DataSet(weight=one)) for one in values)

    @property
    def shares(self) -> dict[int, float]:
        """Of every length of clips in frames, ascending, the share of all clips that have it."""
        weights: dict[int, float] = {}
        for one in self.sets:
            frames = max(one.frames or 0, self.tubelet)
            weights[frames] = weights.get(frames, 0.0) + one.weight
        total = sum(weights.values())
        return {frames: weights[frames] / total for frames in sorted(weights)}

    @property
    def lengths(self) -> tuple[int, ...]:
        """The different lengths of clips in frames, ascending."""
        return tuple(self.shares)

    @property
    def usual_length(self) -> int:
        """The length in frames that most clips have, the longest of equally many."""
        shares = self.shares
        return max(shares, key=lambda frames: (shares[frames], frames))

    def _filled(self, one: DataSet) -> DataSet:
        changes: dict[str, Any] = {"frames": one.frames or self.frames}
        if one.stride is None and one.duration is None and one.fps is None:
            changes |= {"stride": self.stride, "duration": self.duration, "fps": self.fps}
        return one.model_copy(update=changes)


class Loss(Section):
    """The objective."""

    exponent: float = setting(1.0, "q of mean |prediction - target| ** q / q", gt=0, le=4)
    lengths: Literal["clips", "equal"] = setting(
        "clips",
        "where data.path has clips of several lengths: every clip weighs the same, or every length in a step, as "
        "published",
    )
    reg_coeff: float = setting(0.0, "weight of the variance regulariser", ge=0)
    context: float = setting(
        0.0, "weight of the error at context tokens (V-JEPA 2.1: 0.5); 0 predicts target tokens alone", ge=0
    )
    context_start: int = setting(0, "first step at which loss.context counts at all (V-JEPA 2.1: 15000)", ge=0)
    context_full: int = setting(
        0, "step at which loss.context counts in full, growing evenly from loss.context_start (V-JEPA 2.1: 30000)", ge=0
    )
    context_distance: bool = setting(
        True, "a context token counts the less the farther the nearest target: 1 / sqrt of the distance in tokens"
    )


class Optim(Section):
    """AdamW, its schedules and the moving average. Steps are the only clock."""

    steps: Count = setting(90_000, "length of the recipe in optimizer steps")
    warmup_steps: int = setting(12_000, "steps of linear learning-rate warm-up", ge=0)
    global_batch: Count = setting(3072, "clips of one optimizer step, over all devices and accumulation")
    lr: float = setting(6.25e-4, "peak learning rate", ge=0)
    start_lr: float = setting(2e-4, "learning rate at the start of the warm-up", ge=0)
    final_lr: float = setting(1e-6, "learning rate at the end of its decay; constant decay does not read it", ge=0)
    decay: Literal["cosine", "linear", "constant"] = setting(
        "cosine",
        "way of the learning rate from lr to final_lr; constant stays at lr, linear without warm-up is the published "
        "cool-down",
    )
    decay_steps: Count | None = setting(
        None,
        "last steps in which the learning rate falls, constant before them; null is all after the warm-up. "
        "compat.ipe_scale stretches these steps alone",
    )
    weight_decay: float = setting(0.04, "weight decay at the start", ge=0)
    final_weight_decay: float = setting(0.4, "weight decay at the end", ge=0)
    momentum: float = setting(0.998, "momentum of the target encoder at the start", ge=0, le=1)
    final_momentum: float = setting(1.0, "momentum of the target encoder at the end", ge=0, le=1)
    clip_grad: float | None = setting(10.0, "largest gradient norm; null does not clip", gt=0)
    betas: Pair = setting((0.9, 0.999), "AdamW betas")
    eps: float = setting(1e-8, "AdamW epsilon", gt=0)
    max_bad_steps: Count = setting(
        3,
        "skipped steps in a row, their loss or gradients not being finite, after which the run ends with exit code 4; "
        "float16 may skip 20 for its gradients, while it looks for a loss scale",
        "free",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", "precision of matrix products; the weights that are trained stay float32"
    )
    seed: int = setting(0, "seed of weights, clips and masks", ge=0, lt=2**63)


class Init(Section):
    """Where the weights of a new run come from."""

    # `from` is a keyword of Python: the settings spell it so, the code reads `settings.init.from_`.
    from_: Annotated[str, Field(min_length=1)] | None = setting(
        None,
        "weights that a new run starts from: a checkpoint of V-JEPA (.pth.tar) or V-JEPA 2 (.pt), a folder that import "
        "or export --all made, or a run of fastjepa (its folder, or one checkpoint in it); null draws them",
        alias="from",
    )
    optimizer: bool = setting(
        False,
        "the moments and step counts of AdamW go along too, as in the published cool-down: of a run of fastjepa only; "
        "schedules and step begin anew all the same",
    )


class Compat(Section):
    """What the published code does and a better default does not."""

    clip_after_warmup: int = setting(
        0,
        "first step that clips gradients; the public code starts an epoch after the warm-up (12300 in its recipes)",
        ge=0,
    )
    clip_per_network: bool = setting(False, "clip encoder and predictor by their own norms")
    reinit: bool = setting(False, "draw all linear weights again after construction, which undoes the block rescale")
    ema_positions: bool = setting(False, "average the fixed position tables of the target encoder too")
    ipe_scale: float = setting(
        1.0,
        "schedules are planned for this many times optim.steps (the learning rate with optim.decay_steps: those) and "
        "cut off at its end",
        ge=1,
    )
    sdpa_ignores_scale: bool = setting(False, "fused attention ignores model.qk_scale")
    mask_token_by_length: bool = setting(
        False,
        "the learned mask token is chosen by the place of the clips' length among those of a step, not by the mask "
        "set: the public V-JEPA 2 trains one token a length",
    )
    fps_whole_stride: bool = setting(
        False,
        "data.fps becomes a stride of whole frames, rounded down, as in the public V-JEPA 2: 4.29 frames/s of a video "
        "at 30 for 4",
    )
