"""Steps of a small JEPA in one process or in many, on the same clips whichever: what they leave can be compared.

B clips a step, shared out among the processes, and in each among its micro-batches.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastjepa import parallel
from fastjepa.exchange import Exchange
from fastjepa.masks import TokenSet
from fastjepa.noise import noise_draws
from fastjepa.optim import OptimizerPass
from fastjepa.pieces import build_operations
from fastjepa.schedules import Schedule
from tests import small_jepa
from tests.processes import run_processes

CPU = torch.device("cpu")
CURVES = Schedule(
    steps=50, warmup_steps=2, lr=1e-3, start_lr=1e-4, final_lr=1e-5, weight_decay=0.04, final_weight_decay=0.1,
    momentum=0.99, final_momentum=1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A value that is not finite, in one process, in one step: in its clips, its loss or its gradients."""

    where: str
    value: float
    rank: int
    step: int


@dataclass(frozen=True)
class Case:
    """How to train. `kind` is alone, ddp or fsdp2; `half` what it computes in, with float32 weights behind it."""

    kind: str = "alone"
    dtype: torch.dtype = torch.float32
    half: torch.dtype | None = None
    steps: int = 3
    first: int = 0
    clips: int = 12
    parts: int = 1
    clip_grad: float | None = 1.0
    widths: tuple[int, int] = (24, 12)
    noised: bool = False
    truncation: str = "group"
    recompute: int = 0
    kernels: str | None = None
    pieces: str = "library"
    jepa: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)
    fault: Fault | None = None
    state: dict[str, Tensor] | None = None


@dataclass
class Trained:
    """What steps have left; the end.

    Per step: loss, norms of encoder and predictor, sum of all target features of a clip, EMA distance before the step.

    `tensors` are whole ones; `changed` names what each step has changed; `held` are bytes of weights and moments that
    this process holds.
    """

    steps: list[tuple[float, ...]]
    tensors: dict[str, Tensor]
    changed: list[set[str]]
    held: int


def build(case: Case) -> tuple[Exchange, OptimizerPass]:
    """The JEPA of a case, spread over the processes there are, and its optimizer pass."""
    operations, _ = build_operations(case.pieces, "auto", CPU)
    operations.run_blocks_by(None, case.recompute)
    jepa = small_jepa.make(noised=case.noised, widths=case.widths, operations=operations, **case.jepa).to(case.dtype)
    if case.kind == "fsdp2":
        from fastjepa.parallel.shard import Sharded

        exchange: Exchange = Sharded(jepa, CPU, case.half or case.dtype)
    elif case.kind == "ddp":
        from fastjepa.parallel.replicate import Replicated

        exchange = Replicated(jepa)
    else:
        exchange = Exchange(jepa)
    more: dict[str, Any] = {"accumulation": case.parts, "kernels": case.kernels} | case.more
    copies = None if case.kind == "fsdp2" else case.half
    update = OptimizerPass(jepa, CURVES, clip_grad=case.clip_grad, exchange=exchange, copies=copies, **more)
    if case.state is not None:
        for name, tensor in update.tensors().items():
            tensor.copy_(case.state[name])
        update.restored()
    return exchange, update


def train(case: Case) -> Trained:
    """The steps of a case, in a process that belongs to a group or is alone."""
    exchange, update = build(case)
    together = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    steps, changed = [], []
    for step in range(case.first, case.first + case.steps):
        before = local_tensors(update) if case.fault else {}
        wrong = case.fault is not None and (case.fault.rank, case.fault.step) == (rank, step)
        steps.append(_step(case, exchange, update, step, rank, world, case.fault if wrong else None))
        after = local_tensors(update) if case.fault else {}
        changed.append({name for name in after if not after[name].equal(before[name])})
    own = [local(tensor) for tensor in update.tensors().values()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in own)
    return Trained(steps, {name: whole(tensor) for name, tensor in update.tensors().items()}, changed, held)


