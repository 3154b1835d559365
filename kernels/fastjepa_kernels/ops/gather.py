"""`gather_tokens`, `scatter_tokens` and their gradients as operators of torch."""

from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.reference import gather as reference
from fastjepa_kernels.registry import differentiable, operation, register

register(
    "gather_tokens",
    "(Tensor x, Tensor index, bool unique) -> Tensor",
    reference=reference.gather,
    triton="gather.gather",
    fake=lambda x, index, unique: x.new_empty(index.shape[0] * index.shape[1], index.shape[2], x.shape[2]),
)
register(
    "gather_tokens_backward",
    "(Tensor gradient, Tensor index, SymInt tokens, bool unique) -> Tensor",
    reference=reference.gather_backward,
    triton="gather.gather_backward",
    fake=lambda gradient, index, tokens, unique: gradient.new_empty(index.shape[1], tokens, gradient.shape[2]),
)
register(
    "scatter_tokens",
    "(Tensor x, Tensor index, SymInt tokens, Tensor? fill) -> Tensor",
    reference=reference.scatter,
    triton="gather.scatter",
    fake=lambda x, index, tokens, fill: x.new_empty(x.shape[0], tokens, x.shape[2]),
)


def _keep_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, ctx.unique = inputs
    ctx.save_for_backward(index)
    ctx.tokens = x.shape[1]


def _gather_gradient(ctx: Any, impl: str, gradient: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return operation("gather_tokens_backward", impl)(gradient, index, ctx.tokens, ctx.unique), None, None


def _keep_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, ctx.tokens, fill = inputs
    ctx.save_for_backward(index)
    ctx.fill_dtype = None if fill is None else fill.dtype


def _scatter_gradient(ctx: Any, impl: str, gradient: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
    (index,) = ctx.saved_tensors
    kept = operation("gather_tokens", impl)(gradient, index.unsqueeze(0), True)
    if ctx.fill_dtype is None:
        return kept, None, None, None
    # The fill row stands at every token that is not kept.
    free = torch.ones(gradient.shape[:2], dtype=torch.bool, device=gradient.device).scatter_(1, index.long(), False)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    filled = torch.where(free.unsqueeze(-1), gradient, 0).sum(dim=(0, 1), dtype=wide).to(ctx.fill_dtype)
    return kept, None, None, filled


differentiable("gather_tokens", _gather_gradient, _keep_gather)
differentiable("scatter_tokens", _scatter_gradient, _keep_scatter)
