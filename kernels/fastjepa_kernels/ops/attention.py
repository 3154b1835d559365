"""`indexed_attention` and its gradient as operators of torch.

The log2 of every query's sum of exp is a result too, without a gradient: the backward pass reads it. It is in base 2
because the kernels are, and a change of base would cost two roundings.
"""

from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.attention_inputs import Inputs
from fastjepa_kernels.reference import attention as reference
from fastjepa_kernels.registry import differentiable, operation, register

_INPUTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? q_index, Tensor? kv_index, Tensor? q_lengths, Tensor? kv_lengths, "
    "Tensor? starts, Tensor? bias, Tensor? q_ids, Tensor? kv_ids, SymInt longest, float scale, int[] grid, "
    "float theta, bool compat"
)


def _fake(*given: Any) -> tuple[Tensor, Tensor]:
    case = Inputs(*given)
    wide = torch.promote_types(case.q.dtype, torch.float32)
    return case.q.new_empty(case.out_shape()), case.q.new_empty(case.lse_shape(), dtype=wide)


def _backward_fake(gradient: Tensor, out: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, bias_wanted = given
    case = Inputs(*rest)
    dbias = lse.new_empty((3, case.heads, case.head) if bias_wanted else (0,))
    return *case.empty_gradients(fill=False), dbias


def _products(*given: Any) -> int:
    """FLOPs of one product of all queries with all keys; a shape stands for each tensor."""
    q, k, _, q_index, kv_index, _, _, starts, _, _, _, longest = given[:12]
    if starts is not None:
        return 2 * int(q[0] * longest * q[-2] * q[-1])
    keys = kv_index[1] if kv_index else (q if k is None else k)[1]
    return 2 * int(q[0] * (q_index[1] if q_index else q[1]) * keys * q[-2] * q[-1])


def _flops(*given: Any, **named: Any) -> int:
    return 2 * _products(*given)


def _backward_flops(gradient: Any, out: Any, lse: Any, *given: Any, **named: Any) -> int:
    return 5 * _products(*given)


register(
    "indexed_attention",
    f"({_INPUTS}) -> (Tensor, Tensor)",
    reference=reference.attention,
    triton="attention.attention",
    fake=_fake,
    flops=_flops,
)
register(
    "indexed_attention_backward",
    f"(Tensor gradient, Tensor out, Tensor lse, {_INPUTS}, bool bias_wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.attention_backward,
    triton="attention_backward.attention_backward",
    fake=_backward_fake,
    flops=_backward_flops,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    case = Inputs(*inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *case[:11])
    ctx.settings = case[11:]


def _gradient(ctx: Any, impl: str, gradient: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    case = Inputs(*tensors, *ctx.settings)
    nothing = (None,) * len(case)
    if gradient is None:
        return nothing
    bias_wanted = ctx.needs_input_grad[8]
    dq, dk, dv, dbias = operation("indexed_attention_backward", impl)(gradient, out, lse, *case, bias_wanted)
    first = (dq, None, None) if case.packed else (dq, dk, dv)
    return (
        *first,
        *nothing[3:8],
        dbias.to(case.bias.dtype) if bias_wanted and case.bias is not None else None,
        *(nothing[9:]),
    )


differentiable("indexed_attention", _gradient, _keep)
