"""What an optimizer step does to a list of weights: torch's functions, a pass each, or a kernel in one pass."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastjepa.jepa import JEPA
from fastjepa.masters import Masters
from fastjepa_kernels import Impl, adamw_ema_


@dataclass(frozen=True)
class Weight:
    """A trained parameter: as its module has it, as the optimizer moves it (float32), and what follows it.

    `master` is `parameter` itself where there is no copy of it (`rounded`) and no shard. `target` (float32) averages
    the master, `target_copy` is what the target encoder computes with.
    """

    name: str
    parameter: nn.Parameter
    master: nn.Parameter
    target: Tensor | None
    target_copy: Tensor | None
    decayed: bool
    of_encoder: bool
    rounded: bool

    @property
    def gradient(self) -> Tensor | None:
        """Summed over micro-batches on the master, or of one backward pass on the parameter."""
        return self.parameter.grad if self.master.grad is None else self.master.grad


def weights_of(
    jepa: JEPA, masters: Masters, groups: Iterable[dict], local: Callable[[Tensor], Tensor] = lambda whole: whole
) -> list[Weight]:
    """Every trained parameter, in the order of the groups (see `parameter_groups`).

    `local` gives the part of a weight that this process trains, in the same memory.
    """
    names = {id(parameter): name for name, parameter in jepa.named_parameters()}
    targets = {f"target_encoder.{name}": local(p.data) for name, p in jepa.target_encoder.named_parameters()}
    held = masters.tensors()
    weights = []
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            follower = "target_" + name if name.startswith("encoder.") else None
            copied = follower in held
            values = parameter.data
            own = held[name] if name in held else local(values)
            weights.append(
                Weight(
                    name,
                    parameter,
                    parameter if own is values else nn.Parameter(own),
                    None if follower is None else held[follower] if copied else targets[follower],
                    targets[follower] if copied and follower is not None else None,
                    group["decayed"],
                    follower is not None,
                    name in held,
                )
            )
    return weights


def grad(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


@torch.no_grad()
def widen(weights: list[Weight]) -> None:
    """Move the gradients of copies onto their masters, in float32, added to what is there."""
    given = [weight for weight in weights if weight.rounded and weight.parameter.grad is not None]
    first = [weight for weight in given if weight.master.grad is None]
    later = [weight for weight in given if weight.master.grad is not None]
    for weight in first:
        weight.master.grad = torch.empty_like(weight.master)
    for some, put in ((first, torch._foreach_copy_), (later, torch._foreach_add_)):
        if some:
            put([grad(weight.master) for weight in some], [grad(weight.parameter) for weight in some])
    for weight in given:
        weight.parameter.grad = None


@torch.no_grad()
def norms_of(weights: list[Weight]) -> tuple[list[str], Tensor]:
    """Names of weights that have gradients, and the norm of each gradient, [n], in float32 at least.

    One call for each dtype: in the order of the dtypes, not of the weights.
    """
    names: list[str] = []
    norms: list[Tensor] = []
    given = [(weight.name, weight.gradient) for weight in weights]
    for dtype in sorted({gradient.dtype for _, gradient in given if gradient is not None}, key=str):
        some = [(name, gradient) for name, gradient in given if gradient is not None and gradient.dtype == dtype]
        names += [name for name, _ in some]
        wide = torch.promote_types(dtype, torch.float32)
        norms += torch._foreach_norm([gradient for _, gradient in some], 2, dtype=wide)
    return names, torch.stack(norms)


class KernelUpdate:
    """`fastjepa_kernels.adamw_ema_` over weights of every kind, with the state of an optimizer of torch."""

    def __init__(self, impl: Impl, optimizer: torch.optim.Optimizer, weights: list[Weight]) -> None:
        self.impl: Impl = impl
        self.optimizer = optimizer
        # Per choice of weights, made once: (decayed, of the encoder), a value each, on the device. All of them is what
        # steps choose, unless some have no gradient.
        self._kinds: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._kind(weights)

    def step(
        self,
        weights: list[Weight],
        scales: tuple[Tensor, Tensor] | None,
        found_inf: Tensor,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
    ) -> None:
        """Clip by the scales of encoder and predictor, AdamW, moving average, copies: one pass over memory."""
        decayed, of_encoder = self._kind(weights)
        scale = None
        if scales is not None:
            scale = scales[0] if scales[0] is scales[1] else torch.where(of_encoder, *scales)
        slots = [slots_of(self.optimizer, weight.master) for weight in weights]
        group = self.optimizer.param_groups[0]
        gradients = [weight.gradient for weight in weights]
        adamw_ema_(
            [weight.master.data for weight in weights],
            gradients,  # type: ignore[arg-type]
            [slot["exp_avg"] for slot in slots],
            [slot["exp_avg_sq"] for slot in slots],
            [slot["step"] for slot in slots],
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=decayed * weight_decay,
            clip_scale=scale,
            found_inf=found_inf,
            targets=[weight.target for weight in weights],
            momentum=momentum,
            copies=[weight.parameter.data if weight.rounded else None for weight in weights],
            target_copies=[weight.target_copy for weight in weights],
            impl=self.impl,
        )

    def _kind(self, weights: list[Weight]) -> tuple[Tensor, Tensor]:
        key = tuple(weight.name for weight in weights)
        if key not in self._kinds:
            device = weights[0].master.device
            decayed = torch.tensor([float(weight.decayed) for weight in weights], dtype=torch.float64, device=device)
            self._kinds[key] = decayed, torch.tensor([weight.of_encoder for weight in weights], device=device)
        return self._kinds[key]


def slots_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a parameter; before its first step it is made as zeros."""
    slots = optimizer.state[parameter]
    if not slots:
        slots["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        slots["exp_avg"] = torch.zeros_like(parameter)
        slots["exp_avg_sq"] = torch.zeros_like(parameter)
    return slots
