"""`target_loss` and its gradient as operators of torch."""

from typing import Any

from torch import Tensor

from fastjepa_kernels.reference import target_loss as reference
from fastjepa_kernels.registry import differentiable, operation, register


def _loss_fake(
    prediction: Tensor, target: Tensor, index: Tensor, exponent: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference.width_of_sums(prediction, target)
    rows = prediction.shape[:2]
    loss, mean, rstd = (prediction.new_empty(shape, dtype=wide) for shape in ((), rows, rows))
    return loss, mean, rstd


register(
    "target_loss",
    "(Tensor prediction, Tensor target, Tensor index, float exponent, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference.loss,
    triton="target_loss.loss",
    fake=_loss_fake,
)
register(
    "target_loss_backward",
    "(Tensor upstream, Tensor prediction, Tensor target, Tensor index, Tensor mean, Tensor rstd, float exponent)"
    " -> Tensor",
    reference=reference.loss_backward,
    triton="target_loss.loss_backward",
    fake=lambda upstream, prediction, target, index, mean, rstd, exponent: prediction.new_empty(prediction.shape),
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, target, index, ctx.exponent, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # No zeros for the statistics' gradients: only that of the loss arrives.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(prediction, target, index, mean, rstd)


def _gradient(ctx: Any, impl: str, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None, None]:
    if upstream is None:
        return None, None, None, None, None
    run = operation("target_loss_backward", impl)
    return run(upstream, *ctx.saved_tensors, ctx.exponent), None, None, None, None


differentiable("target_loss", _gradient, _keep)
