"""Learning rate, weight decay and momentum as pure functions of the step.

Source of the formulas: the published recipes of V-JEPA (arXiv 2404.08471, appendix) and V-JEPA 2 (arXiv 2506.09985,
section 2.4: a constant rate, then a linear cool-down).
"""

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

from fastjepa.config import Settings

Decay = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Schedule:
    """Learning rate, weight decay and momentum at a step (counted from 0).

    The curves are planned for `ipe_scale * steps` steps and simply end at `steps`, so with the published 1.25 they do
    not reach their final values. `decay` is the way of the learning rate from `lr` to `final_lr`; it begins after the
    warm-up or, with `decay_steps`, that many steps before `steps`: the rate is constant until then, and the way is
    planned for `ipe_scale * decay_steps` steps, as if the last steps were a phase of their own.
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
    decay: Decay = "cosine"
    decay_steps: int | None = None

    @property
    def planned(self) -> int:
        """Steps that the curves are planned for."""
        return int(self.ipe_scale * self.steps)

    @property
    def decays_from(self) -> int:
        """Steps before the learning rate begins to fall."""
        return self.warmup_steps if self.decay_steps is None else self.steps - self.decay_steps

    def lr_at(self, step: int) -> float:
        """Linear warm-up, a constant stretch if there is one, then half a cosine or a line down to `final_lr`."""
        count, first = step + 1, self.decays_from
        if count < self.warmup_steps:
            return self.start_lr + count / self.warmup_steps * (self.lr - self.start_lr)
        if self.decay == "constant" or count < first:
            return self.lr
        whole = self.planned - first if self.decay_steps is None else int(self.ipe_scale * self.decay_steps)
        progress = (count - first) / max(1, whole)
        if self.decay == "linear":
            return self.lr + min(1.0, progress) * (self.final_lr - self.lr)
        value = self.final_lr + (self.lr - self.final_lr) * 0.5 * (1.0 + cos(pi * progress))
        return max(value, self.final_lr) if self.final_lr <= self.lr else min(value, self.final_lr)

    def weight_decay_at(self, step: int) -> float:
        """Half a cosine from `weight_decay` to `final_weight_decay`."""
        first, last = self.weight_decay, self.final_weight_decay
        value = last + (first - last) * 0.5 * (1.0 + cos(pi * (step + 1) / self.planned))
        return max(value, last) if last <= first else min(value, last)

    def momentum_at(self, step: int) -> float:
        """A straight line from `momentum` to `final_momentum`."""
        return self.momentum + step * (self.final_momentum - self.momentum) / (self.ipe_scale * self.steps)


def build_schedule(s: Settings) -> Schedule:
    """Learning rate, weight decay and momentum as functions of the step."""
    names = ("lr", "start_lr", "final_lr", "weight_decay", "final_weight_decay", "momentum", "final_momentum")
    values = {name: getattr(s.optim, name) for name in (*names, "decay", "decay_steps")}
    return Schedule(s.optim.steps, s.optim.warmup_steps, **values, ipe_scale=s.compat.ipe_scale)
