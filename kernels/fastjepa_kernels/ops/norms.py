"""`layer_norm`, `add_layer_norm` and their gradient as operators of torch.

Mean and 1 / standard deviation of every row are results too, without a gradient: the backward pass reads them.
"""

from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.reference import norms as reference
from fastjepa_kernels.registry import differentiable, operation, register

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[:-1], dtype=wide), x.new_empty(x.shape[:-1], dtype=wide)


def _norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), *_statistics(x)


def _add_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), residual.new_empty(x.shape), *_statistics(residual)


def _backward_fake(
    gradient: Tensor,
    extra: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    for_weight, for_bias = (mean.new_empty(width if wanted else 0) for wanted in (weight_gradient, bias_gradient))
    return x.new_empty(x.shape), for_weight, for_bias


register(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm,
    triton="norms.layer_norm",
    fake=_norm_fake,
)
register(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.add_layer_norm,
    triton="norms.add_layer_norm",
    fake=_add_norm_fake,
)
register(
    "layer_norm_backward",
    "(Tensor gradient, Tensor? extra, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool weight_gradient, "
    "bool bias_gradient) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_backward,
    triton="norms.layer_norm_backward",
    fake=_backward_fake,
)


def _keep(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> None:
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, impl: str, gradient: Tensor | None, extra: Tensor | None, parameters: int) -> Gradients:
    """Of what was normalised, of weight and of bias; `parameters` is the place of the weight among the inputs."""
    x, weight, mean, rstd = ctx.saved_tensors
    if gradient is None:
        return extra, None, None
    wanted = ctx.needs_input_grad[parameters : parameters + 2]
    run = operation("layer_norm_backward", impl)
    dx, dweight, dbias = run(gradient, extra, x, weight, mean, rstd, *wanted)
    return (
        dx,
        dweight.to(weight.dtype) if wanted[0] else None,
        dbias.to(ctx.bias_dtype) if wanted[1] else None,
    )


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _ = inputs
    _keep(ctx, x, weight, bias, *output[1:])


def _norm_gradient(ctx: Any, impl: str, gradient: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    return *_gradients(ctx, impl, gradient, None, 1), None, None


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, _ = inputs
    _keep(ctx, output[1], weight, bias, *output[2:])
    ctx.x_dtype = x.dtype


def _add_norm_gradient(
    ctx: Any, impl: str, gradient: Tensor | None, extra: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    total, dweight, dbias = _gradients(ctx, impl, gradient, extra, 2)
    return None if total is None else total.to(ctx.x_dtype), total, dweight, dbias, None


differentiable("layer_norm", _norm_gradient, _keep_norm)
differentiable("add_layer_norm", _add_norm_gradient, _keep_add_norm)
