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
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + residual, rounded to the dtype of the residual, and its normalised form in that of x, mean and 1 / std."""
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    total = (x.contiguous().to(wide) + residual.contiguous().to(wide)).to(residual.dtype)
    out, mean, rstd = layer_norm(total, weight, bias, eps, x.dtype)
    return out, total, mean, rstd
