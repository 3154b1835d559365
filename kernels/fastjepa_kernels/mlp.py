"""A feed-forward layer, and its first half alone: what to call. I features in, O after the first product, R rows."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels.dispatch import Impl, choose
from fastjepa_kernels.ops import mlp as _mlp_ops  # noqa: F401  (registers the operators)
from fastjepa_kernels.registry import operation

Form = Literal["auto", "library", "fused"]


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, form: Form = "auto", impl: Impl = "auto"
) -> Tensor:
    """gelu(x weight^T + bias) with the exact (erf) GELU: x [..., I], weight [O, I], bias [O] -> [..., O].

    Dtypes are float32, bfloat16 or float16 (float64 in the reference), those of x and weight are one; under autocast
    both are cast as it casts for a matrix product. `bias` may be of another floating dtype. Sums and the GELU are
    float32, rounded to the dtype of the product.

    Two forms, of which `auto` takes the first (no measurement yet says that the second is faster):
    - `library`: the library's matrix product without a bias, then one pass that adds the bias and applies the GELU,
      3 * R * O values moved beside the product's own (what is read again is the rounded product);
    - `fused`: a persistent Triton product that adds, rounds and applies the GELU to what it holds in registers, 2 * R *
      O values written where gradients are wanted, half of them otherwise.

    2 * R * I * O FLOPs forward and 4 * R * I * O backward, as counters see them, in library products. Backward reads
    the sum before the GELU, which is kept, and the gradient, and writes its gradient once; the bias's gradient rides in
    that pass as at most 512 partial sums a column, added in a fixed order: bitwise repeatable, no atomics.

    It replaces `F.gelu(F.linear(...))`, whose backward reads the gradient again to sum it for the bias. Not for the
    tanh GELU, nor under a compiler that fuses bias and GELU already where nothing needs the bias's gradient.

    Errors: ValueError for shapes, dtypes, devices, names of form or implementation, or one that cannot run.
    """
    name = "linear_gelu"
    if form not in get_args(Form):
        raise ValueError(f"{name}: form must be one of {', '.join(get_args(Form))}, got {form!r}")
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(f"{name}: expected x [..., I] and weight [O, I], got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: expected bias [{weight.shape[0]}], got {list(bias.shape)}")
    _check_floating(name, x.device, x=x, weight=weight, bias=bias)
    x, weight = _autocast(x, weight)
    if x.dtype != weight.dtype:
        raise ValueError(f"{name}: expected x and weight of one dtype, got {x.dtype} and {weight.dtype}")
    chosen = choose(name, impl, x)
    if form == "fused":
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        out, _ = operation("linear_gelu", chosen)(_rows(x), weight, bias, keep)
    else:
        product = F.linear(x, weight)
        out = operation("bias_gelu", chosen)(product.reshape(-1, weight.shape[0]), bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *, impl: Impl = "auto") -> Tensor:
    """gelu(x w1^T + b1) w2^T with the exact (erf) GELU: x [..., I], w1 [O, I], b1 [O], w2 [D, O] -> [..., D].

    A feed-forward layer without its last bias, which `add_layer_norm` adds as its `x_bias`. Dtypes are float32,
    bfloat16 or float16 (float64 in the reference), those of x, w1 and w2 are one, and so are those of their gradients;
    under autocast the three are cast as it casts for a matrix product. `b1` may be of another floating dtype.

    Forward is the product of `linear_gelu(form="fused")`, then the library's: 2 * R * O values written where gradients
    are wanted (the sum before the GELU, and its result), half of them otherwise, and R * O read, beside x, weights and
    the R * D values of the result. 2 * R * O * (I + D) FLOPs.

    Backward makes one persistent Triton product, gradient w2, with the slope of the GELU at the kept sum in its
    epilogue: float32 until it is rounded once, R * O values read and R * O written. The gradient of b1 rides in it as
    float32 partial sums, a row for each BLOCK_M rows, added in a fixed order: bitwise repeatable, no atomics. Three
    library products follow, which read the R * O values of that gradient twice and the kept result of the GELU once;
    4 * R * O * (I + D) FLOPs in all, as counters see them.

    It replaces `F.linear(F.gelu(F.linear(x, w1, b1)), w2)`, whose backward writes the gradient of the GELU's result,
    reads it again for that of the sum, and reads this for the bias: 3 * R * O values and a launch more. After
    `linear_gelu` a product of one's own costs 2 * R * O values and a launch more. Not for the tanh GELU, nor where the
    GELU's result is needed elsewhere or dropped out, nor where the library's product is so much faster than Triton's
    that it outweighs them: nothing has been measured yet. Recomputation repeats both products.

    Errors: ValueError for shapes, dtypes, devices, name of the implementation, or one that cannot run.
    """
    name = "mlp"
    if x.ndim == 0 or w1.ndim != 2 or x.shape[-1] != w1.shape[1] or 0 in w1.shape:
        raise ValueError(f"{name}: expected x [..., I] and w1 [O, I], got {list(x.shape)} and {list(w1.shape)}")
    if w2.ndim != 2 or w2.shape[1] != w1.shape[0] or 0 in w2.shape:
        raise ValueError(f"{name}: expected w2 [D, {w1.shape[0]}], got {list(w2.shape)}")
    if b1 is not None and b1.shape != w1.shape[:1]:
        raise ValueError(f"{name}: expected b1 [{w1.shape[0]}], got {list(b1.shape)}")
    _check_floating(name, x.device, x=x, w1=w1, b1=b1, w2=w2)
    x, w1, w2 = _autocast(x, w1, w2)
    if not x.dtype == w1.dtype == w2.dtype:
        raise ValueError(f"{name}: expected x, w1 and w2 of one dtype, got {x.dtype}, {w1.dtype} and {w2.dtype}")
    chosen = choose(name, impl, x)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2))
    out, *_ = operation(name, chosen)(_rows(x), w1, b1, w2, keep)
    return out.view(*x.shape[:-1], w2.shape[0])


def _check_floating(name: str, device: torch.device, **given: Tensor | None) -> None:
    for what, one in given.items():
        if one is not None and (not one.dtype.is_floating_point or one.device != device):
            raise ValueError(f"{name}: expected a floating {what} on {device}, got {one.dtype} on {one.device}")


def _autocast(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x and weights in the dtype that autocast takes for a product; as they are without it, and for float64."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, *weights
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) for t in (x, *weights))


def _rows(x: Tensor) -> Tensor:
    """x [..., I] -> [R, I]."""
    return x.flatten(0, -2) if x.ndim > 1 else x[None]
