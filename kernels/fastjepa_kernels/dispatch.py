"""Which implementation runs an operation, and why.

`auto` takes Triton on a CUDA device where it can be loaded and the reference everywhere else. An implementation that is
asked for by name runs or raises with the reason: nothing falls back silently.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "reference"]

# Facts of the process, looked up once: plain values, which torch.compile can read.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# The kernels keep a row in registers: more channels would spill.
MOST_CHANNELS = 8192
# A plain global, and not a context variable, for the same reason.
_forced: Impl = "auto"


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on tensors of the CPU (TRITON_INTERPRET=1 before the start)."""
    return _INTERPRETED


def has_triton() -> bool:
    """Whether Triton is installed; it is not loaded for this."""
    return _HAS_TRITON


def why_not_triton(x: Tensor, *dtypes: torch.dtype, channels: int = 0) -> str:
    """Why Triton cannot run on this tensor; empty where it can.

    `dtypes` are those of further tensors, `channels` the length of a row where the kernel needs all of it at once.
    """
    if not has_triton():
        return "Triton is not installed"
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreted()):
        return f"the tensors are on {x.device.type}, and Triton needs a CUDA device (or TRITON_INTERPRET=1 on a CPU)"
    if torch.float64 in (x.dtype, *dtypes):
        return "the kernels compute in float32, got float64"
    if channels > MOST_CHANNELS:
        return f"the kernels take at most {MOST_CHANNELS} channels, got {channels}"
    return ""


def choose(
    operation: str, impl: Impl, x: Tensor, *dtypes: torch.dtype, channels: int = 0
) -> Literal["triton", "reference"]:
    """The implementation for these tensors (see `why_not_triton`).

    Errors: ValueError for an unknown name or one that cannot run here.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"{operation}: impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    wanted = _forced if impl == "auto" else impl
    if wanted == "reference":
        return "reference"
    reason = why_not_triton(x, *dtypes, channels=channels)
    if not reason:
        return "triton"
    if wanted == "triton":
        raise ValueError(f"{operation}: impl='triton' was asked for, but {reason}")
    return "reference"


def explain(operation: str, x: Tensor, impl: Impl = "auto") -> str:
    """One line: which implementation runs this operation on tensors like `x`, and why."""
    chosen = choose(operation, impl, x)
    if impl != "auto" or _forced != "auto":
        return f"{operation}: {chosen}, asked for by name"
    return f"{operation}: {chosen}" + (f", because {why_not_triton(x)}" if chosen == "reference" else "")


@contextmanager
def use(impl: Impl) -> Iterator[None]:
    """All operations of this block, in every thread, run through one implementation unless given another by name."""
    global _forced
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    before, _forced = _forced, impl
    try:
        yield
    finally:
        _forced = before
