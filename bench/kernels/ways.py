"""What an operation is compared with: eager and compiled PyTorch, and the best that libraries have.

A way is made for one shape, and raises ImportError or ValueError with the reason where this machine has none. All take
the same inputs and give the same results; attention takes packed rows and gives their packed gradient whichever library
computes it, as a step does.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastjepa_kernels
from bench import failures
from fastjepa_kernels.dispatch import Impl
from fastjepa_kernels.testing.case import Call, Case, Shape
from fastjepa_kernels.testing.cases_of_blocks import stretches

# Ours, and what everything is compared with.
OURS = "ours"
# What a way may raise that is no mistake of the bench: that, and a result that is not exact enough.
FAILURES = (*failures.FAILURES, AssertionError)

Make = Callable[[], Call]


def ways_of(case: Case, shape: Shape, impl: Impl, compiler: str) -> dict[str, Make]:
    """By name what makes each way of computing this case, ours first; `compiler` is a backend of torch.compile."""
    found: dict[str, Make] = {
        OURS: lambda: case.ours(impl),
        "eager": lambda: case.eager,
        "compiled": lambda: torch.compile(case.eager, dynamic=False, backend=compiler),
    }
    libraries = LIBRARIES.get(case.name, {})
    found |= {name: partial(make, shape) for name, make in libraries.items()}
    if case.best is not None and case.name not in LIBRARIES:
        best = case.best
        found[BEST.get(case.name.split()[0], "library")] = lambda: best
    return found


# What the single best call of a case is called.
BEST = {
    "adamw_ema_": "fused",
    "ema_update_": "foreach",
    "gather_tokens": "index_select",
    "indexed_attention": "sdpa",
    "patch_embed_gather": "product",
}


def _dense(backend: str, shape: Shape) -> Call:
    """One call for each mask set, of one backend of SDPA."""

    def run(x: Tensor, starts: Tensor, *sets: Tensor) -> tuple[Tensor]:
        parts = [fastjepa_kernels.attention(*rows.unbind(2), backend=backend) for rows in stretches(x, *sets)]
        return (torch.cat([part.flatten(0, 1) for part in parts]),)

    return run


def _ragged(backend: str, shape: Shape) -> Call:
    """One call for the rows of all clips, whose lengths differ."""
    lengths = tuple(n for n in (shape["first"], shape["second"]) if n for _ in range(shape["clips"]))

    def run(x: Tensor, starts: Tensor, *sets: Tensor) -> tuple[Tensor]:
        splits = {"cu_seqlens": starts, "max_length": max(lengths), "lengths": lengths}
        return (fastjepa_kernels.attention(*x.unbind(1), **splits, backend=backend),)

    return run


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm


def _liger_norm(shape: Shape) -> Call:
    norm = _liger()
    return lambda x, weight, bias: (norm(x, weight, bias, 1e-6),)


def _liger_add_norm(shape: Shape) -> Call:
    norm = _liger()

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm(total, weight, bias, 1e-6), total

    return run


def _autocast_norm(shape: Shape) -> Call:
    """As autocast runs it: float32, with a cast on each side."""

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        wide = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (x, weight, bias))
        rows, *parameters = wide
        return (F.layer_norm(rows, x.shape[-1:], *parameters, 1e-6).to(x.dtype),)

    return run


LIBRARIES: dict[str, dict[str, Callable[[Shape], Call]]] = {
    "indexed_attention packed": {
        **{name: partial(_dense, name) for name in ("flash", "cudnn", "efficient")},
        **{name: partial(_ragged, name) for name in ("varlen", "xformers")},
    },
    "layer_norm": {"autocast": _autocast_norm, "liger": _liger_norm},
    "add_layer_norm": {"liger": _liger_add_norm},
}
