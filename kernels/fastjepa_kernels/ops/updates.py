"""Updates in place as operators of torch: they return nothing and have no gradient."""

from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from fastjepa_kernels.reference import updates as reference
from fastjepa_kernels.registry import register


def _ema_triton(targets: list[Tensor], onlines: list[Tensor], move: Tensor) -> None:
    from fastjepa_kernels._triton import updates as kernels

    kernels.ema_update_(targets, onlines, move)
    # Autograd does not see what a kernel writes: a graph that saved these tensors must refuse to run backward.
    increment_version(targets)


def _adamw_ema_triton(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    targets: list[Tensor],
    copies: list[Tensor],
    *settings: Any,
) -> None:
    from fastjepa_kernels._triton import updates as kernels

    kernels.adamw_ema_(parameters, gradients, exp_avgs, exp_avg_sqs, targets, copies, *settings)
    increment_version([*parameters, *exp_avgs, *exp_avg_sqs, *targets, *copies])


def _nothing(*inputs: Any) -> None:
    return None


def _no_flops(*shapes: Any, **named: Any) -> int:
    return 0


register(
    "ema_update_",
    "(Tensor(a!)[] targets, Tensor[] onlines, Tensor move) -> ()",
    reference=reference.ema_update_,
    triton=_ema_triton,
    fake=_nothing,
    flops=_no_flops,
)
register(
    "adamw_ema_",
    "(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] targets, Tensor(e!)[] copies, Tensor scalars, float beta1, float beta2, float eps) -> ()",
    reference=reference.adamw_ema_,
    triton=_adamw_ema_triton,
    fake=_nothing,
    flops=_no_flops,
)
