"""Cases of noise by key and of the predictor's input."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastjepa_kernels as ours
from fastjepa_kernels.reference.philox import noise
from fastjepa_kernels.testing.case import Case, Shape, random

SEED = 5


def _keys(shape: Shape, device: torch.device) -> Tensor:
    """row_key [B, K]."""
    clip = torch.arange(shape["clips"], device=device).unsqueeze(1)
    return ours.row_keys(clip * 2**20, torch.arange(shape["kept"], device=device))


def _alpha(shape: Shape, device: torch.device) -> Tensor:
    return torch.linspace(0.1, 0.9, shape["clips"], device=device)


def _normal(keys: Tensor, like: Tensor) -> Tensor:
    """The noise in float32 at least: the kernels add it before they round."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return noise(keys, like.shape[-1], torch.tensor(SEED, device=keys.device), dtype)


def _noised(x: Tensor, alpha: Tensor, keys: Tensor) -> Tensor:
    made = _normal(keys, x)
    share = alpha.to(made.dtype).view(-1, *[1] * (x.ndim - 1))
    return share.sqrt() * F.layer_norm(x.to(made.dtype), x.shape[-1:]) + (1 - share).sqrt() * made


def _philox_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # As many channels as the result has, of its dtype: the keys alone do not tell.
    return _keys(shape, device), torch.empty(0, shape["width"], device=device)


def _philox(impl: Any, keys: Tensor, like: Tensor) -> tuple[Tensor]:
    return (ours.philox_normal(keys, like.shape[1], SEED, impl=impl),)


def _noise_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = random(shape["clips"], shape["kept"], shape["width"], like=(device, dtype), seed=1, scale=3)
    return x, _alpha(shape, device), _keys(shape, device)


def _noise(impl: Any, x: Tensor, alpha: Tensor, keys: Tensor) -> tuple[Tensor]:
    return (ours.layer_norm_noise(x, alpha, keys, SEED, impl=impl),)


def _index(shape: Shape, device: torch.device, seed: int, kept: str = "kept") -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.rand(shape["clips"], shape["tokens"], generator=generator, device=device).argsort(dim=-1)
    return order[:, : shape[kept]].contiguous()


def _gather_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = random(shape["clips"], shape["tokens"], shape["width"], like=(device, dtype), seed=1, scale=3)
    return x, _index(shape, device, 7), _alpha(shape, device), _keys(shape, device)


def _gather(impl: Any, x: Tensor, index: Tensor, alpha: Tensor, keys: Tensor) -> tuple[Tensor]:
    return (ours.gather_norm_noise(x, index, alpha, keys, SEED, impl=impl),)


def _gather_eager(x: Tensor, index: Tensor, alpha: Tensor, keys: Tensor) -> tuple[Tensor]:
    rows = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return (_noised(rows, alpha, keys).to(x.dtype),)


def _assemble_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    like, width = (device, dtype), shape["width"]
    return (
        random(shape["clips"], shape["kept"], width, like=like, seed=1),
        _index(shape, device, 7),
        _index(shape, device, 8, "asked"),
        random(shape["tokens"], width, like=(device, torch.float32), seed=2),
        random(width, like=like, seed=3),
    )


def _assemble(impl: Any, *inputs: Tensor) -> tuple[Tensor]:
    return (ours.assemble_tokens(*inputs, impl=impl),)


def _assemble_eager(
    context: Tensor, context_index: Tensor, target_index: Tensor, table: Tensor, token: Tensor
) -> tuple[Tensor]:
    asked = token + table[target_index]
    return (torch.cat([context + table[context_index], asked], dim=1).to(context.dtype),)


def tokens(clips: int, tokens: int, kept: int, width: int) -> Shape:
    """Rows by name, of clips."""
    return {"clips": clips, "tokens": tokens, "kept": kept, "width": width, "rows": clips * kept}


def assembled(clips: int, every: int, kept: int, asked: int, width: int) -> Shape:
    """Context rows and target rows of clips."""
    return {**tokens(clips, every, kept, width), "asked": asked}


_SHAPES = {"small": tokens(2, 40, 33, 96), "odd": tokens(3, 9, 7, 1000), "predictor": tokens(24, 1568, 900, 384)}

NOISE_CASES = (
    Case(
        "philox_normal", _philox_inputs, _philox, lambda keys, like: (_normal(keys, like).to(like.dtype),), _SHAPES,
        {"philox_normal": "forward"},
    ),
    Case(
        "layer_norm_noise", _noise_inputs, _noise,
        lambda x, alpha, keys: (_noised(x, alpha, keys).to(x.dtype),), _SHAPES, {}, (0,),
    ),
    Case("gather_norm_noise", _gather_inputs, _gather, _gather_eager, _SHAPES, {}, (0,)),
    Case(
        "assemble_tokens", _assemble_inputs, _assemble, _assemble_eager,
        {"small": assembled(2, 40, 33, 33, 96), "odd": assembled(3, 9, 7, 4, 1000),
         "predictor": assembled(24, 1568, 900, 900, 384)}, {"assemble_sum": "backward"}, (0, 4),
    ),
)  # fmt: skip
