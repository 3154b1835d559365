"""`bias_gelu`, `linear_gelu` and `mlp` and their gradients as operators of torch."""

from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.reference import mlp as reference
from fastjepa_kernels.registry import differentiable, operation, register


def _backward_fake(
    gradient: Tensor, product: Tensor, bias: Tensor | None, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(product.dtype, torch.float32)
    return product.new_empty(product.shape), product.new_empty(product.shape[1] if bias_gradient else 0, dtype=wide)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], weight.shape[0]
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


def _mlp_fake(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    kept = (x.shape[0], w1.shape[0]) if keep else (0,)
    return x.new_empty(x.shape[0], w2.shape[0]), x.new_empty(kept), x.new_empty(kept)


def _product_fake(gradient: Tensor, weight: Tensor, before: Tensor, bias_gradient: bool) -> tuple[Tensor, Tensor]:
    return _backward_fake(gradient, before, None, bias_gradient)


def _linear_flops(x: Any, weight: Any, *_: Any, **named: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


def _mlp_flops(x: Any, w1: Any, b1: Any, w2: Any, *_: Any, **named: Any) -> int:
    return 2 * x[0] * w1[0] * (x[1] + w2[0])


def _product_flops(gradient: Any, weight: Any, *_: Any, **named: Any) -> int:
    return 2 * gradient[0] * gradient[1] * weight[1]


register(
    "bias_gelu",
    "(Tensor product, Tensor? bias) -> Tensor",
    reference=reference.bias_gelu,
    triton="mlp.bias_gelu",
    fake=lambda product, bias: product.new_empty(product.shape),
)
register(
    "bias_gelu_backward",
    "(Tensor gradient, Tensor product, Tensor? bias, bool bias_gradient) -> (Tensor, Tensor)",
    reference=reference.bias_gelu_backward,
    triton="mlp.bias_gelu_backward",
    fake=_backward_fake,
)
register(
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor? bias, bool keep) -> (Tensor, Tensor)",
    reference=reference.linear_gelu,
    triton="linear_gelu.linear_gelu",
    fake=_linear_fake,
    flops=_linear_flops,
)
register(
    "mlp",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, bool keep) -> (Tensor, Tensor, Tensor)",
    reference=reference.mlp,
    triton="gelu_product.mlp",
    fake=_mlp_fake,
    flops=_mlp_flops,
)
register(
    "gelu_product_backward",
    "(Tensor gradient, Tensor weight, Tensor before, bool bias_gradient) -> (Tensor, Tensor)",
    reference=reference.gelu_product_backward,
    triton="gelu_product.gelu_product_backward",
    fake=_product_fake,
    flops=_product_flops,
)


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    product, bias = inputs
    ctx.save_for_backward(product, bias)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _bias_gelu_gradient(ctx: Any, impl: str, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    product, bias = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    dproduct, dbias = operation("bias_gelu_backward", impl)(gradient, product, bias, wanted)
    return dproduct, dbias.to(ctx.bias_dtype) if wanted else None


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, keep = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])
    ctx.kept, ctx.bias_dtype = keep, None if bias is None else bias.dtype


def _linear_gradient(ctx: Any, impl: str, gradient: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if gradient is None:
        return None, None, None, None
    if not ctx.kept:
        raise RuntimeError("linear_gelu: there is no gradient without keep=True")
    x, weight, before = ctx.saved_tensors
    for_x, for_weight, for_bias, _ = ctx.needs_input_grad
    dsum, dbias = operation("bias_gelu_backward", impl)(gradient, before, None, for_bias)
    return (
        dsum @ weight if for_x else None,
        dsum.t() @ x if for_weight else None,
        dbias.to(ctx.bias_dtype) if for_bias else None,
        None,
    )


def _keep_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, b1, w2, keep = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w1, w2, *output[1:])
    ctx.kept, ctx.bias_dtype = keep, None if b1 is None else b1.dtype


def _mlp_gradient(ctx: Any, impl: str, gradient: Tensor | None, *_: None) -> tuple[Any, ...]:
    if gradient is None:
        return None, None, None, None, None
    if not ctx.kept:
        raise RuntimeError("mlp: there is no gradient without keep=True")
    # Once: under recomputation a tensor is given out once.
    x, w1, w2, before, activation = ctx.saved_tensors
    for_x, for_w1, for_b1, for_w2, _ = ctx.needs_input_grad
    dw2 = gradient.t() @ activation if for_w2 else None
    if not (for_x or for_w1 or for_b1):
        return None, None, None, dw2, None
    dsum, db1 = operation("gelu_product_backward", impl)(gradient, w2, before, for_b1)
    return (
        dsum @ w1 if for_x else None,
        dsum.t() @ x if for_w1 else None,
        db1.to(ctx.bias_dtype) if for_b1 else None,
        dw2,
        None,
    )


differentiable("bias_gelu", _bias_gelu_gradient, _keep_product)
differentiable("linear_gelu", _linear_gradient, _keep_linear)
differentiable("mlp", _mlp_gradient, _keep_mlp)
