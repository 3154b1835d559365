"""Layer normalisation, one function each: what to call.

D width, R rows (the product of all leading dims). Bytes and FLOPs are of the Triton form.
"""

from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.dispatch import Impl, choose
from fastjepa_kernels.ops import norms as _norm_ops  # noqa: F401  (registers the operators)
from fastjepa_kernels.registry import operation


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Layer normalisation of the last dim: x [..., D], weight and bias [D] or None -> [..., D].

    Dtypes are float32, bfloat16 or float16, the parameters' may be another than that of `x`; the result is of
    `out_dtype`, or that of `x`, also under autocast. Mean and variance are of float32 (of float64 for float64, which
    the reference alone takes). Neighbouring channels and up to two strides of rows are read in place; the result is
    contiguous.

    Forward reads x and writes the result once, and 8 bytes of statistics a row; about 8 FLOPs a value. Backward reads
    x and the gradient and writes dx in one pass, about 14 FLOPs a value; the gradients of weight and bias are summed
    in float32 by at most 512 programs, 4 D bytes each for weight and for bias, and then in one fixed order: bitwise
    repeatable, no atomics. FLOP counters see none, as of torch's own. There is no second derivative.

    It replaces `F.layer_norm` where autocast would make it write float32, and its eager backward of two passes. Not
    under a compiler that already fuses the normalisation with its neighbours, where both sides are of one dtype.

    Errors: ValueError for shapes, dtypes or an implementation that cannot run (Triton takes no float64 and up to 8192
    channels).
    """
    _check("layer_norm", x, weight, bias, eps)
    out_dtype = _out_dtype("layer_norm", out_dtype, x)
    run = operation("layer_norm", choose("layer_norm", impl, x, out_dtype, channels=x.shape[-1]))
    return run(x, weight, bias, float(eps), out_dtype)[0]


def layer_norm_through(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Layer normalisation, and x again for who reads it further on: (as `layer_norm`, x), [..., D] each.

    What a residual stream needs at its start: the gradient that comes back through x is added in the backward pass of
    the normalisation, where autograd would read and write both in a pass of its own. Otherwise as `layer_norm`.

    Errors: ValueError as `layer_norm`.
    """
    _check("layer_norm_through", x, weight, bias, eps)
    out_dtype = _out_dtype("layer_norm_through", out_dtype, x)
    chosen = choose("layer_norm", impl, x, out_dtype, channels=x.shape[-1])
    normalised, same = _Through.apply(x, weight, bias, float(eps), out_dtype, chosen)
    return normalised, same


class _Through(torch.autograd.Function):
    """An operator of torch may not return its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        weight, bias, eps, out_dtype, ctx.impl = given
        normalised, mean, rstd = operation("layer_norm", ctx.impl)(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return normalised, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, extra: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        if gradient is None:
            return (extra,) + (None,) * 5
        wanted = ctx.needs_input_grad[1:3]
        run = operation("layer_norm_backward", ctx.impl)
        dx, dweight, dbias = run(gradient, extra, x, weight, mean, rstd, *wanted)
        of_weight = dweight.to(weight.dtype) if wanted[0] else None
        return dx, of_weight, dbias.to(ctx.bias_dtype) if wanted[1] else None, None, None, None


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    x_bias: Tensor | None = None,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The step between two blocks: x [..., D], residual [..., D] -> (normalised sum, sum), [..., D] each.

    The sum, the new residual, is residual + row_scale * scale * (x + x_bias), each factor only where it is given:
    `x_bias` [D] is the bias of the linear layer that made x, which then runs without it, `scale` [D] is LayerScale,
    `row_scale` [B], one number for each entry of the first dim of x, is DropPath (0 or 1 / (1 - rate)) and has no
    gradient. The sum is formed in float32 and rounded to the dtype of `residual`; the normalised form of that rounded
    sum has `out_dtype`, or the dtype of `x`. So a float32 residual stream goes with bfloat16 blocks. Dtypes of
    parameters and factors are free; layouts and statistics as for `layer_norm`.

    Forward reads two values and writes two for each of R * D, about 9 FLOPs each (12 with all factors). Backward reads
    the sum and both gradients and writes one, which is the gradient of both inputs; a second one in the same pass where
    there is a factor, or dtypes differ. The gradients of `x_bias` and `scale` are column sums that ride in it as those
    of weight and bias do, repeatable and without atomics: 4 D bytes each for at most 512 programs. Only a `scale` with
    a gradient keeps x for the backward pass, and reads it there.

    It replaces `residual + x` with `F.layer_norm` after it, which reads the sum again and adds the residual's gradient
    in a pass of its own; bias, LayerScale and DropPath before it, a pass each way for each; and the sum over rows for
    the gradient of the linear layer's bias, which reads all of dx. Not where the sum is not used again, and not under a
    compiler that fuses the two.

    Errors: ValueError as for `layer_norm`, for a residual of another shape or device, for factors of another shape, and
    for a `row_scale` that asks for a gradient.
    """
    _check("add_layer_norm", x, weight, bias, eps, x_bias=x_bias, scale=scale)
    if residual.shape != x.shape or residual.device != x.device or not residual.dtype.is_floating_point:
        raise ValueError(
            f"add_layer_norm: expected a floating residual {list(x.shape)} on {x.device}, got {list(residual.shape)}, "
            f"{residual.dtype} on {residual.device}"
        )
    if row_scale is not None:
        _check_row_scale("add_layer_norm", row_scale, x)
    out_dtype = _out_dtype("add_layer_norm", out_dtype, x)
    chosen = choose("add_layer_norm", impl, x, residual.dtype, out_dtype, channels=x.shape[-1])
    run = operation("add_layer_norm", chosen)
    normalised, total, _, _ = run(x, residual, weight, bias, float(eps), x_bias, scale, row_scale, out_dtype)
    return normalised, total


def _out_dtype(name: str, out_dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if not out_dtype.is_floating_point:
        raise ValueError(f"{name}: out_dtype must be a floating dtype, got {out_dtype}")
    return out_dtype


def _check_row_scale(name: str, row_scale: Tensor, x: Tensor) -> None:
    if x.ndim < 2:
        raise ValueError(f"{name}: row_scale needs x [B, ..., D], got {list(x.shape)}")
    if row_scale.shape != x.shape[:1] or row_scale.device != x.device or not row_scale.dtype.is_floating_point:
        raise ValueError(
            f"{name}: expected a floating row_scale [{x.shape[0]}] on {x.device}, got {list(row_scale.shape)}, "
            f"{row_scale.dtype} on {row_scale.device}"
        )
    if row_scale.requires_grad:
        raise ValueError(f"{name}: row_scale gets no gradient, got one that asks for it: detach it")


def _check(
    name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, **factors: Tensor | None
) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name}: x must be of a floating dtype, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected x [..., D] with at least one channel, got {list(x.shape)}")
    for what, given in (("weight", weight), ("bias", bias), *factors.items()):
        if given is None:
            continue
        if given.shape != x.shape[-1:] or given.device != x.device or not given.dtype.is_floating_point:
            raise ValueError(
                f"{name}: expected a floating {what} [{x.shape[-1]}] on {x.device}, got {list(given.shape)}, "
                f"{given.dtype} on {given.device}"
            )
    if eps < 0:
        raise ValueError(f"{name}: eps must not be negative, got {eps}")
