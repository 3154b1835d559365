"""How the processes of a run share the work: what they must divide, and DDP or FSDP2."""

import torch

from fastjepa.build import build_jepa
from fastjepa.config import Settings
from fastjepa.exchange import Exchange
from fastjepa.jepa import JEPA
from fastjepa.masks import GeneratorCollator
from fastjepa.memory import usable_memory
from fastjepa.parallel import DTYPES
from fastjepa.plan import make_plan

# Of a device that holds all weights at most this part may be taken by them: activations need the rest.
SHARE_OF_STATE = 0.6


def check_processes(s: Settings, processes: int) -> None:
    """Errors: ValueError where a step does not fall into equal parts for so many processes."""
    if processes == 1:
        return
    size, clips = s.data.batch_size, s.data.clips_per_video
    given = s.optim.global_batch
    per_video = "" if clips == 1 else f" x data.clips_per_video {clips}"
    _divides(given, processes * clips, f"the {processes} processes{per_video}")
    if size != "auto":
        _divides(given, processes * size, f"{processes} processes x data.batch_size {size}")


def _divides(given: int, unit: int, what: str) -> None:
    if given % unit:
        lower, upper = given // unit * unit, -(-given // unit) * unit
        nearest = f"{lower} or {upper}" if lower else f"{upper}"
        raise ValueError(f"optim.global_batch: expected a multiple of {what}, given {given}; nearest: {nearest}")


def choose_exchange(
    s: Settings, device: torch.device, processes: int, masks: GeneratorCollator, launcher: str
) -> tuple[str, str]:
    """(alone, ddp or fsdp2; a line that says why, empty for one process of which nothing else was asked)."""
    if processes == 1:
        asked = s.runtime.parallel
        return "alone", "" if asked == "auto" else f"processes  1: runtime.parallel {asked} is for several of them"
    asked = s.runtime.parallel
    kind, reason = _fitting(s, device, masks, processes) if asked == "auto" else (asked, "asked for")
    told = {"ddp": "DDP, all weights in each", "fsdp2": "FSDP2, a part of each weight in each"}[kind]
    exchanged = "nccl" if device.type == "cuda" else "gloo"
    return kind, f"processes  {processes} by {launcher} over {exchanged}: {told} ({reason})"


def _fitting(s: Settings, device: torch.device, masks: GeneratorCollator, processes: int) -> tuple[str, str]:
    """DDP where the state of the whole model leaves room on a device."""
    if s.runtime.execution == "reference":
        return "ddp", "the reference execution takes no other"
    if s.optim.dtype == "float16":
        return "ddp", "float16 takes no other"
    with torch.device("meta"):
        jepa = build_jepa(s)
    state, usable = make_plan(s, jepa, masks, float("inf"), processes=processes).state_bytes, usable_memory(device)
    kind, fits = ("ddp", "fits") if state <= SHARE_OF_STATE * usable else ("fsdp2", "does not fit")
    return kind, f"the state of {state / 1e9:.2g} GB {fits} into {SHARE_OF_STATE:.0%} of {usable / 1e9:.2g} GB"


def build_exchange(kind: str, jepa: JEPA, device: torch.device, dtype: str) -> Exchange:
    """Move the JEPA from the CPU to the device, whole or as a shard; `dtype` is what it computes in."""
    if kind == "fsdp2":
        from fastjepa.parallel.shard import Sharded

        return Sharded(jepa, device, DTYPES[dtype])
    jepa.to(device)
    if kind == "ddp":
        from fastjepa.parallel.replicate import Replicated

        return Replicated(jepa)
    return Exchange(jepa)
