"""The first half of a feed-forward layer, one function: what to call. I input and O output features, R rows."""

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
    for what, given in (("x", x), ("weight", weight), ("bias", bias)):
        if given is not None and (not given.dtype.is_floating_point or given.device != x.device):
            raise ValueError(f"{name}: expected a floating {what} on {x.device}, got {given.dtype} on {given.device}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
    if x.dtype != weight.dtype:
        raise ValueError(f"{name}: expected x and weight of one dtype, got {x.dtype} and {weight.dtype}")
    chosen = choose(name, impl, x)
    if form == "fused":
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        out, _ = operation("linear_gelu", chosen)(x.flatten(0, -2) if x.ndim > 1 else x[None], weight, bias, keep)
    else:
        product = F.linear(x, weight)
        out = operation("bias_gelu", chosen)(product.reshape(-1, weight.shape[0]), bias)
    return out.view(*x.shape[:-1], weight.shape[0])
