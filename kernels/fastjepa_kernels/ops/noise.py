"""`philox_normal`, `layer_norm_noise`, `gather_norm_noise` and their gradients as operators of torch.

Mean and 1 / standard deviation of every row are results too, without a gradient: the backward pass reads them, and has
no need of the noise.
"""

from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.reference import noise as reference
from fastjepa_kernels.registry import differentiable, operation, register


def _rows_fake(x: Tensor, shape: tuple[int, ...], out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(shape[:-1], dtype=wide) for _ in range(2))
    return x.new_empty(shape, dtype=out_dtype), mean, rstd


def _norm_fake(
    x: Tensor,
    alpha: Tensor,
    row_key: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    position: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows_fake(x, x.shape, out_dtype)


def _gather_fake(
    x: Tensor,
    index: Tensor,
    alpha: Tensor,
    row_key: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    position: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows_fake(x, (*index.shape, x.shape[2]), out_dtype)


register(
    "philox_normal",
    "(Tensor row_key, SymInt width, Tensor seed) -> Tensor",
    reference=reference.philox_normal,
    triton="philox.normal",
    fake=lambda row_key, width, seed: row_key.new_empty((*row_key.shape, width), dtype=torch.float32),
)
register(
    "layer_norm_noise",
    "(Tensor x, Tensor alpha, Tensor? row_key, Tensor? seed, Tensor? noise, Tensor? position, float eps, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_noise,
    triton="noise.layer_norm_noise",
    fake=_norm_fake,
)
register(
    "gather_norm_noise",
    "(Tensor x, Tensor index, Tensor alpha, Tensor? row_key, Tensor? seed, Tensor? noise, Tensor? position, "
    "float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference.gather_norm_noise,
    triton="noise.gather_norm_noise",
    fake=_gather_fake,
)
register(
    "noise_backward",
    "(Tensor gradient, Tensor x, Tensor? index, Tensor alpha, Tensor mean, Tensor rstd) -> Tensor",
    reference=reference.noise_backward,
    triton="noise.noise_backward",
    fake=lambda gradient, x, index, alpha, mean, rstd: x.new_empty(x.shape),
)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], mean, rstd)


def _norm_gradient(ctx: Any, impl: str, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 8
    x, alpha, mean, rstd = ctx.saved_tensors
    return operation("noise_backward", impl)(gradient, x, None, alpha, mean, rstd), *[None] * 7


def _keep_gather(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], mean, rstd)


def _gather_gradient(ctx: Any, impl: str, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 9
    return operation("noise_backward", impl)(gradient, *ctx.saved_tensors), *[None] * 8


differentiable("layer_norm_noise", _norm_gradient, _keep_norm)
differentiable("gather_norm_noise", _gather_gradient, _keep_gather)
