"""Parameter groups, and the optimizer pass: clip, finite check, AdamW, moving average, compute copies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa.exchange import Exchange
from fastjepa.jepa import JEPA
from fastjepa.masters import Masters
from fastjepa.schedules import Schedule
from fastjepa.updates import KernelUpdate, Weight, grad, norms_of, slots_of, weights_of, widen
from fastjepa_kernels import Impl


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
    """Gradient norms before clipping; `bad` is 1 where the step changed nothing. All 0-dim float32 on the device."""

    encoder: Tensor
    predictor: Tensor
    total: Tensor
    bad: Tensor


class OptimizerPass:
    """One optimizer step: norms, finite check on the device, clipping, AdamW, moving average of the target encoder.

    A step whose loss or gradients are not finite changes neither weights nor moments nor the target encoder; `skipped`
    and `skipped_in_a_row` (0-dim float32 on the device) count such steps and are read by whoever logs.

    With `copies` (bfloat16) the pass owns float32 masters of the matrices, and the modules hold copies of them (see
    `Masters`); the gradients of `accumulation` micro-batches are then summed in float32. `kernels` names an
    implementation of `fastjepa_kernels.adamw_ema_`, which does all that follows the norms in one pass over memory;
    None takes torch's functions, with the same numbers to rounding and the same state. `exchange` says what other
    processes hold and give; None is a process that trains alone.
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
        copies: torch.dtype | None = None,
        accumulation: int = 1,
        kernels: Impl | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self.jepa, self.schedule = jepa, schedule
        self.exchange = exchange or Exchange(jepa)
        self.clip_grad, self.clip_from_step, self.clip_per_network = clip_grad, clip_from_step, clip_per_network
        self.ema_positions, self.scaler, self.accumulation = ema_positions, scaler, accumulation
        self.masters = Masters(jepa, copies)
        groups = parameter_groups(jepa)
        self.weights = weights_of(jepa, self.masters, groups, self.exchange.local)
        masters = {id(weight.parameter): weight.master for weight in self.weights}
        for group in groups:
            group["params"] = [masters[id(parameter)] for parameter in group["params"]]
        # Holds the state either way. The fused form reads `found_inf` on the device and leaves weights, moments and
        # step count alone where it is 1.
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=betas, eps=eps, fused=True)
        self.kernels = None if kernels is None else KernelUpdate(kernels, self.optimizer, self.weights)
        device = next(jepa.encoder.parameters()).device
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self._bad_norms: tuple[list[str], Tensor] = [], torch.zeros(0, device=device)
        self.exchange.ready(self.weights)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Accumulate the gradients of one micro-batch; `loss` is already divided by the number of micro-batches.

        `last` for the last one of the step.
        """
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.exchange.collect(self.weights, last, self.accumulation)

    def drop_gradients(self) -> None:
        """Forget what micro-batches have accumulated."""
        for weight in self.weights:
            weight.parameter.grad = weight.master.grad = None

    @torch.no_grad()
    def step(self, step: int, loss: Tensor) -> StepNorms:
        """Apply the accumulated gradients of step `step`. `loss` is the detached loss of the whole step."""
        lr, decay = self.schedule.lr_at(step), self.schedule.weight_decay_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = decay if group["decayed"] else 0.0
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norms = self._norms(loss)
        bad = norms.bad
        scales = self._scales(norms) if self.clip_grad is not None and step >= self.clip_from_step else None
        momentum = self.schedule.momentum_at(step)
        moved = [weight for weight in self.weights if weight.gradient is not None]
        if self.kernels is None:
            self._by_torch(moved, scales, bad)
            moved = []
        else:
            self.kernels.step(moved, scales, bad, lr=lr, weight_decay=decay, momentum=momentum)
        self._average(moved, bad, momentum)
        if self.scaler is not None:
            self.scaler.update()
        self.drop_gradients()
        self.skipped += bad
        self.skipped_in_a_row = (self.skipped_in_a_row + bad) * bad
        return norms

    @torch.no_grad()
    def ema_distance(self) -> Tensor:
        """How far the target encoder is from the encoder: |target - encoder| / |encoder| over all trained weights.

        0-dim float32 on the device; measured on the float32 masters, over all shards. Every process has to ask.
        """
        pairs = [(weight.target, weight.master.data) for weight in self.weights if weight.target is not None]
        apart: list[Tensor] = []
        length: list[Tensor] = []
        # In slices, so that the temporary differences stay small beside a large encoder.
        for start in range(0, len(pairs), 32):
            targets, onlines = map(list, zip(*pairs[start : start + 32]))
            apart += torch._foreach_norm(torch._foreach_sub(targets, onlines), 2)
            length += torch._foreach_norm(onlines, 2)
        norms = self.exchange.norms(torch.stack([torch.linalg.vector_norm(torch.stack(n)) for n in (apart, length)]))
        return norms[0] / norms[1]

    def _norms(self, loss: Tensor) -> StepNorms:
        parts = [norms_of([w for w in self.weights if w.of_encoder is network]) for network in (True, False)]
        norms = self.exchange.norms(torch.stack([torch.linalg.vector_norm(each) for _, each in parts]))
        total = torch.linalg.vector_norm(norms)
        # One question for both: a sum of what is not finite is not finite.
        bad = (~torch.isfinite(total + loss)).float()
        self._keep_norms([name for names, _ in parts for name in names], torch.cat([each for _, each in parts]), bad)
        return StepNorms(norms[0], norms[1], total, bad)

    def _keep_norms(self, names: list[str], norms: Tensor, bad: Tensor) -> None:
        """Remember the norm of every gradient where the step is bad, without asking the device whether it is."""
        before = self._bad_norms[1] if self._bad_norms[0] == names else torch.zeros_like(norms)
        self._bad_norms = names, torch.where(bad > 0, norms, before)

    def norms_of_bad_step(self) -> dict[str, float]:
        """The norm of each parameter's gradient in the last step that changed nothing; waits for the device.

        Of weights that are sharded those of this process's part.

        Zeros where there was none since the process began.
        """
        names, norms = self._bad_norms
        return dict(zip(names, norms.tolist()))

    def _scales(self, norms: StepNorms) -> tuple[Tensor, Tensor]:
        """What the gradients of encoder and predictor are multiplied by: 1 where the norm is below the limit."""
        if not self.clip_per_network:
            together = self._scale(norms.total)
            return together, together
        return self._scale(norms.encoder), self._scale(norms.predictor)

    def _scale(self, norm: Tensor) -> Tensor:
        assert self.clip_grad is not None
        return (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)

    def _by_torch(self, weights: list[Weight], scales: tuple[Tensor, Tensor] | None, bad: Tensor) -> None:
        """Clipping and AdamW, a pass each."""
        widen(weights)
        for of_encoder, scale in zip((True, False), scales or ()):
            gradients = [grad(w.master) for w in weights if w.of_encoder is of_encoder]
            if gradients:
                torch._foreach_mul_(gradients, scale)
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()

    def _average(self, done: list[Weight], bad: Tensor, momentum: float) -> None:
        """The moving average of every target that is not `done`, unless the step is bad; copies of what has changed."""
        names = {weight.name for weight in done}
        left = [weight for weight in self.weights if weight.name not in names]
        pairs = [(weight.target, weight.master.data) for weight in left if weight.target is not None]
        if self.ema_positions:
            frozen = zip(self.jepa.target_encoder.parameters(), self.jepa.encoder.parameters())
            local = self.exchange.local
            pairs += [(local(target.data), local(online.data)) for target, online in frozen if not online.requires_grad]
        if pairs:
            stay = momentum + bad.double() * (1.0 - momentum)
            self.jepa.operations.move_([target for target, _ in pairs], [online for _, online in pairs], stay)
        if not done:
            self.masters.refresh()
        elif any(w.target_copy is not None for w in left):
            self.masters.refresh([f"target_{w.name}" for w in left if w.target_copy is not None])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint by name, live: the weights in float32, and the state of the optimizer."""
        return {**self.jepa.state_dict(), **self.masters.tensors(), **self.state()}

    def restored(self) -> None:
        """To be called after values were written into `tensors`: the modules' copies follow."""
        self.masters.refresh()

    def state(self) -> dict[str, Tensor]:
        """Tensors of the optimizer by parameter name: moments, step counts, skipped steps.

        The tensors are the live ones: writing into them restores the state. Moments that do not exist yet (before the
        first step) are made as zeros.
        """
        state = {"optim.skipped": self.skipped, "optim.skipped_in_a_row": self.skipped_in_a_row}
        for weight in self.weights:
            slots = slots_of(self.optimizer, weight.master)
            whole = self.exchange.whole
            state |= {f"optim.{key}.{weight.name}": whole(value, weight.parameter) for key, value in slots.items()}
        return state
