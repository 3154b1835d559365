"""The settings that change speed, and what is written and kept; not what is computed beyond rounding."""

from typing import Annotated, Literal

from pydantic import Field

from fastjepa.settings.base import Count, Section, setting

KernelName = Literal["auto", "library", "reference", "triton"]
PieceKernel = Literal["auto", "library", "reference", "triton", "fused"]
Piece = Literal["embed", "assemble", "norm", "mlp", "attention", "loss", "update"]


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
        "first blocks of encoder and predictor that are computed again in the backward pass, to save memory",
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
