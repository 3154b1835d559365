"""Operations as torch knows them: schema, implementations, shapes without data, FLOP formula.

Every operation exists twice, `NAME` for the Triton form and `NAME_reference`, so that both can be compiled, counted and
saved by name in checkpoint policies. On a CPU both run the reference, unless Triton is interpreted there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fastjepa_kernels.dispatch import interpreted

NAMESPACE = "fastjepa"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    triton: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Define `fastjepa::name` and `fastjepa::name_reference` with this schema, e.g. "(Tensor x) -> Tensor".

    `triton` is called for tensors on a CUDA device (and in the interpreter on a CPU) and loads its kernels itself;
    `fake` gives empty results of the right shape; `flops` takes shapes, as torch's counter does.
    """
    on_cpu = triton if interpreted() else reference
    for full, cuda, cpu in ((name, triton, on_cpu), (f"{name}_reference", reference, reference)):
        _library.define(f"{full}{schema}")
        _library.impl(full, cuda, "CUDA")
        _library.impl(full, cpu, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{full}", fake, lib=_library)
        register_flop_formula(getattr(torch.ops.fastjepa, full))(flops)


def operation(name: str, impl: str) -> Callable[..., Any]:
    """The registered operation of an implementation."""
    return getattr(torch.ops.fastjepa, name if impl == "triton" else f"{name}_reference").default


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give both forms of an operation a gradient, also for those who call `torch.ops` themselves."""
    for full in (name, f"{name}_reference"):
        torch.library.register_autograd(
            f"{NAMESPACE}::{full}", _of(backward, full), setup_context=setup_context, lib=_library
        )


def _of(backward: Callable[..., Any], full: str) -> Callable[..., Any]:
    impl = "reference" if full.endswith("_reference") else "triton"

    def call(ctx: Any, *gradients: torch.Tensor) -> Any:
        return backward(ctx, impl, *gradients)

    return call
