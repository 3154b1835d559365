"""What the processes of a run do together in a step: one alone, replicas whose gradients are averaged, or shards.

E encoder, P predictor. The loop asks an `Exchange` for the loss of a batch, and the optimizer pass asks it where the
values of a weight lie.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from fastjepa.jepa import JEPA, JEPAOutput
from fastjepa.updates import Weight, widen


class Exchange:
    """A process that trains alone: it exchanges nothing.

    Used in this order: the weights are spread (`__init__`), the optimizer pass is made, `ready` is told of it.
    """

    name = "one process"
    shards = False

    def __init__(self, jepa: JEPA) -> None:
        self.jepa = jepa

    def ready(self, weights: Sequence[Weight]) -> None:
        """To be called once, with the weights that are trained, before the first `loss`."""

    def loss(self, *arguments: Any, **more: Any) -> JEPAOutput:
        """The forward pass of a batch of this process: what `JEPA.forward` gives."""
        return self.jepa(*arguments, **more)

    def part(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch; gradients are exchanged in the `last` one of a step."""
        return nullcontext()

    def collect(self, weights: list[Weight], last: bool, parts: int) -> None:
        """After each backward pass: gradients to where the optimizer reads them, summed over micro-batches."""
        if parts > 1:
            widen(weights)

    def local(self, tensor: Tensor) -> Tensor:
        """The values of a weight, or of its gradient, that this process holds."""
        return tensor

    def whole(self, local: Tensor, like: Tensor) -> Tensor:
        """The other way: `local` values as a tensor of the shape of `like`, for a checkpoint; the same memory."""
        return local

    def norms(self, norms: Tensor) -> Tensor:
        """Norms over the values that this process holds, made those over all values."""
        return norms

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, on the device."""
        return values

    def target_state(self) -> dict[str, Tensor] | None:
        """All weights of the target encoder on the host, in the first process alone; None where they are at hand."""
        return None
