"""The sizes that `bench.ceilings` measures at: those of the published V-JEPA recipes, and tiny ones to try the code."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """One attention problem: `lengths` has the L of every sample."""

    name: str
    heads: int
    head_dim: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """Sizes of one run. `encoders` is (name, width, depth); `context`, `target`, `predictor` are tokens per mask set.

    `compiled` names the functions that the elementwise stage compiles, `seconds` is the time spent on one case.
    """

    batch: int
    encoders: tuple[tuple[str, int, int], ...]
    tokens: int
    context: tuple[int, ...]
    target: tuple[int, ...]
    predictor: tuple[int, ...]
    predictor_width: int
    attention: tuple[Attention, ...]
    crop: int
    frames: int
    copy_mib: tuple[int, ...]
    compiled: tuple[str, ...]
    seconds: float


# Published recipes: 16 frames of 224 x 224, 24 clips, tokens per mask set as their truncation leaves them on average.
FULL = Shapes(
    batch=24,
    encoders=(("vitl", 1024, 24), ("vith", 1280, 32)),
    tokens=1568,
    context=(365, 100),
    target=(749, 1103),
    predictor=(1115, 1203),
    predictor_width=384,
    attention=(
        Attention("vitl.target", 16, 64, (1568,) * 24),
        Attention("vith.target", 16, 80, (1568,) * 24),
        Attention("vith384.target", 16, 80, (4608,) * 10),
        Attention("vitl.context365", 16, 64, (365,) * 24),
        Attention("vitl.context100", 16, 64, (100,) * 24),
        Attention("vith.context365", 16, 80, (365,) * 24),
        Attention("vith.context100", 16, 80, (100,) * 24),
        Attention("vitl.context_both", 16, 64, (365,) * 24 + (100,) * 24),
        Attention("vith.context_both", 16, 80, (365,) * 24 + (100,) * 24),
        Attention("predictor16x24.1115", 16, 24, (1115,) * 24),
        Attention("predictor16x24.1203", 16, 24, (1203,) * 24),
        Attention("predictor12x32.1115", 12, 32, (1115,) * 24),
        Attention("predictor12x32.1203", 12, 32, (1203,) * 24),
    ),
    crop=224,
    frames=16,
    copy_mib=(1, 8, 32, 128, 512, 2048),
    compiled=("layer_norm", "layer_norm_fp32", "gelu"),
    seconds=0.5,
)

# The same code on shapes of no interest: it shows that every stage works, and nothing else.
QUICK = Shapes(
    batch=2,
    encoders=(("vith", 80, 2),),
    tokens=32,
    context=(16, 8),
    target=(8, 16),
    predictor=(24, 32),
    predictor_width=48,
    attention=(
        Attention("vith.target", 2, 80, (32, 32)),
        Attention("vith.context_both", 2, 80, (16, 16, 8, 8)),
        Attention("predictor16x24.1115", 2, 24, (24, 24)),
    ),
    crop=32,
    frames=4,
    copy_mib=(1,),
    compiled=("gelu",),
    seconds=0.004,
)
