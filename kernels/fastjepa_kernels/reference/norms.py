"""Layer normalisation in plain PyTorch: x [..., D], statistics of a row in float32 at least."""

import torch
from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] -> normalised [..., D], mean [...], 1 / standard deviation [...]; the variance is the biased one."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.contiguous().to(wide)
    mean = values.mean(-1)
    centred = values - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    out = centred * rstd.unsqueeze(-1)
    if weight is not None:
        out = out * weight.to(wide)
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(out_dtype), mean, rstd


def layer_norm_backward(
    gradient: Tensor,
    extra: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [..., D] in its dtype, plus `extra`; of weight and bias [D] in the wide dtype, or [0] each."""
    wide, width = mean.dtype, x.shape[-1]
    values = gradient.contiguous().to(wide)
    unit = (x.contiguous().to(wide) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    scaled = values if weight is None else values * weight.to(wide)
    along = (scaled * unit).mean(-1, keepdim=True)
    dx = (scaled - scaled.mean(-1, keepdim=True) - unit * along) * rstd.unsqueeze(-1)
    if extra is not None:
        dx = dx + extra.contiguous().to(wide)
    none = values.new_empty(0)
    return (
        dx.to(x.dtype),
        (values * unit).reshape(-1, width).sum(0) if weight_gradient else none,
        values.reshape(-1, width).sum(0) if bias_gradient else none.clone(),
    )


def add_layer_norm(
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
    """residual + row_scale * scale * (x + x_bias) in the dtype of the residual, its normalised form, mean, 1 / std."""
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    values = x.contiguous().to(wide)
    if x_bias is not None:
        values = values + x_bias.to(wide)
    if scale is not None:
        values = values * scale.to(wide)
    if row_scale is not None:
        values = values * _by_clip(row_scale, x).to(wide)
    total = (values + residual.contiguous().to(wide)).to(residual.dtype)
    out, mean, rstd = layer_norm(total, weight, bias, eps, out_dtype)
    return out, total, mean, rstd


def add_layer_norm_backward(
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
    """Gradients of the sum [..., D] and of x [..., D] in their dtypes, and of [parameters wanted, D] in the wide dtype.

    `gradient` is that of the normalised form, `extra` that of the sum; one may be None. The first result is [0] without
    `gradient`, where it would be `extra`, the second where it is not wanted. Parameters in the order of the flags.
    """
    wide = mean.dtype
    sums, of_total = [], None
    if gradient is not None:
        of_total, *pair = layer_norm_backward(
            gradient, extra, total.to(wide), weight, mean, rstd, weight_gradient, bias_gradient
        )
        sums = [one for one, wanted in zip(pair, (weight_gradient, bias_gradient)) if wanted]
    arriving = extra.contiguous().to(wide) if of_total is None and extra is not None else of_total
    assert arriving is not None
    of_x = arriving if row_scale is None else arriving * _by_clip(row_scale, total).to(wide)
    of_scaled = of_x
    if scale is not None:
        of_x = of_x * scale.to(wide)
    if x_bias_gradient:
        sums.append(of_x.reshape(-1, total.shape[-1]).sum(0))
    if scale_gradient:
        assert x is not None
        values = x.contiguous().to(wide)
        if x_bias is not None:
            values = values + x_bias.to(wide)
        sums.append((of_scaled * values).reshape(-1, total.shape[-1]).sum(0))
    return (
        total.new_empty(0) if of_total is None else of_total.to(total.dtype),
        of_x.to(x_dtype, copy=of_x is arriving) if x_gradient else total.new_empty(0, dtype=x_dtype),
        torch.stack(sums) if sums else mean.new_empty(0, total.shape[-1]),
    )


def _by_clip(row_scale: Tensor, x: Tensor) -> Tensor:
    """[B] beside x [B, ..., D]."""
    return row_scale.view(-1, *[1] * (x.ndim - 1))
