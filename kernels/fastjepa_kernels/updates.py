"""Updates of parameters in place, one pass over each: moving averages, and AdamW with a moving average."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjepa_kernels.dispatch import Impl, choose
from fastjepa_kernels.ops import updates as _update_ops  # noqa: F401  (registers the operators)
from fastjepa_kernels.registry import operation

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor], onlines: Sequence[Tensor], momentum: float | Tensor, *, impl: Impl = "auto"
) -> None:
    """target <- momentum * target + (1 - momentum) * online, in place, for every pair of tensors of equal shape.

    `targets` are float32, `onlines` float16, bfloat16, float32 or float64, `momentum` a number from 0 to 1 or a 0-dim
    floating tensor on their device, which the host does not read. 1 - momentum is formed in double precision (a
    float32 momentum near 1 has lost most of its digits already: give a number or float64); the rest is float32, as
    target + (1 - momentum) * (online - target), so that momentum 1 changes no value while weights are finite. Under
    `torch.compile` and in a CUDA graph a number becomes part of the graph: give a tensor.

    Moves 8 bytes in or out for each value of a target and the online value in; 3 FLOPs. It replaces the subtract,
    multiply, add of `torch._foreach_*`, which write and read the differences in between, and the copy to float32 of
    half-precision weights. Repeatable, no atomics. Contiguous tensors of one dtype share one launch, which reads their
    addresses from a table on the device: 24 bytes a tensor, and 16 for each 4096 values, copied there without waiting
    when addresses change. While a CUDA graph is captured there is one launch a tensor instead. A target that is not
    contiguous is copied there and back, and has a launch of its own.

    Errors: ValueError for empty lists, lengths, shapes, dtypes, devices, a momentum outside 0 to 1, or an
    implementation that cannot run.
    """
    first = _check_first("ema_update_", "targets", targets)
    _check("ema_update_", "targets", targets, targets, (torch.float32,))
    _check("ema_update_", "onlines", onlines, targets, _FLOATING)
    move = _move("ema_update_", momentum, first.device)
    operation("ema_update_", choose("ema_update_", impl, first))(list(targets), list(onlines), move.float())


@torch.no_grad()
def adamw_ema_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.01,
    clip_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    targets: Sequence[Tensor | None] | None = None,
    momentum: float | Tensor | None = None,
    copies: Sequence[Tensor | None] | None = None,
    target_copies: Sequence[Tensor | None] | None = None,
    impl: Impl = "auto",
) -> None:
    """One AdamW step in place; then, where given, the moving average of `targets` and compute copies of both.

    Parameters, moments (`exp_avg`, `exp_avg_sq` of `torch.optim.AdamW`) and targets are float32, gradients of any
    floating dtype, copies float16 or bfloat16, all of the parameter's shape; `steps` are the 0-dim float32 step counts
    of torch, on the same device, and go up by one. `copies` get the new weights and `target_copies` the new averages;
    None in a list stands for a parameter that has no target or no copy. Gradients are multiplied by `clip_scale` in
    float32 and not changed. `found_inf` (0-dim) other than 0 leaves everything alone, steps and targets too. `lr`,
    `weight_decay` and `momentum` are numbers or 0-dim tensors on the device, which the host does not read (under
    `torch.compile` and in a CUDA graph give tensors: a number becomes part of the graph); `weight_decay` and
    `clip_scale` may be tensors of one value a parameter. Formula and order of operations are those of
    `torch.optim.AdamW` (decoupled decay, no amsgrad); the average takes the new weights.

    Moves for each value 24 bytes, the gradient, 8 bytes with a target and the copies; about 20 FLOPs. It replaces
    clipping (which reads and writes gradients), fused AdamW, the moving average and a cast, which read the weights
    again each. Repeatable, no atomics. Launches as for `ema_update_` (and some twenty of a few bytes a call, for steps
    and scalars), with 72 bytes of the table a tensor: they are copied again in a step whose gradients have moved. Not
    for a few small tensors, where `torch.optim.AdamW(fused=True)` costs the host less.

    Errors: ValueError as for `ema_update_`, for `targets` without `momentum` or the reverse, for copies of targets that
    are not there, and for betas, eps, lr or decay out of range.
    """
    name = "adamw_ema_"
    first = _check_first(name, "parameters", parameters)
    for what, tensors in (("parameters", parameters), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check(name, what, tensors, parameters, (torch.float32,))
    _check(name, "gradients", gradients, parameters, _FLOATING)
    halves = (torch.float16, torch.bfloat16)
    averages = _complete(name, "targets", targets, parameters, (torch.float32,))
    rounded = _complete(name, "copies", copies, parameters, halves)
    averages_rounded = _complete(name, "target_copies", target_copies, parameters, halves)
    for n, copy in enumerate(target_copies or ()):
        if copy is not None and (targets is None or targets[n] is None):
            raise ValueError(f"{name}: target_copies[{n}] is given, and targets[{n}] is not")
    if len(steps) != len(parameters) or any(
        step.ndim or step.dtype != torch.float32 or step.device != first.device for step in steps
    ):
        raise ValueError(f"{name}: expected {len(parameters)} steps, 0-dim float32 on {first.device}")
    if (targets is None) != (momentum is None):
        raise ValueError(f"{name}: targets and momentum are given together or not at all")
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0):
        raise ValueError(f"{name}: expected betas from 0 to below 1 and eps not below 0, got {betas} and {eps}")
    chosen = choose(name, impl, first)
    skip = _scalar(name, "found_inf", 0.0 if found_inf is None else found_inf, first.device) != 0
    rate = _scalar(name, "lr", lr, first.device)
    shared = (
        1.0 - rate * _scalar(name, "weight_decay", weight_decay, first.device, len(parameters)),
        _scalar(name, "clip_scale", 1.0 if clip_scale is None else clip_scale, first.device, len(parameters)),
        skip.double(),
        _move(name, 1.0 if momentum is None else momentum, first.device),
    )
    # Without alpha the number would be read by the host: the call with a plain number is taken first.
    torch._foreach_add_(list(steps), (~skip).float(), alpha=1)
    # A skipped first step has count 0: any count will do then, and 1 divides by no zero.
    count = torch.stack(list(steps)).double().clamp_min(1)
    decay, scale, skipped, move = (scalar.expand_as(count) for scalar in shared)
    corrections = rate / (1 - betas[0] ** count), (1 - betas[1] ** count).sqrt()
    scalars = torch.stack([decay, *corrections, scale, skipped, move], dim=1).float()
    operation(name, chosen)(
        list(parameters), list(gradients), list(exp_avgs), list(exp_avg_sqs), averages, rounded, averages_rounded,
        scalars, *betas, eps,
    )  # fmt: skip


def _check_first(name: str, what: str, tensors: Sequence[Tensor]) -> Tensor:
    if not len(tensors):
        raise ValueError(f"{name}: {what} is an empty list")
    return tensors[0]


def _check(
    name: str,
    what: str,
    tensors: Sequence[Tensor],
    like: Sequence[Tensor],
    dtypes: tuple[torch.dtype, ...],
    places: Sequence[int] | None = None,
) -> None:
    """`places` are those in the list that was given, where some are left out here."""
    if len(tensors) != len(like):
        raise ValueError(f"{name}: expected {len(like)} {what}, got {len(tensors)}")
    for n, tensor, model in zip(places or range(len(tensors)), tensors, like):
        if tensor.shape != model.shape or tensor.device != like[0].device or tensor.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{name}: expected {what}[{n}] {list(model.shape)} of {allowed} on {like[0].device}, got "
                f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )


def _complete(
    name: str,
    what: str,
    tensors: Sequence[Tensor | None] | None,
    like: Sequence[Tensor],
    dtypes: tuple[torch.dtype, ...],
) -> list[Tensor]:
    """The checked list with an empty tensor for each None; no list where there is none."""
    if tensors is None:
        return []
    if len(tensors) != len(like):
        raise ValueError(f"{name}: expected {len(like)} {what}, got {len(tensors)}")
    given = [n for n, tensor in enumerate(tensors) if tensor is not None]
    if not given:
        return []
    _check(name, what, [tensors[n] for n in given], [like[n] for n in given], dtypes, given)  # type: ignore[misc]
    return [like[n].new_empty(0, dtype=dtypes[-1]) if tensor is None else tensor for n, tensor in enumerate(tensors)]


def _scalar(name: str, what: str, value: float | Tensor, device: torch.device, count: int | None = None) -> Tensor:
    """0-dim float64 on the device, by a fill or a cast: the host waits for neither. `count` allows one a parameter."""
    if not isinstance(value, Tensor):
        if value < 0:
            raise ValueError(f"{name}: {what} must not be below 0, got {value}")
        return torch.full((), value, dtype=torch.float64, device=device)
    shapes = [(), *([] if count is None else [(count,)])]
    if tuple(value.shape) not in shapes or value.device != device or not value.dtype.is_floating_point:
        more = "" if count is None else f", or [{count}],"
        raise ValueError(
            f"{name}: {what} must be a number or a 0-dim floating tensor{more} on {device}, got {list(value.shape)} of "
            f"{value.dtype} on {value.device}"
        )
    return value.double()


def _move(name: str, momentum: float | Tensor, device: torch.device) -> Tensor:
    """1 - momentum in double precision: momenta come within 1e-5 of 1."""
    if not isinstance(momentum, Tensor) and not 0 <= momentum <= 1:
        raise ValueError(f"{name}: momentum must be from 0 to 1, got {momentum}")
    return 1.0 - _scalar(name, "momentum", momentum, device)
