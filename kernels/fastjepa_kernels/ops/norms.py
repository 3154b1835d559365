"""`layer_norm`, `add_layer_norm` and their gradient as operators of torch.

Mean and 1 / standard deviation of every row are results too, without a gradient: the backward pass reads them.
"""

from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.reference import norms as reference
from fastjepa_kernels.registry import differentiable, operation, register


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[:-1], dtype=wide), x.new_empty(x.shape[:-1], dtype=wide)


def _norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), *_statistics(x)


def _add_norm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), residual.new_empty(x.shape), *_statistics(residual)


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


def _add_backward_fake(
    gradient: Tensor | None,
    extra: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor | None,
    x_bias: Tensor | None,
    scale: Tensor | None,
    row_scale: Tensor | None,
    x_dtype: torch.dtype,
    weight_gradient: bool,
    bias_gradient: bool,
    x_gradient: bool,
    x_bias_gradient: bool,
    scale_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = sum((weight_gradient, bias_gradient, x_bias_gradient, scale_gradient))
    return (
        total.new_empty(0 if gradient is None else total.shape),
        total.new_empty(total.shape if x_gradient else 0, dtype=x_dtype),
        mean.new_empty(parameters, total.shape[-1]),
    )


register(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm,
    triton="norms.layer_norm",
    fake=_norm_fake,
)
register(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, Tensor? x_bias, Tensor? scale, "
    "Tensor? row_scale, ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
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
register(
    "add_layer_norm_backward",
    "(Tensor? gradient, Tensor? extra, Tensor total, Tensor? weight, Tensor mean, Tensor rstd, Tensor? x, "
    "Tensor? x_bias, Tensor? scale, Tensor? row_scale, ScalarType x_dtype, bool weight_gradient, bool bias_gradient, "
    "bool x_gradient, bool x_bias_gradient, bool scale_gradient) -> (Tensor, Tensor, Tensor)",
    reference=reference.add_layer_norm_backward,
    triton="norms.add_layer_norm_backward",
    fake=_add_backward_fake,
)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _norm_gradient(ctx: Any, impl: str, gradient: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    if gradient is None:
        return (None,) * 5
    wanted = ctx.needs_input_grad[1:3]
    run = operation("layer_norm_backward", impl)
    dx, dweight, dbias = run(gradient, None, x, weight, mean, rstd, *wanted)
    return (
        dx,
        dweight.to(weight.dtype) if wanted[0] else None,
        dbias.to(ctx.bias_dtype) if wanted[1] else None,
        None,
        None,
    )


# Places of weight, bias, x_bias and scale among the inputs of `add_layer_norm`.
PARAMETERS = (2, 3, 5, 6)


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, _, _, x_bias, scale, row_scale, _ = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    # The gradient of the scale alone needs what it scaled.
    branch = (x, x_bias) if ctx.needs_input_grad[6] else (None, None)
    ctx.save_for_backward(total, weight, mean, rstd, *branch, scale, row_scale)
    ctx.x_dtype = x.dtype
    ctx.parameter_dtypes = [None if inputs[n] is None else inputs[n].dtype for n in PARAMETERS]


def _add_norm_gradient(
    ctx: Any, impl: str, gradient: Tensor | None, extra: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    # Read once: a recomputed forward pass hands each of them out a single time.
    saved = ctx.saved_tensors
    total, *_, scale, row_scale = saved
    # Through the sum alone no gradient comes to weight and bias of the normalisation.
    weight, bias, x_bias, factor = wanted = [
        ctx.needs_input_grad[n] and not (n in (2, 3) and gradient is None) for n in PARAMETERS
    ]
    # Otherwise the gradient of x is that of the residual, to the bit.
    differs = scale is not None or row_scale is not None or ctx.x_dtype != total.dtype
    apart = ctx.needs_input_grad[0] and differs
    gradients: list[Tensor | None] = [None] * 9
    if gradient is None and extra is None:
        return tuple(gradients)
    of_total, of_x = extra, None
    sums: tuple[Tensor, ...] = ()
    if gradient is not None or apart or x_bias or factor:
        run = operation("add_layer_norm_backward", impl)
        results = run(gradient, extra, *saved, ctx.x_dtype, weight, bias, apart, x_bias, factor)
        of_x, sums = results[1], results[2].unbind()
        if gradient is not None:
            of_total = results[0]
    gradients[:2] = of_x if apart else of_total, of_total
    places = [(n, dtype) for n, dtype, one in zip(PARAMETERS, ctx.parameter_dtypes, wanted) if one]
    for (n, dtype), one in zip(places, sums):
        gradients[n] = one.to(dtype)
    return tuple(gradients)


differentiable("layer_norm", _norm_gradient, _keep_norm)
differentiable("add_layer_norm", _add_norm_gradient, _keep_add_norm)
