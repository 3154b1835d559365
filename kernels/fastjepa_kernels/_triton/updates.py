"""Updates of parameters in place: everything about a value is read once and written once, one launch a tensor."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from fastjepa_kernels._triton.launch import Shipped, on_device_of

# Four values a thread: float32 and half precision are then read in the same layout, with no exchange between threads.
LANES = 512


@triton.jit
def ema_kernel(target, online, move, count, LANES: tl.constexpr):
    """target += move * (online - target), LANES values a program."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = lane < count
    old = tl.load(target + lane, mask=inside)
    new = tl.load(online + lane, mask=inside).to(tl.float32)
    tl.store(target + lane, old + (new - old) * tl.load(move), mask=inside)


@triton.jit
def adamw_ema_kernel(
    parameter, gradient, exp_avg, exp_avg_sq, target, copy, scalars, count,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    AVERAGED: tl.constexpr, COPIED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """AdamW, moving average and copy of LANES values; nothing is read or written where scalars[4] is not 0."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = lane < tl.where(tl.load(scalars + 4) == 0.0, count, 0)
    moved = tl.load(gradient + lane, mask=inside, other=0.0).to(tl.float32) * tl.load(scalars + 3)
    mean = tl.load(exp_avg + lane, mask=inside, other=0.0)
    mean += (moved - mean) * (1.0 - BETA1)
    square = tl.load(exp_avg_sq + lane, mask=inside, other=0.0)
    square = square * BETA2 + moved * moved * (1.0 - BETA2)
    denominator = tl.div_rn(tl.sqrt_rn(square), tl.load(scalars + 2)) + EPS
    value = tl.load(parameter + lane, mask=inside, other=0.0) * tl.load(scalars)
    value -= tl.load(scalars + 1) * tl.div_rn(mean, denominator)
    tl.store(exp_avg + lane, mean, mask=inside)
    tl.store(exp_avg_sq + lane, square, mask=inside)
    tl.store(parameter + lane, value, mask=inside)
    if AVERAGED:
        old = tl.load(target + lane, mask=inside, other=0.0)
        tl.store(target + lane, old + (value - old) * tl.load(scalars + 5), mask=inside)
    if COPIED:
        tl.store(copy + lane, value.to(copy.dtype.element_ty), mask=inside)


def ema_update_(targets: list[Tensor], onlines: list[Tensor], move: Tensor) -> None:
    """target <- target + move * (online - target), `move` 0-dim float32."""
    with on_device_of(move):
        for target, online in zip(targets, onlines):
            flat = target.contiguous()
            if flat.numel():
                grid = (triton.cdiv(flat.numel(), LANES),)
                ema_kernel[grid](flat, online.contiguous(), move, flat.numel(), LANES=LANES)
            _put_back(target, flat)
    # Autograd does not see what a kernel writes: a graph that saved these tensors must refuse to run backward.
    increment_version(targets)


def adamw_ema_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    targets: list[Tensor],
    copies: list[Tensor],
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """As the reference: float32 parameters, moments, targets and `scalars` [parameters, 6]."""
    fixed = {"BETA1": beta1, "BETA2": beta2, "EPS": eps, "AVERAGED": bool(targets), "COPIED": bool(copies)}
    with on_device_of(scalars):
        for n, (parameter, gradient) in enumerate(zip(parameters, gradients)):
            # A tensor that is not there is never touched; the parameter stands in for its pointer.
            target, copy = (some[n] if some else parameter for some in (targets, copies))
            written = (parameter, exp_avgs[n], exp_avg_sqs[n], target, copy)
            flat = [tensor.contiguous() for tensor in written]
            count = parameter.numel()
            if count:
                adamw_ema_kernel[(triton.cdiv(count, LANES),)](
                    flat[0], gradient.contiguous(), *flat[1:], scalars[n], count, **fixed, LANES=LANES
                )
            for tensor, updated, there in zip(written, flat, (True, True, True, bool(targets), bool(copies))):
                if there:
                    _put_back(tensor, updated)
    increment_version([*parameters, *exp_avgs, *exp_avg_sqs, *targets, *copies])


def _put_back(tensor: Tensor, flat: Tensor) -> None:
    """Into a tensor that is not contiguous, whose contiguous copy was updated."""
    if flat is not tensor:
        tensor.copy_(flat)


def shipped() -> Iterator[Shipped]:
    """Both kernels for gradients and online weights of every usual dtype, with and without targets and copies."""
    wide = dict.fromkeys(("target", "move", "parameter", "exp_avg", "exp_avg_sq", "scalars"), "*fp32")
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        types = {**wide, "online": f"*{dtype}", "count": "i32"}
        yield Shipped(f"ema {dtype}", ema_kernel, types, {"LANES": LANES})
    for dtype in ("fp32", "bf16"):
        types = {**wide, "gradient": f"*{dtype}", "copy": "*bf16", "count": "i32"}
        for averaged, copied in ((False, False), (True, False), (True, True)):
            fixed = {"BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8, "AVERAGED": averaged, "COPIED": copied, "LANES": LANES}
            more = " ema" * averaged + " copy" * copied
            yield Shipped(f"adamw{more} {dtype}", adamw_ema_kernel, types, fixed)
