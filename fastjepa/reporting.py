"""The row of metrics.jsonl and the line on the console that a log step leaves."""

import math
import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastjepa import health
from fastjepa.gpus import peak_flops
from fastjepa.log import duration
from fastjepa.optim import StepNorms
from fastjepa.schedules import Schedule


@dataclass
class Clock:
    """Wall time since the last log line, and the part of it spent waiting for data."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0


@dataclass
class StepDone:
    """What a step leaves behind, 0-dim on the device; health and EMA distance on log steps only.

    `loss` is what was minimised, `loss_jepa` the prediction error in it, without the regulariser, `loss_context` that
    at context tokens before its weight, where they are predicted; all are means over all processes. Norms and EMA
    distance are those of all weights, health is that of the clips of this process. `compared` is the prediction error
    of the clips whose health it is, where these are not all.
    """

    loss: Tensor
    loss_jepa: Tensor
    norms: StepNorms
    health: health.Health | None
    ema_distance: Tensor | None
    loss_context: Tensor | None = None
    compared: Tensor | None = None


def metrics_row(
    step: int, done: StepDone, schedule: Schedule, skipped: Tensor, clock: Clock, device: torch.device, clips: int
) -> dict[str, Any]:
    """What metrics.jsonl gets of a log step; waits for the device. `clips` are those of a step, over all processes."""
    assert done.health is not None, "a step is reported only after its health was measured"
    assert done.ema_distance is not None
    figures = {
        "loss": done.loss,
        "grad_norm": done.norms.total,
        "grad_norm_encoder": done.norms.encoder,
        "grad_norm_predictor": done.norms.predictor,
        "ema_distance": done.ema_distance,
        "skipped": skipped,
        **({} if done.loss_context is None else {"loss_context": done.loss_context}),
        "compared": done.loss_jepa if done.compared is None else done.compared,
        **vars(done.health),
    }
    values = transferred(figures)
    trivial, compared = values.pop("trivial_loss"), values.pop("compared")
    seconds = time.perf_counter() - clock.started
    return {
        "step": step,
        "loss": values.pop("loss"),
        "loss_ratio": compared / trivial if trivial > 0 else None,
        "lr": schedule.lr_at(step - 1),
        "weight_decay": schedule.weight_decay_at(step - 1),
        "momentum": schedule.momentum_at(step - 1),
        "skipped": int(values.pop("skipped")),
        **values,
        "clips_per_s": clock.steps * clips / seconds,
        "data_wait": clock.waited / seconds,
        "memory_gb": _memory_gb(device),
    }


def transferred(figures: dict[str, Tensor]) -> dict[str, float]:
    """0-dim tensors on the host, all in one transfer: each by itself would wait for the device once more."""
    return dict(zip(figures, torch.stack([figure.double() for figure in figures.values()]).tolist()))


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
    content = "" if math.isnan(row["content"]) else f"  content {row['content']:.2f}"
    rank = "" if math.isnan(row["rank"]) else f"  rank {row['rank']:.1f}"
    return (
        f"step {row['step']}/{last_step}  loss {row['loss']:.4f} ({ratio} of trivial){content}{rank}  "
        f"{row['clips_per_s']:.4g} clips/s{profiled}{share}  data wait {row['data_wait']:.0%}  "
        f"{row['memory_gb']:.2g} GB{skipped}{left}"
    )


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
