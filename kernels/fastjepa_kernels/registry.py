"""Operations as torch knows them: schema, implementations, shapes without data, FLOP formula.

Every operation exists twice, `NAME` for the Triton form and `NAME_reference`, so that both can be compiled, counted and
saved by name in checkpoint policies. On a CPU both run the reference, unless Triton is interpreted there.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import library
from torch.utils.flop_counter import register_flop_formula

from fastjepa_kernels.dispatch import interpreted

NAMESPACE = "fastjepa"
_operators = library.Library(NAMESPACE, "FRAGMENT")
# What launches each operation's kernels, by name: all of them once `fastjepa_kernels` is imported.
LAUNCHERS: dict[str, Callable[..., Any]] = {}


def _no_flops(*shapes: Any, **named: Any) -> int:
    return 0  # torch's counter leaves out what is done value by value


def _launcher(path: str) -> Callable[..., Any]:
    """A launcher of `_triton` by its name, which is imported, and Triton with it, at the first call."""
    module, _, name = path.rpartition(".")

    def launch(*arguments: Any) -> Any:
        return getattr(import_module(f"fastjepa_kernels._triton.{module}"), name)(*arguments)

    return launch


def register(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    triton: str,
    fake: Callable[..., Any],
    flops: Callable[..., int] = _no_flops,
) -> None:
    """Define `fastjepa::name` and `fastjepa::name_reference` with this schema, e.g. "(Tensor x) -> Tensor".

    `triton` names a launcher, "module.function" in `_triton` with the arguments of the reference; it runs for tensors
    on a CUDA device, and in the interpreter on a CPU. `fake` gives empty results of the right shape; `flops` takes
    shapes, as torch's counter does.
    """
    launcher = _launcher(triton)
    LAUNCHERS[name] = launcher
    for full, cuda, cpu in (
        (name, launcher, launcher if interpreted() else reference),
        (f"{name}_reference", reference, reference),
    ):
        _operators.define(f"{full}{schema}")
        _operators.impl(full, cuda, "CUDA")
        _operators.impl(full, cpu, "CPU")
        library.register_fake(f"{NAMESPACE}::{full}", fake, lib=_operators)
        register_flop_formula(getattr(torch.ops.fastjepa, full))(flops)


def operation(name: str, impl: str) -> Callable[..., Any]:
    """The registered operation of an implementation."""
    return getattr(torch.ops.fastjepa, name if impl == "triton" else f"{name}_reference").default


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give both forms of an operation a gradient, also for those who call `torch.ops` themselves."""
    for full in (name, f"{name}_reference"):
        library.register_autograd(
            f"{NAMESPACE}::{full}", _of(backward, full), setup_context=setup_context, lib=_operators
        )


def _of(backward: Callable[..., Any], full: str) -> Callable[..., Any]:
    impl = "reference" if full.endswith("_reference") else "triton"

    def call(ctx: Any, *gradients: torch.Tensor) -> Any:
        return backward(ctx, impl, *gradients)

    return call
