"""A feed-forward layer and its first half in plain PyTorch: the GELU is the exact one, x * Phi(x) by erf."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _sum(product: Tensor, bias: Tensor | None) -> Tensor:
    wide = product.to(torch.promote_types(product.dtype, torch.float32))
    return wide if bias is None else wide + bias.to(wide.dtype)


def bias_gelu(product: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(product + bias), product [R, O], in float32 at least and rounded once to the dtype of `product`."""
    return F.gelu(_sum(product, bias)).to(product.dtype)


def bias_gelu_backward(
    gradient: Tensor, product: Tensor, bias: Tensor | None, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of product [R, O] in its dtype, and of bias [O] in the wide dtype, or [0]."""
    u = _sum(product, bias)
    slope = 0.5 * (1.0 + torch.erf(u * math.sqrt(0.5))) + u * torch.exp(-0.5 * u * u) * (1.0 / math.sqrt(2.0 * math.pi))
    wide = gradient.to(u.dtype) * slope
    return wide.to(product.dtype), wide.sum(0) if bias_gradient else wide.new_empty(0)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """x [R, I], weight [O, I], bias [O] -> gelu(x weight^T + bias) [R, O], and the sum before, [0] without `keep`."""
    before = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return F.gelu(before), before if keep else before.new_empty(0)


def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [R, I], w1 [O, I], b1 [O], w2 [D, O] -> gelu(x w1^T + b1) w2^T [R, D]; the sum before the GELU, its result.

    The last two are [R, O], or [0] without `keep`.
    """
    activation, before = linear_gelu(x, w1, b1, keep)
    return F.linear(activation, w2), before, activation if keep else activation.new_empty(0)


def gelu_product_backward(
    gradient: Tensor, weight: Tensor, before: Tensor, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """gradient [R, D], weight [D, O], before [R, O] -> (gradient weight) * gelu'(before) [R, O], its column sums [O].

    The sums are of the wide dtype, or [0] without `bias_gradient`. The library rounds the product to its dtype.
    """
    return bias_gelu_backward(gradient @ weight, before, None, bias_gradient)