def _step(
    case: Case, exchange: Exchange, update: OptimizerPass, step: int, rank: int, world: int, fault: Fault | None
) -> tuple[float, ...]:
    masks = small_jepa.masks(case.clips, group=2, truncation=case.truncation, first=step * case.clips, step=step)
    drawn = torch.Generator().manual_seed(step)
    clips = torch.randn(case.clips, 3, 4, 32, 32, dtype=torch.float64, generator=drawn).to(case.dtype)
    total, features = torch.zeros((), dtype=case.dtype), 0.0
    for part in range(case.parts):
        count = case.clips // world // case.parts
        begin = rank * (case.clips // world) + part * count
        rows, last = slice(begin, begin + count), part + 1 == case.parts
        context, target = ([small_jepa.part(one, rows) for one in sets] for sets in masks)
        slots = range(step * case.clips + rows.start, step * case.clips + rows.stop)
        draws = _draws(case, exchange, slots, target)
        batch = clips[rows].clone()
        if fault is not None and fault.where == "input":
            batch[0, 0, 0, 0, 0] = fault.value
        with exchange.part(last):
            with parallel.autocast(CPU, "bfloat16" if case.half else "float32"), _spoiled(exchange, fault):
                out = exchange.loss(batch, context, target, draws, look=part == 0, context_weight=0.5)
                if part == 0:
                    assert out.every_target is not None
                    features = out.every_target[0].double().abs().sum().item()
            loss = out.loss + fault.value if fault is not None and fault.where == "loss" else out.loss
            update.backward(loss / case.parts, last)
        total += loss.detach() / case.parts
    mean = exchange.mean(total)
    distance = update.ema_distance().item()
    norms = update.step(step, mean)
    return (mean.item(), norms.encoder.item(), norms.predictor.item(), features, distance)


def _draws(case: Case, exchange: Exchange, slots: range, target: list[TokenSet]) -> Any:
    if not case.noised:
        return None
    keyed = exchange.jepa.operations.keyed_noise
    return [
        (steps, noise if keyed else noise.to(case.dtype))
        for steps, noise in noise_draws(1, slots, target, case.widths[1], CPU, keyed=keyed)
    ]


def _spoiled(exchange: Exchange, fault: Fault | None) -> Any:
    """While it lasts, gradients that come out of the predictor are not finite."""
    if fault is None or fault.where != "gradient":
        return nullcontext()
    layer = exchange.jepa.predictor.predictor_embed

    def spoil(module: Any, given: Any, out: Tensor) -> None:
        out.register_hook(lambda gradient: gradient * fault.value)

    handle = layer.register_forward_hook(spoil)

    class Removed:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            handle.remove()

    return Removed()


def local(tensor: Tensor) -> Tensor:
    """The values that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All values, of a tensor of its own."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local_tensors(update: OptimizerPass) -> dict[str, Tensor]:
    """What this process holds at the moment, copied."""
    return {name: local(tensor).detach().clone() for name, tensor in update.tensors().items()}


def _train_all(cases: dict[str, Case]) -> dict[str, Trained]:
    dist.init_process_group("gloo")
    return {name: train(case) for name, case in cases.items()}


def train_in(world: int, cases: dict[str, Case]) -> list[dict[str, Trained]]:
    """Train the cases one after another in `world` processes that are started once; what each has, by rank."""
    return run_processes(_train_all, world, cases, timeout=300)


def gap(got: Trained, want: Trained) -> dict[str, float]:
    """The largest relative difference: of the losses, of the norms, of weights, of moments.

    Of a tensor it is that of its largest value. Not compared are biases of keys: attention does not depend on them, so
    their gradients are rounding errors, which Adam makes as large as any other.
    """
    pairs = list(zip(got.steps, want.steps, strict=True))
    losses = max(abs(a[0] - b[0]) / abs(b[0]) for a, b in pairs)
    norms = max(abs(x - y) / y for a, b in pairs for x, y in zip(a[1:], b[1:]))
    assert got.tensors.keys() == want.tensors.keys()
    of = {"weights": 0.0, "moments": 0.0}
    for name, value in want.tensors.items():
        other = got.tensors[name]
        assert (other.shape, other.dtype) == (value.shape, value.dtype), name
        if name.endswith("qkv.bias") and value.ndim:
            other, value = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (other, value))
        kind = "moments" if name.startswith("optim.") else "weights"
        scale = value.double().abs().max().clamp(min=1e-30)
        of[kind] = max(of[kind], ((other.double() - value.double()).abs().max() / scale).item())
    return {"losses": losses, "norms": norms} | of


def assert_same(got: Trained, want: Trained, rel: float) -> None:
    """Every number of both, to `rel`; 0 is bitwise."""
    found = gap(got, want)
    assert all(value <= rel for value in found.values()), found


__all__ = ["Case", "Fault", "Trained", "assert_same", "build", "gap", "local", "replace", "train", "train_in", "whole"]
