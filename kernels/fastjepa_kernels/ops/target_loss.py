"""`target_loss` and its gradient as operators of torch."""

from typing import Any

from torch import Tensor

from fastjepa_kernels.reference import target_loss as reference
from fastjepa_kernels.registry import differentiable, operation, register


def _loss_triton(
    prediction: Tensor, target: Tensor, index: Tensor, exponent: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from fastjepa_kernels._triton import target_loss as kernels

    return kernels.loss(prediction, target, index, exponent, eps)


def _loss_backward_triton(
    upstream: Tensor, prediction: Tensor, target: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, exponent: float
) -> Tensor:
    from fastjepa_kernels._triton import target_loss as kernels

    return kernels.loss_backward(upstream, prediction, target, index, mean, rstd, exponent)


def _loss_fake(
    prediction: Tensor, target: Tensor, index: Tensor, exponent: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference.width_of_sums(prediction, target)
    rows = prediction.shape[:2]
    loss, mean, rstd = (prediction.new_empty(shape, dtype=wide) for shape in ((), rows, rows))
    return loss, mean, rstd


def _no_flops(*shapes: Any, **named: Any) -> int:
    return 0  # torch's counter leaves out what is done value by value


register(
    "target_loss",
    "(Tensor prediction, Tensor target, Tensor index, float exponent, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference.loss,
    triton=_loss_triton,
    fake=_loss_fake,
    flops=_no_flops,
)
register(
    "target_loss_backward",
    "(Tensor upstream, Tensor prediction, Tensor target, Tensor index, Tensor mean, Tensor rstd, float exponent)"
    " -> Tensor",
    reference=reference.loss_backward,
    triton=_loss_backward_triton,
    fake=lambda upstream, prediction, target, index, mean, rstd, exponent: prediction.new_empty(prediction.shape),
    flops=_no_flops,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, target, index, ctx.exponent, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(prediction, target, index, mean, rstd)


def _gradient(ctx: Any, impl: str, upstream: Tensor, *_: Any) -> tuple[Tensor, None, None, None, None]:
    run = operation("target_loss_backward", impl)
    return run(upstream, *ctx.saved_tensors, ctx.exponent), None, None, None, None


differentiable("target_loss", _gradient, _keep)
