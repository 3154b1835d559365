"""`assemble_tokens` and the column sums of its gradient as operators of torch."""

from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.reference import assemble as reference
from fastjepa_kernels.registry import differentiable, operation, register


def _fake(
    context: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    table: Tensor | None,
    mask_token: Tensor | None,
    targets: Tensor | None,
    alpha: Tensor | None,
    row_key: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    context_lengths: Tensor | None,
    target_lengths: Tensor | None,
    eps: float,
    gather_targets: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(context.dtype if alpha is None or targets is None else targets.dtype, torch.float32)
    shape = (0,) if alpha is None else target_index.shape
    mean, rstd = (context.new_empty(shape, dtype=wide) for _ in range(2))
    rows = context.shape[-2] + target_index.shape[-1]
    return context.new_empty((*context.shape[:-2], rows, context.shape[-1]), dtype=out_dtype), mean, rstd


def _sum_fake(
    gradient: Tensor, context: int, clips: int, context_lengths: Tensor | None, target_lengths: Tensor | None
) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.new_empty((clips, gradient.shape[-1]), dtype=wide)


register(
    "assemble_tokens",
    "(Tensor context, Tensor context_index, Tensor target_index, Tensor? table, Tensor? mask_token, Tensor? targets, "
    "Tensor? alpha, Tensor? row_key, Tensor? seed, Tensor? noise, Tensor? context_lengths, Tensor? target_lengths, "
    "float eps, bool gather_targets, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference.assemble_tokens,
    triton="assemble.assemble_tokens",
    fake=_fake,
)
register(
    "sum_of_targets",
    "(Tensor gradient, SymInt context, SymInt clips, Tensor? context_lengths, Tensor? target_lengths) -> Tensor",
    reference=reference.sum_of_targets,
    triton="assemble.sum_of_targets",
    fake=_sum_fake,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    context, _, target_index, _, mask_token, targets, alpha = inputs[:7]
    context_lengths, target_lengths, _, ctx.gather_targets, _ = inputs[10:]
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    rows = targets if alpha is not None else None
    ctx.save_for_backward(rows, target_index, alpha, mean, rstd, context_lengths, target_lengths)
    ctx.context, ctx.context_dtype = context.shape[-2], context.dtype
    ctx.token_shape, ctx.token_dtype = (None, None) if mask_token is None else (mask_token.shape, mask_token.dtype)
    ctx.targets_dtype = None if targets is None else targets.dtype
    ctx.tokens = targets.shape[1] if ctx.gather_targets else None


def _gradient(ctx: Any, impl: str, gradient: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 15
    rows, target_index, alpha, mean, rstd, context_lengths, target_lengths = ctx.saved_tensors
    wanted_context, wanted_token, wanted_targets = (ctx.needs_input_grad[n] for n in (0, 4, 5))
    of_context = of_token = of_targets = None
    if context_lengths is None:
        # A view where the dtypes agree: nothing is copied.
        seen, asked = gradient[:, : ctx.context], gradient[:, ctx.context :]
    else:
        seen = asked = gradient
        if wanted_context:
            _, place = reference.rows_of_clips(context_lengths, target_lengths, ctx.context, after=False)
            seen = gradient[place]
        if wanted_targets:
            clip, place = reference.rows_of_clips(target_lengths, context_lengths, len(target_index), after=True)
            asked = gradient[place]
            alpha = None if alpha is None else alpha[clip]
    if wanted_context:
        of_context = seen.to(ctx.context_dtype)
    if wanted_token:
        clips = len(gradient) if context_lengths is None else len(context_lengths) - 1
        sums = operation("sum_of_targets", impl)(gradient, ctx.context, clips, context_lengths, target_lengths)
        of_token = (sums if len(ctx.token_shape) == 2 else sums.sum(0)).to(ctx.token_dtype)
    if wanted_targets and rows is not None:
        index = target_index if ctx.gather_targets else None
        of_targets = operation("noise_backward", impl)(asked, rows, index, alpha, mean, rstd)
    elif wanted_targets and ctx.gather_targets:
        of_targets = operation("scatter_tokens", impl)(asked.to(ctx.targets_dtype), target_index, ctx.tokens, None)
    elif wanted_targets:
        of_targets = asked.to(ctx.targets_dtype)
    return of_context, None, None, None, of_token, of_targets, *[None] * 9


differentiable("assemble_tokens", _gradient, _keep)
