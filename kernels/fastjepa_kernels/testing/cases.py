"""One case for each operation: inputs, our call, what it replaces. Tests, benches and `tune` go through this list."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastjepa_kernels as ours
from fastjepa_kernels.testing.case import Case, Shape, fresh, random, results, timed, yardstick
from fastjepa_kernels.testing.cases_of_blocks import BLOCK_CASES
from fastjepa_kernels.testing.cases_of_noise import NOISE_CASES

__all__ = ["CASES", "Case", "Shape", "case_of", "fresh", "results", "timed", "yardstick"]

BETAS, EPS, LR, DECAY, MOMENTUM = (0.9, 0.95), 1e-8, 1e-3, 0.05, 0.99


def _kept(shape: Shape, device: torch.device) -> Tensor:
    """index [M, B, K]: other tokens for each mask and clip, in no order."""
    generator = torch.Generator(device).manual_seed(7)
    order = torch.rand(shape["masks"], shape["clips"], shape["tokens"], generator=generator, device=device)
    return order.argsort(dim=-1)[..., : shape["kept"]].contiguous()


def tokens(clips: int, tokens: int, kept: int, width: int, masks: int = 1) -> Shape:
    """Tokens of which each mask keeps so many."""
    rows = masks * clips * kept
    return {"masks": masks, "clips": clips, "tokens": tokens, "kept": kept, "width": width, "rows": rows}


def _gather_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = random(shape["clips"], shape["tokens"], shape["width"], like=(device, dtype), seed=1)
    return x, _kept(shape, device)


def _gather_eager(x: Tensor, index: Tensor) -> tuple[Tensor]:
    return (torch.cat([x.gather(1, one.unsqueeze(-1).expand(-1, -1, x.shape[2])) for one in index]),)


def _gather_library(x: Tensor, index: Tensor) -> tuple[Tensor]:
    clips, tokens, width = x.shape
    first = torch.arange(clips, device=x.device).unsqueeze(1) * tokens
    return (x.view(-1, width).index_select(0, (index + first).view(-1)).view(-1, index.shape[2], width),)


def _scatter_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = random(shape["clips"], shape["kept"], shape["width"], like=(device, dtype), seed=1)
    # As many tokens as the result has: the index alone does not tell.
    return x, _kept(shape, device)[0], random(shape["width"], like=(device, dtype), seed=2), _whole(shape, device)


def _whole(shape: Shape, device: torch.device) -> Tensor:
    return torch.empty(shape["tokens"], 0, dtype=torch.int64, device=device)


def _scatter(impl: Any, x: Tensor, index: Tensor, fill: Tensor, whole: Tensor) -> tuple[Tensor]:
    return (ours.scatter_tokens(x, index, len(whole), fill, impl=impl),)


def _scatter_eager(x: Tensor, index: Tensor, fill: Tensor, whole: Tensor) -> tuple[Tensor]:
    rows = fill.expand(len(x), len(whole), -1)
    return (rows.scatter(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]), x),)


def _norm_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    like, width = (device, dtype), shape["width"]
    return (
        random(shape["rows"], width, like=like, seed=1, scale=3) + 1,
        1 + random(width, like=like, seed=2, scale=0.1),
        random(width, like=like, seed=3),
    )


def _add_norm_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, weight, bias = _norm_inputs(shape, device, dtype)
    return x, random(*x.shape, like=(device, dtype), seed=4, scale=5), weight, bias


def _norm_eager(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6),)


def _add_norm_eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return F.layer_norm(total, x.shape[-1:], weight, bias, 1e-6), total


def _loss_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    like, index = (device, dtype), _kept(shape, device)
    prediction = random(shape["masks"] * shape["clips"], shape["kept"], shape["width"], like=like, seed=1)
    return prediction, random(shape["clips"], shape["tokens"], shape["width"], like=like, seed=2, scale=4) + 2, index


def _loss_eager(prediction: Tensor, target: Tensor, index: Tensor) -> tuple[Tensor]:
    # The statistics and the mean are float32, as under autocast.
    wide = torch.promote_types(target.dtype, torch.float32)
    goal = _gather_eager(F.layer_norm(target.detach().to(wide), target.shape[-1:]), index)[0]
    return ((prediction.to(wide) - goal).abs().mean(),)


def _ema_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    count = shape["rows"]
    return random(count, like=(device, torch.float32), seed=1), random(count, like=(device, dtype), seed=2)


def _halves(x: Tensor) -> list[Tensor]:
    """Two tensors, which share a launch, that are one to everything else."""
    return list(x.split((len(x) + 1) // 2))


def _ema(impl: Any, target: Tensor, online: Tensor) -> tuple[Tensor]:
    ours.ema_update_(_halves(target), _halves(online), MOMENTUM, impl=impl)
    return (target,)


def _ema_eager(target: Tensor, online: Tensor) -> tuple[Tensor]:
    return (target.mul_(MOMENTUM).add_((1 - MOMENTUM) * online.to(target.dtype)),)


def _ema_library(target: Tensor, online: Tensor) -> tuple[Tensor]:
    torch._foreach_lerp_([target], [online.to(target.dtype)], 1 - MOMENTUM)
    return (target,)


def _adamw_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    count, like = shape["rows"], (device, torch.float32)
    parameter, mean, target = (random(count, like=like, seed=seed) for seed in (1, 2, 3))
    square = random(count, like=like, seed=4).square()
    step = torch.tensor(10.0, device=device)
    return parameter, random(count, like=(device, dtype), seed=5), mean, square, step, target


def _adamw(
    impl: Any, parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor, target: Tensor
) -> tuple[Tensor, ...]:
    p, g, m, s = (_halves(x) for x in (parameter, gradient, mean, square))
    ours.adamw_ema_(
        p, g, m, s, [step, step.clone()], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, targets=_halves(target),
        momentum=MOMENTUM, impl=impl,
    )  # fmt: skip
    return parameter, mean, square, target


def _adamw_eager(
    parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor, target: Tensor
) -> tuple[Tensor, ...]:
    gradient, step = gradient.to(parameter.dtype), step.add_(1)
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    denominator = square.sqrt() / (1 - BETAS[1] ** step).sqrt() + EPS
    parameter.mul_(1 - LR * DECAY).sub_(LR / (1 - BETAS[0] ** step) * (mean / denominator))
    return parameter, mean, square, *_ema_eager(target, parameter)


def _adamw_library(
    parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor, target: Tensor
) -> tuple[Tensor, ...]:
    torch._foreach_add_([step], 1)
    torch._fused_adamw_(
        [parameter], [gradient.to(parameter.dtype)], [mean], [square], [], [step], lr=LR, beta1=BETAS[0],
        beta2=BETAS[1], weight_decay=DECAY, eps=EPS, amsgrad=False, maximize=False,
    )  # fmt: skip
    return parameter, mean, square, *_ema_library(target, parameter)


# Encoder and predictor of a ViT-H at 16 frames: 1568 tokens of which a context mask keeps about a third.
_ROWS = {"encoder": {"rows": 24 * 560, "width": 1280}, "predictor": {"rows": 24 * 1400, "width": 384}}
_SMALL = {"small": {"rows": 33, "width": 96}, "odd": {"rows": 7, "width": 1000}}
_HUGE = {"huge": {"rows": 2**21 + 3, "width": 1024}}
_FLAT = {"small": {"rows": 1000}, "odd": {"rows": 513}, "matrix": {"rows": 1280 * 5120}}

CASES = (
    Case(
        "gather_tokens", _gather_inputs, lambda impl, x, index: (ours.gather_tokens(x, index, impl=impl),),
        _gather_eager,
        {"small": tokens(2, 40, 33, 96, 2), "odd": tokens(3, 9, 7, 1000), "encoder": tokens(24, 1568, 560, 1280, 2),
         "huge": tokens(1, 2**21 + 3, 2**21 + 3, 1024)},
        {"gather_tokens": "forward", "gather_tokens_backward": "backward"}, (0,), _gather_library,
    ),
    Case(
        "scatter_tokens", _scatter_inputs, _scatter, _scatter_eager,
        {"small": tokens(2, 40, 33, 96), "odd": tokens(3, 9, 7, 1000), "predictor": tokens(24, 1568, 560, 384),
         "huge": tokens(1, 2**21 + 3, 2**20, 1024)},
        {"scatter_tokens": "forward"}, (0, 2),
    ),
    Case(
        "layer_norm", _norm_inputs, lambda impl, *inputs: (ours.layer_norm(*inputs, impl=impl),), _norm_eager,
        {**_SMALL, **_ROWS, **_HUGE},
        {"layer_norm": "forward", "layer_norm_backward": "backward", "layer_norm_sum": "backward"}, (0, 1, 2),
    ),
    Case(
        "add_layer_norm", _add_norm_inputs, lambda impl, *inputs: ours.add_layer_norm(*inputs, impl=impl),
        _add_norm_eager, {**_SMALL, **_ROWS}, {}, (0, 1, 2, 3),
    ),
    Case(
        "target_loss", _loss_inputs, lambda impl, *inputs: (ours.target_loss(*inputs, impl=impl),), _loss_eager,
        {"small": tokens(2, 40, 33, 96, 2), "odd": tokens(3, 9, 7, 1000),
         "encoder": tokens(24, 1568, 1000, 1280, 2)},
        {"target_loss": "forward", "target_loss_total": "forward", "target_loss_backward": "backward"}, (0,),
    ),
    Case("ema_update_", _ema_inputs, _ema, _ema_eager, {**_FLAT, "huge": {"rows": 2**31 + 5}},
         {"ema_update_": "forward"}, best=_ema_library),
    Case("adamw_ema_", _adamw_inputs, _adamw, _adamw_eager, _FLAT, {"adamw_ema_": "forward"}, best=_adamw_library),
    *BLOCK_CASES,
    *NOISE_CASES,
)  # fmt: skip


def case_of(pinned: str) -> Case:
    """The case that exercises these launch settings. Errors: ValueError where there is none."""
    for case in CASES:
        if pinned in case.pinned:
            return case
    known = sorted(name for case in CASES for name in case.pinned)
    raise ValueError(f"{pinned}: no case exercises these launch settings; there are {', '.join(known)}")
