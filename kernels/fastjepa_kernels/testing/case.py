"""What a case of an operation is, and what tests, benches and `tune` do with one.

A shape is a dict of numbers with the keys of the case's own `shapes`; `width` and `rows` among them are what launch
settings are looked up by. Inputs are a flat tuple of tensors, float ones of the dtype in question except where the
operation wants float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastjepa_kernels.testing.yardstick import within

Shape = dict[str, int]
Call = Callable[..., tuple[Tensor, ...]]
Part = Literal["forward", "backward"]


@dataclass(frozen=True)
class Case:
    """`run(impl, *inputs)` is ours; `eager(*inputs)`, in any precision, and `best`, the best single call there is.

    `gradients` are the places of the inputs that get one. `pinned` names the launch settings that a pass depends on.
    `shapes` are "small" and "odd" for tests, others for benches, and "huge" for more than 2^31 elements. `exact` is
    `eager` in less memory, for the yardstick at large shapes.
    """

    name: str
    make: Callable[[Shape, torch.device, torch.dtype], tuple[Tensor, ...]]
    run: Call
    eager: Call
    shapes: dict[str, Shape]
    pinned: dict[str, Part]
    gradients: tuple[int, ...] = ()
    best: Call | None = None
    exact: Call | None = None

    def ours(self, impl: str = "triton") -> Call:
        """Our call in one implementation, with the arguments of `eager`."""
        return lambda *inputs: self.run(impl, *inputs)

    def passes(self) -> tuple[Part, ...]:
        """The passes that can be timed."""
        return ("forward", "backward") if self.gradients else ("forward",)

    def benched(self) -> list[str]:
        """The names of the shapes for benches."""
        return [name for name in self.shapes if name not in ("small", "odd", "huge")]


def fresh(case: Case, inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Copies, the floating ones in `dtype` where one is given; those with a gradient are leaves that require it."""
    copies = [
        x.detach().to(dtype, copy=True) if dtype and x.is_floating_point() else x.detach().clone() for x in inputs
    ]
    return tuple(x.requires_grad_(n in case.gradients) for n, x in enumerate(copies))


def results(case: Case, call: Call, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """What a call gives on copies of the inputs, and their gradients. Upstream gradients have values of `dtype`."""
    outputs = call(*inputs)
    if not case.gradients:
        return [output.detach() for output in outputs]
    leaves = [inputs[n] for n in case.gradients]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream(outputs, dtype))]


def upstream(outputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Gradients that arrive at the outputs: the same values in every precision."""
    waves = (torch.arange(x.numel(), device=x.device, dtype=torch.float32).cos() for x in outputs)
    return [wave.view(x.shape).to(dtype).to(x.dtype) for wave, x in zip(waves, outputs)]


def timed(case: Case, call: Call, inputs: tuple[Tensor, ...], which: Part) -> Callable[[], object]:
    """One pass alone, to be called again and again."""
    if which == "forward":
        return torch.no_grad()(lambda: call(*inputs))
    outputs, leaves = call(*inputs), [inputs[n] for n in case.gradients]
    arriving = upstream(outputs, outputs[0].dtype)
    return lambda: torch.autograd.grad(outputs, leaves, arriving, retain_graph=True)


def yardstick(case: Case, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Callable[[list[Tensor]], None]:
    """A check of results of our call on these inputs; it raises AssertionError where they are not exact enough."""
    exact = results(case, case.exact or case.eager, fresh(case, inputs, torch.float64), dtype)
    eager = results(case, case.eager, fresh(case, inputs), dtype)

    def check(found: list[Tensor]) -> None:
        for mine, theirs, true in zip(found, eager, exact, strict=True):
            within(mine, theirs, true)

    return check


def random(*shape: int, like: tuple[torch.device, torch.dtype], seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of one device and dtype."""
    device, dtype = like
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)
