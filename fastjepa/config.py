"""Every setting of a run: type, default, help, limits and what a changed value means for a resume.

`model mask data loss optim init compat` change results; `runtime log checkpoint eval` change speed and what is kept. A
YAML file holds what differs from the defaults (`fastjepa.configfile` reads it). Nothing here imports torch.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

Resume = Literal["fatal", "warn", "free"]
# No whole number of a run is larger, but its seed: beyond it, sizes overflow in places that name no setting.
LARGEST = 10**9


def setting(default: Any, help: str, resume: Resume = "fatal", **limits: Any) -> Any:
    """A field with its help and its class: `fatal` values are a run's identity, a changed `warn` value is reported."""
    return Field(default=default, description=help, json_schema_extra={"resume": resume}, **limits)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Weights = Annotated[dict[Annotated[str, Field(min_length=1)], Annotated[float, Field(gt=0)]], Field(min_length=1)]
Pair = Annotated[tuple[float, float], BeforeValidator(_tuple)]
Count = Annotated[int, Field(ge=1)]
KernelName = Literal["auto", "library", "reference", "triton"]
PieceKernel = Literal["auto", "library", "reference", "triton", "fused"]
Piece = Literal["embed", "assemble", "norm", "mlp", "attention", "loss", "update"]
ModelName = Literal[
    "vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant", "vit_gigantic"
]


class Section(BaseModel):
    """A group of settings: strict types, frozen, unknown keys refused."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _within_reason(cls, value: Any, info: ValidationInfo) -> Any:
        """Limits of all fields. The words continue those of what the field expects."""
        if isinstance(value, int) and value > LARGEST and info.field_name != "seed":
            raise ValueError(f"at most {LARGEST}")
        if any(isinstance(text, str) and "\0" in text for text in (value if isinstance(value, dict) else [value])):
            raise ValueError("without a zero byte")  # the system ends names of files there
        return value


class Model(Section):
    """The networks."""

    name: ModelName = setting("vit_large", "encoder size; vit_nano is for demonstrations on a CPU")
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
        "image; a list file (path and optional label a line); synthetic://moving-shapes?...; {PATH: WEIGHT, ...} mixes",
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


class Loss(Section):
    """The objective."""

    exponent: float = setting(1.0, "q of mean |prediction - target| ** q / q", gt=0, le=4)
    reg_coeff: float = setting(0.0, "weight of the variance regulariser", ge=0)


class Optim(Section):
    """AdamW, its schedules and the moving average. Steps are the only clock."""

    steps: Count = setting(90_000, "length of the recipe in optimizer steps")
    warmup_steps: int = setting(12_000, "steps of linear learning-rate warm-up", ge=0)
    global_batch: Count = setting(3072, "clips of one optimizer step, over all devices and accumulation")
    lr: float = setting(6.25e-4, "peak learning rate", ge=0)
    start_lr: float = setting(2e-4, "learning rate at the start of the warm-up", ge=0)
    final_lr: float = setting(1e-6, "learning rate at the end", ge=0)
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
        "weights that a new run starts from: a first-generation V-JEPA checkpoint (.pth.tar), a folder that import or "
        "export --all made, or a run of fastjepa (its folder, or one checkpoint in it); null draws them",
        alias="from",
    )


class Runtime(Section):
    """How the run is executed. Nothing here changes what is computed beyond rounding."""

    stop_at: Count | None = setting(None, "end at this step; schedules and identity stay those of optim.steps", "free")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = setting(
        "auto", "auto, cpu, cuda or cuda:N; auto takes a GPU where there is one", "free"
    )
    execution: Literal["packed", "reference"] = setting(
        "packed",
        "how the step is computed: packed does only the work that is needed, reference runs like the public code",
        "free",
    )
    kernels: KernelName | dict[Piece, PieceKernel] = setting(
        "auto",
        "what computes the pieces of the packed step: library is torch's own functions, triton the fused kernels, "
        "reference their plain form; auto takes kernels only where they are measured to be faster; {mlp: fused, norm: "
        "triton} names some pieces' own (fused computes the matrix product too, of mlp and embed)",
        "free",
    )
    attention: Literal[
        "auto", "sdpa", "cudnn", "flash", "efficient", "math", "varlen", "xformers", "indexed", "padded"
    ] = setting(
        "auto", "attention of the packed step: a backend of fastjepa_kernels; auto takes the first that fits", "free"
    )
    compile: Literal["auto"] | bool = setting(
        "auto", "torch.compile of every block; auto is true on a GPU with a C++ compiler at hand", "free"
    )
    recompute: int = setting(
        0,
        "first blocks of encoder and predictor that are computed again in the backward pass, to save memory (packed)",
        "free",
        ge=0,
    )
    parallel: Literal["auto", "ddp", "fsdp2"] = setting(
        "auto",
        "how several processes share the work: ddp gives each all weights, fsdp2 a part of each weight (packed "
        "execution); auto is ddp where the weights fit on a device",
        "free",
    )
    threads: Count | None = setting(None, "CPU threads of the training process; null leaves it to torch", "free")
    deterministic: bool = setting(False, "deterministic kernels: bitwise repeatable on a GPU, slower", "free")
    profile: Annotated[str, Field(pattern=r"^[1-9]\d{0,8}\.\.[1-9]\d{0,8}$")] | None = setting(
        None,
        "steps that the profiler watches in the first process, such as 10..20: they leave a trace and a table of the "
        "costliest operations in profile/ of the run folder, and are slower than others; null watches none",
        "free",
    )
    watchdog_minutes: float | None = setting(
        15.0,
        "minutes without any progress after which a process says where it stands, with its Python stacks, and ends; "
        "null lets it hang",
        "free",
        gt=0,
    )
    stop_on_collapse: bool = setting(
        False, "end the run where the target features have collapsed; false only warns", "free"
    )


class Log(Section):
    """What is written while the run goes on."""

    folder: str = setting("runs", "root of the run folders", "free", min_length=1)
    every: Count = setting(10, "steps between two lines of the log", "free")
    images: bool = setting(
        True,
        "draw curves, masks, clips and features at the end, for TensorBoard and W&B too, and a page of them: "
        "viz/index.html",
        "free",
    )
    tensorboard: bool = setting(False, "write TensorBoard events too (extra `log`)", "free")
    wandb: bool = setting(False, "log to Weights & Biases too (extra `log`)", "free")


class Checkpoint(Section):
    """What is kept for a resume."""

    every: Count = setting(1000, "steps between two checkpoints", "free")
    keep: Annotated[int, Field(ge=2)] = setting(3, "newest checkpoints that are kept", "free")
    keep_every: int = setting(
        0, "checkpoints of steps that are a multiple of this are kept for ever beside them; 0 keeps none", "free", ge=0
    )


class Eval(Section):
    """Evaluation of the features during and after the run."""

    every: int = setting(0, "steps between two probes; 0 probes at the end only", "free", ge=0)
    probe: Literal["auto", "knn", "linear", "attentive", "all", "none"] = setting(
        "auto",
        "what classifies target features: knn (nearest neighbours) and linear on their mean, attentive on all tokens "
        "(slower), all three; auto is knn and linear where there are labels",
        "free",
    )
    data: Annotated[str, Field(min_length=1)] | None = setting(
        None,
        "labelled videos or images that are probed in place of data.path: a list, shards, or a folder of class folders",
        "free",
    )
    test: Annotated[str, Field(min_length=1)] | None = setting(
        None,
        "labelled videos or images that probes are tested on; null keeps a quarter of the others for that",
        "free",
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
        1.0, "schedules are planned for this many times optim.steps and cut off at its end", ge=1
    )
    sdpa_ignores_scale: bool = setting(False, "fused attention ignores model.qk_scale")


class Settings(Section):
    """All settings of a run."""

    model: Model = Model()
    mask: Mask = Mask()
    data: Data = Data()
    loss: Loss = Loss()
    optim: Optim = Optim()
    init: Init = Init()
    runtime: Runtime = Runtime()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    compat: Compat = Compat()
    resume: str = setting(
        "auto", "auto continues this run if it exists, never starts a new one, PATH continues that run", "free"
    )
    accept_changes: bool = setting(
        False, "with resume=PATH: go on although settings that change results are not those of the run", "free"
    )

    @property
    def group(self) -> int:
        """The truncation group in force, in videos: a group larger than the batch becomes the batch."""
        return min(self.mask.group, max(1, self.videos_per_step))

    @property
    def videos_per_step(self) -> int:
        """Videos of one optimizer step, each of which gives data.clips_per_video clips."""
        return self.optim.global_batch // self.data.clips_per_video

    @property
    def last_step(self) -> int:
        """Where this run ends."""
        return self.runtime.stop_at or self.optim.steps


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def by_key(kind: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section by the names that a settings file uses."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted key, field), in the order of the help."""
    for name, field in Settings.model_fields.items():
        if name in SECTIONS:
            yield from ((f"{name}.{key}", inner) for key, inner in by_key(SECTIONS[name]).items())
        else:
            yield name, field


