"""Every process holds all weights; gradients are averaged in buckets while the backward pass goes on (DDP)."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastjepa.exchange import Exchange
from fastjepa.jepa import JEPA, JEPAOutput
from fastjepa.updates import Weight, widen


class Replicated(Exchange):
    """DistributedDataParallel around a JEPA.

    Gradients of bfloat16 copies are averaged in float32, with what earlier micro-batches left, straight into the
    gradients of the masters.
    """

    name = "DDP"

    def ready(self, weights: Sequence[Weight]) -> None:
        """Wrap the JEPA, whose weights have the dtypes that they keep."""
        # Blocks are compiled one by one, and DDP sends while they run: dynamo need not cut them at its buckets.
        torch._dynamo.config.optimize_ddp = False
        device = next(self.jepa.parameters()).device
        on_gpu = device.type == "cuda"
        with warnings.catch_warnings():
            # Newer versions of torch have another word for it, which 2.11 does not know.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self._wrapped = DistributedDataParallel(
                _Called(self.jepa),
                device_ids=[device.index] if on_gpu else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self._masters = {id(weight.parameter): weight for weight in weights if weight.rounded}
        if self._masters:
            self._wrapped.register_comm_hook(None, self._averaged)
        # After its first pass DDP sorts its buckets anew, and sums of another bucket may round differently: a pass over
        # nothing comes first in every process, so that a run that is resumed adds up as the one that was not.
        self._wrapped(None).backward()
        for weight in weights:
            weight.parameter.grad = weight.master.grad = None

    def loss(self, *arguments: Any, **more: Any) -> JEPAOutput:
        """As `JEPA.forward`."""
        return self._wrapped(arguments, more)

    def part(self, last: bool) -> AbstractContextManager:
        """Gradients stay here until the last part."""
        return nullcontext() if last else self._wrapped.no_sync()

    def collect(self, weights: list[Weight], last: bool, parts: int) -> None:
        """In the last part the hook has brought the gradients to the masters; before, they are summed here."""
        if not last:
            widen(weights)
            return
        for weight in weights:
            if weight.rounded:
                weight.parameter.grad = None

    def mean(self, values: Tensor) -> Tensor:
        """One small exchange a step."""
        dist.all_reduce(values, dist.ReduceOp.SUM)
        return values / dist.get_world_size()

    def _averaged(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Average one bucket over the processes. DDP gets its bucket back; of copies nobody reads it."""
        given = bucket.buffer()
        weights = [self._masters.get(id(parameter)) for parameter in bucket.parameters()]
        copies = weights[0] is not None
        total = given.float() if copies else given
        if copies:
            parts = total.split([weight.master.numel() for weight in weights if weight is not None])
            for part, weight in zip(parts, weights):
                assert weight is not None, "a bucket has one dtype, and so copies alone"
                if weight.master.grad is not None:
                    part.add_(weight.master.grad.flatten())
        total.div_(dist.get_world_size())

        def done(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            (averaged,) = future.value()
            if copies:
                shapes = [weight.master.shape for weight in weights if weight is not None]
                for part, weight, shape in zip(averaged.split([s.numel() for s in shapes]), weights, shapes):
                    assert weight is not None
                    weight.master.grad = part.view(shape)
                return given
            return averaged

        return dist.all_reduce(total, async_op=True).get_future().then(done)


class _Called(nn.Module):
    """What DDP wraps: the JEPA, and a pass over every weight in the order of the forward pass that costs nothing."""

    def __init__(self, jepa: JEPA) -> None:
        super().__init__()
        self.jepa = jepa

    def forward(self, arguments: tuple | None, more: dict[str, Any] | None = None) -> Any:
        if arguments is None:
            trained = [*self.jepa.encoder.parameters(), *self.jepa.predictor.parameters()]
            return torch.stack([0.0 * p.flatten()[0].float() for p in trained if p.requires_grad]).sum()
        return self.jepa(*arguments, **(more or {}))
