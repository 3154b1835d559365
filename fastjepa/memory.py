"""Bytes that a training step holds, by category, and what a device has of them. A model's figures, not measurements."""

import os
from pathlib import Path

import torch

from fastjepa.costs import StepShape
from fastjepa.gpus import GPU

# What is left of a GPU beside the driver's context, libraries' workspaces, fragments and the error of this model; of a
# computer beside the loader processes and everything else that runs there.
GPU_SHARE = 0.9
CPU_SHARE = 0.6
STATE = ("weights", "half-precision copies", "gradients", "AdamW moments", "target encoder")


def held_bytes(s: StepShape) -> dict[str, float]:
    """Bytes alive at the end of the forward pass, where most are, by category."""
    trained, frozen = s.encoder.trained + s.predictor.trained, s.encoder.frozen + s.predictor.frozen
    half = s.value_bytes == 2
    target = (6 if s.masters else 4) * s.encoder.trained + 4 * s.encoder.frozen
    # Micro-batches are summed, and replicas averaged, in float32.
    summed = s.parts > 1 or (s.processes > 1 and s.shards == 1)
    gradients = (2 + (4 if summed else 0)) if s.masters else 4
    state = (4 * trained + 4 * frozen, (2 if half else 0) * trained, gradients * trained, 8 * trained, target)
    return {
        **{name: value / s.shards for name, value in zip(STATE, state)},
        "activations": s.batch * max(_kept_for_backward(s), _alive_in_target_pass(s)),
        # This batch and the next one, which is on its way.
        "input clips": 2.0 * s.batch * s.tokens * s.patch_values * s.pixel_bytes,
    }


def _kept_for_backward(s: StepShape) -> float:
    """Bytes a clip that the backward pass reads."""
    size, kept = s.value_bytes, 0.0
    rows = {"encoder": s.context, "predictor": s.context + s.target}
    for net, tokens in ((s.encoder, rows["encoder"]), (s.predictor, rows["predictor"])):
        r = net.hidden / net.width
        if s.fused:  # GELU is computed again from its input; norms keep theirs and their result
            values = (8 + r) * size
        elif size == 2:  # norms read and keep float32; both sides of GELU
            values = 20 + 4 * r
        else:
            values = 32 + 8 * r
        if net.gated:  # what is gated, the gate before and after it, and their product
            values += 3 * r * size if s.fused else (4 * r if size == 2 else 8 * r)
        # Of a recomputed block its rows and their norm are kept, which are what the block before it gives.
        again = min(s.recomputed, net.depth - (s.packed and net is s.predictor))
        kept += (
            tokens * net.width * ((net.depth - again) * values + again * (size + (4 if net is s.predictor else size)))
        )
    compared = 3 * size if s.fused else 20
    width = s.encoder.width
    features = s.levels * s.tokens * width * (size if s.fused else 4)
    if s.levels > 1:  # levels beside each other, and the hidden layer that reads them before and after GELU
        kept += (s.levels + 1) * (s.context + s.noised * s.target) * width * size
    return kept + s.levels * (s.target + s.dense * s.context) * width * compared + features


def _alive_in_target_pass(s: StepShape) -> float:
    """Bytes a clip in one block of the target encoder: nothing is kept, but all tokens are there."""
    r = s.encoder.hidden / s.encoder.width
    values = (2 + r) * s.value_bytes if s.fused else 4 + (1 + 2 * r) * s.value_bytes
    return s.tokens * s.encoder.width * values


def usable_memory(device: torch.device | GPU) -> float:
    """Bytes that a run may hold on a device of this machine, or on a GPU of the table."""
    if isinstance(device, GPU):
        return GPU_SHARE * device.memory
    if device.type == "cuda":
        return GPU_SHARE * float(torch.cuda.mem_get_info(device)[1])
    return CPU_SHARE * _computer_memory()


def _computer_memory() -> float:
    available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, float(text))
    return available