def resume_class(field: FieldInfo) -> Resume:
    """What a changed value of this field means for a resume."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "every setting is made by setting()"
    return extra["resume"]  # type: ignore[return-value]


def flat(settings: Settings) -> dict[str, Any]:
    """Dotted key -> plain value (lists, numbers, strings), for comparison and JSON."""
    dump = settings.model_dump(mode="json", by_alias=True)
    return {key: dump[key.split(".")[0]][key.split(".")[1]] if "." in key else dump[key] for key, _ in fields()}


def changed(old: dict[str, Any], new: dict[str, Any], kind: Resume) -> list[str]:
    """Keys of this class whose values differ, each as "key: old -> new"; a key missing in `old` had the default."""
    defaults = flat(Settings())
    return [
        f"{key}: {old.get(key, defaults[key])} -> {new[key]}"
        for key, field in fields()
        if resume_class(field) == kind and old.get(key, defaults[key]) != new[key]
    ]


def identity(settings: Settings, data: str) -> str:
    """Six hex digits that name the run: a hash of the fatal settings that differ from the defaults, and of the data.

    Defaults are left out so that a setting added later does not rename old runs. `data` is the fingerprint of the file
    list: relative names, so that a folder that moved keeps its runs, and other videos get a run of their own.
    """
    values, defaults = flat(settings), flat(Settings())
    fatal = {k: values[k] for k, f in fields() if resume_class(f) == "fatal" and values[k] != defaults[k]}
    return hashlib.sha256(json.dumps([fatal, data], sort_keys=True).encode()).hexdigest()[:6]
