"""`patch_embed_gather` and its gradient as operators of torch; the weight is a matrix here."""

import math
from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.reference import patch_embed as reference
from fastjepa_kernels.registry import differentiable, operation, register


def _fake(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    position: Tensor | None,
    mean: list[float],
    std: list[float],
    tubelet: int,
    patch: int,
    out_dtype: torch.dtype,
    fused: bool,
) -> Tensor:
    if index is not None:
        return weight.new_empty(index.shape[0] * index.shape[1], index.shape[2], weight.shape[0], dtype=out_dtype)
    clips, _, frames, height, width = video.shape
    tokens = (frames // tubelet) * (height // patch) * (width // patch)
    return weight.new_empty(clips, tokens, weight.shape[0], dtype=out_dtype)


def _backward_fake(
    gradient: Tensor,
    video: Tensor,
    index: Tensor | None,
    mean: list[float],
    std: list[float],
    tubelet: int,
    patch: int,
    dtype: torch.dtype,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    width, values = gradient.shape[-1], video.shape[1] * tubelet * patch * patch
    wide = torch.promote_types(dtype, torch.float32)
    return (
        gradient.new_empty((width, values) if weight_gradient else (0,), dtype=dtype),
        gradient.new_empty(width if bias_gradient else 0, dtype=wide),
    )


def _flops(video: Any, weight: Any, *rest: Any, out_shape: Any, **named: Any) -> int:
    return 2 * math.prod(out_shape) * weight[1]


def _backward_flops(gradient: Any, *rest: Any, out_shape: Any, **named: Any) -> int:
    return 2 * math.prod(gradient[:-1]) * math.prod(out_shape[0])


register(
    "patch_embed_gather",
    "(Tensor video, Tensor weight, Tensor? bias, Tensor? index, Tensor? position, float[] mean, float[] std, "
    "int tubelet, int patch, ScalarType out_dtype, bool fused) -> Tensor",
    reference=reference.patch_embed_gather,
    triton="patch_embed.patch_embed_gather",
    fake=_fake,
    flops=_flops,
)
register(
    "patch_embed_gather_backward",
    "(Tensor gradient, Tensor video, Tensor? index, float[] mean, float[] std, int tubelet, int patch, "
    "ScalarType dtype, bool weight_gradient, bool bias_gradient) -> (Tensor, Tensor)",
    reference=reference.patch_embed_gather_backward,
    triton="patch_embed.patch_embed_gather_backward",
    fake=_backward_fake,
    flops=_backward_flops,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    video, weight, bias, index, _, *settings = inputs
    ctx.save_for_backward(video, index)
    ctx.settings = settings[:4]
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype


def _gradient(ctx: Any, impl: str, gradient: Tensor) -> tuple[Any, ...]:
    video, index = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1:3]
    run = operation("patch_embed_gather_backward", impl)
    dweight, dbias = run(gradient, video, index, *ctx.settings, ctx.weight_dtype, *wanted)
    return None, dweight if wanted[0] else None, dbias.to(ctx.bias_dtype) if wanted[1] else None, *[None] * 8


differentiable("patch_embed_gather", _gradient, _keep)
