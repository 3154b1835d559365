"""The row of metrics.jsonl and the line on the console that a log step leaves."""

import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastjepa import health
from fastjepa.gpus import peak_flops
from fastjepa.log import duration
from fastjepa.optim import Schedule


@dataclass
class Clock:
    """Wall time since the last log line, and the part of it spent waiting for data."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0


@dataclass
class StepDone:
    """What a step leaves behind, 0-dim on the device; health on log steps only.

    `loss` is what was minimised, `loss_jepa` the prediction error in it, without the regulariser; both are means over
    all processes, health is that of the clips of this one.
    """

    loss: Tensor
    loss_jepa: Tensor
    grad_norm: Tensor
    health: health.Health | None


def metrics_row(
    step: int, done: StepDone, schedule: Schedule, skipped: Tensor, clock: Clock, device: torch.device, clips: int
) -> dict[str, Any]:
    """What metrics.jsonl gets of a log step; waits for the device. `clips` are those of a step, over all processes."""
    assert done.health is not None, "a step is reported only after its health was measured"
    seconds = time.perf_counter() - clock.started
    value, trivial = done.loss.item(), done.health.trivial_loss.item()
    return {
        "step": step,
        "loss": value,
        "loss_ratio": done.loss_jepa.item() / trivial if trivial > 0 else None,
        "lr": schedule.lr_at(step - 1),
        "weight_decay": schedule.weight_decay_at(step - 1),
        "momentum": schedule.momentum_at(step - 1),
        "grad_norm": done.grad_norm.item(),
        "rank": done.health.rank.item(),
        "feature_std": done.health.feature_std.item(),
        "skipped": int(skipped.item()),
        "clips_per_s": clock.steps * clips / seconds,
        "data_wait": clock.waited / seconds,
        "memory_gb": _memory_gb(device),
    }


def mfu(clips_per_s: float, flop_per_clip: float, device: torch.device, processes: int) -> dict[str, float]:
    """The share of what the devices could compute, as an entry of a row; nothing where that is not known."""
    peak = peak_flops(device)
    return {} if peak is None else {"mfu": clips_per_s * flop_per_clip / (peak * processes)}


def console_line(row: dict[str, Any], last_step: int, seconds_left: float | None) -> str:
    """The row for a person."""
    ratio = "-" if row["loss_ratio"] is None else f"{row['loss_ratio']:.3f}"
    share = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
    skipped = f"  {row['skipped']} skipped" if row["skipped"] else ""
    profiled = " while profiled" if row.get("profiled") else ""
    left = "" if seconds_left is None else f"  {duration(seconds_left)} left"
    return (
        f"step {row['step']}/{last_step}  loss {row['loss']:.4f} ({ratio} of trivial)  rank {row['rank']:.1f}  "
        f"{row['clips_per_s']:.4g} clips/s{profiled}{share}  data wait {row['data_wait']:.0%}  "
        f"{row['memory_gb']:.2g} GB{skipped}{left}"
    )


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
