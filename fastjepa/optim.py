"""Schedules, parameter groups, and the optimizer pass: clip, finite check, AdamW, moving average.

Source of the formulas: the published V-JEPA recipe (arXiv 2404.08471, appendix), as pure functions of the step.
"""

from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor, nn

from fastjepa.jepa import JEPA


@dataclass(frozen=True)
class Schedule:
    """Learning rate, weight decay and momentum at a step (counted from 0).

    The curves are planned for `ipe_scale * steps` steps and simply end at `steps`, so with the published 1.25 they do
    not reach their final values.
    """

    steps: int
    warmup_steps: int
    lr: float
    start_lr: float
    final_lr: float
    weight_decay: float
    final_weight_decay: float
    momentum: float
    final_momentum: float
    ipe_scale: float = 1.0

    @property
    def planned(self) -> int:
        """Steps that the cosine curves are planned for."""
        return int(self.ipe_scale * self.steps)

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to `final_lr`."""
        count = step + 1
        if count < self.warmup_steps:
            return self.start_lr + count / self.warmup_steps * (self.lr - self.start_lr)
        progress = (count - self.warmup_steps) / max(1, self.planned - self.warmup_steps)
        return max(self.final_lr, self.final_lr + (self.lr - self.final_lr) * 0.5 * (1.0 + cos(pi * progress)))

    def weight_decay_at(self, step: int) -> float:
        """Half a cosine from `weight_decay` to `final_weight_decay`."""
        first, last = self.weight_decay, self.final_weight_decay
        value = last + (first - last) * 0.5 * (1.0 + cos(pi * (step + 1) / self.planned))
        return max(value, last) if last <= first else min(value, last)

    def momentum_at(self, step: int) -> float:
        """A straight line from `momentum` to `final_momentum`."""
        return self.momentum + step * (self.final_momentum - self.momentum) / (self.ipe_scale * self.steps)


def parameter_groups(jepa: JEPA) -> list[dict]:
    """AdamW groups in the published order: encoder decay, predictor decay, encoder no decay, predictor no decay.

    Biases and one-dimensional tensors are not decayed; mask tokens are. Frozen position tables are left out.
    """
    groups: list[dict] = []
    for decayed in (True, False):
        for network in (jepa.encoder, jepa.predictor):
            parameters = [
                p
                for name, p in network.named_parameters()
                if p.requires_grad and (p.ndim > 1 and "bias" not in name) == decayed
            ]
            groups.append({"params": parameters, "decayed": decayed, "weight_decay": 0.0})
    return groups


@dataclass
class StepNorms:
    """Gradient norms before clipping, 0-dim float32 on the device."""

    encoder: Tensor
    predictor: Tensor
    total: Tensor


class OptimizerPass:
    """One optimizer step: norms, finite check on the device, clipping, AdamW, moving average of the target encoder.

    A step whose loss or gradients are not finite changes neither weights nor moments nor the target encoder; `skipped`
    and `skipped_in_a_row` (0-dim float32 on the device) count such steps and are read by whoever logs.
    """

    def __init__(
        self,
        jepa: JEPA,
        schedule: Schedule,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip_grad: float | None = None,
        clip_from_step: int = 0,
        clip_per_network: bool = False,
        ema_positions: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.jepa, self.schedule = jepa, schedule
        self.clip_grad, self.clip_from_step, self.clip_per_network = clip_grad, clip_from_step, clip_per_network
        self.ema_positions = ema_positions
        self.scaler = scaler
        # The fused form reads `found_inf` on the device and leaves weights, moments and step count alone where it is 1.
        self.optimizer = torch.optim.AdamW(parameter_groups(jepa), lr=schedule.lr, betas=betas, eps=eps, fused=True)
        device = next(jepa.encoder.parameters()).device
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch; `loss` is already divided by the number of micro-batches."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, step: int, loss: Tensor) -> StepNorms:
        """Apply the accumulated gradients of step `step`. `loss` is the detached loss of the whole step."""
        lr, decay = self.schedule.lr_at(step), self.schedule.weight_decay_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = decay if group["decayed"] else 0.0
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norms = self._clip(step)
        bad = 1.0 - (torch.isfinite(norms.total) & torch.isfinite(loss)).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        momentum = self.schedule.momentum_at(step)
        self.jepa.update_target(momentum + bad.double() * (1.0 - momentum), every_parameter=self.ema_positions)
        self.skipped += bad
        self.skipped_in_a_row = (self.skipped_in_a_row + bad) * bad
        return norms

    def _clip(self, step: int) -> StepNorms:
        networks = [_with_gradients(self.jepa.encoder), _with_gradients(self.jepa.predictor)]
        norms = [nn.utils.get_total_norm([p.grad for p in network if p.grad is not None]) for network in networks]
        total = torch.stack(norms).square().sum().sqrt()
        if self.clip_grad is not None and step >= self.clip_from_step:
            for network, norm in zip(networks, norms):
                nn.utils.clip_grads_with_norm_(network, self.clip_grad, norm if self.clip_per_network else total)
        return StepNorms(norms[0], norms[1], total)

    def state(self) -> dict[str, Tensor]:
        """Tensors of the optimizer by parameter name: moments, step counts, skipped steps.

        The tensors are the live ones: writing into them restores the state. Moments that do not exist yet (before the
        first step) are made as zeros.
        """
        state = {"optim.skipped": self.skipped, "optim.skipped_in_a_row": self.skipped_in_a_row}
        for name, parameter in self.jepa.named_parameters():
            if not parameter.requires_grad:
                continue
            slots = self.optimizer.state[parameter]
            if not slots:
                slots["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                slots["exp_avg"] = torch.zeros_like(parameter)
                slots["exp_avg_sq"] = torch.zeros_like(parameter)
            state |= {f"optim.{key}.{name}": value for key, value in slots.items()}
        return state


def _with_gradients(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.grad is not None]
