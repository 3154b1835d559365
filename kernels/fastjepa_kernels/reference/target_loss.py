"""The error of predictions against normalised targets in plain PyTorch. B clips, M masks, N tokens, K kept tokens."""

import torch
from torch import Tensor

from fastjepa_kernels.reference.gather import gather


def width_of_sums(prediction: Tensor, target: Tensor) -> torch.dtype:
    """The dtype of statistics, sums and the loss: float32, or float64 where an input is."""
    return torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)


def loss(
    prediction: Tensor, target: Tensor, index: Tensor, exponent: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """prediction [M * B, K, D], target [B, N, D], index [M, B, K] -> the loss, mean and 1 / deviation of the rows.

    The last two are [M * B, K], for the backward pass.
    """
    wide = width_of_sums(prediction, target)
    rows = gather(target, index).to(wide)
    variance, mean = torch.var_mean(rows, dim=-1, correction=0)
    rstd = (variance + eps).rsqrt()
    difference = prediction.to(wide) - (rows - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    return difference.abs().pow(exponent).mean() / exponent, mean, rstd


def loss_backward(
    upstream: Tensor, prediction: Tensor, target: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, exponent: float
) -> Tensor:
    """Gradient [M * B, K, D] of the prediction; zero where prediction and target agree."""
    rows = gather(target, index).to(mean.dtype)
    difference = prediction.to(mean.dtype) - (rows - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    slope = difference.sign() * difference.abs().pow(exponent - 1)
    slope = torch.where(difference == 0, 0, slope) * (upstream / difference.numel())
    return slope.to(prediction.dtype).contiguous()
