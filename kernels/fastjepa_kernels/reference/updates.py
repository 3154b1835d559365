"""Updates of parameters in place, in plain PyTorch: moving averages, and AdamW with a moving average."""

import torch
from torch import Tensor

# So many tensors at a time, so that temporary differences stay small beside a large encoder.
SLICE = 32


def ema_update_(targets: list[Tensor], onlines: list[Tensor], move: Tensor) -> None:
    """target <- target + move * (online - target), in the target's precision; `move` is 1 - momentum, 0-dim."""
    for start in range(0, len(targets), SLICE):
        some = targets[start : start + SLICE]
        wide = [online.to(target.dtype) for online, target in zip(onlines[start : start + SLICE], some)]
        differences = torch._foreach_sub(wide, some)
        torch._foreach_mul_(differences, move.to(some[0].dtype))
        torch._foreach_add_(some, differences)


def adamw_ema_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    targets: list[Tensor],
    copies: list[Tensor],
    target_copies: list[Tensor],
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """AdamW in the order of operations of `torch.optim.AdamW`; then the moving average, then the copies.

    `scalars` [parameters, 6]: 1 - lr * decay, lr / (1 - beta1^t), sqrt(1 - beta2^t), the factor of the gradient, 1
    where the step is left out, and 1 - momentum. `targets`, `copies` and `target_copies` are of the parameters' length,
    with an empty tensor where there is none, or empty.
    """
    for n, (parameter, gradient, mean, square) in enumerate(zip(parameters, gradients, exp_avgs, exp_avg_sqs)):
        decay, step_size, correction, scale, skip, move = scalars[n].to(parameter.dtype).unbind()
        moved = gradient.to(parameter.dtype) * scale
        new_mean = torch.lerp(mean, moved, 1 - beta1)
        new_square = torch.addcmul(square * beta2, moved, moved, value=1 - beta2)
        denominator = new_square.sqrt() / correction + eps
        new_parameter = parameter * decay - step_size * (new_mean / denominator)
        changes = [(parameter, new_parameter), (mean, new_mean), (square, new_square)]
        if there(targets, n):
            new_target = targets[n] + move * (new_parameter - targets[n])
            changes.append((targets[n], new_target))
            if there(target_copies, n):
                changes.append((target_copies[n], new_target.to(target_copies[n].dtype)))
        if there(copies, n):
            changes.append((copies[n], new_parameter.to(copies[n].dtype)))
        for old, new in changes:
            # Without a host decision; `where` keeps what is not finite in the new value out.
            old.copy_(torch.where(skip != 0, old, new))


def there(tensors: list[Tensor], n: int) -> bool:
    """Whether a list that may be empty has values at this place."""
    return bool(tensors) and tensors[n].numel() > 0
