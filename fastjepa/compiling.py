"""How blocks are run: compiled or not, kept or recomputed. Decided once, before the first step."""

import os
import shlex
import shutil
from functools import partial

import torch
from torch import nn

from fastjepa.config import Runtime
from fastjepa.jepa import JEPA
from fastjepa.pieces import Composite
from fastjepa_kernels.dispatch import has_triton

# Graphs of a block that are kept: with and without gradients, of encoder and predictor, of each form of their lengths.
MOST_GRAPHS = 64


def why_not_compile(runtime: Runtime, device: torch.device) -> str:
    """Why `torch.compile` cannot work with these settings on this device; empty where it can."""
    if runtime.attention == "xformers":
        return "the mask of xformers is built on the host"
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed"
    named = os.environ.get("CXX")
    if named:
        program = shlex.split(named)[0]
        return "" if shutil.which(program) else f"CXX names {program}, which is not found"
    return "" if any(shutil.which(name) for name in ("g++", "clang++", "c++")) else "no C++ compiler (g++, clang++)"


def compiles(runtime: Runtime, device: torch.device) -> bool:
    """Whether blocks are compiled. Errors: ValueError where that was asked for and cannot work here."""
    reason = why_not_compile(runtime, device)
    if runtime.compile is True and reason:
        raise ValueError(f"runtime.compile: expected auto or false on this machine, given true: {reason}")
    return (device.type == "cuda" and not reason) if runtime.compile == "auto" else runtime.compile


def run_blocks(runtime: Runtime, jepa: JEPA, device: torch.device, compiled: bool) -> str:
    """Recompute, then compile, the blocks of a JEPA; a line that says what was done, and why."""
    operations = jepa.operations
    if compiled:
        _allow_graphs()
    if isinstance(operations, Composite):
        operations.run_blocks_by(COMPILE if compiled else None, runtime.recompute)
    else:
        jepa.encoder.recomputed = jepa.predictor.recomputed = runtime.recompute  # type: ignore[assignment]
        if compiled:
            _compile_modules(jepa)
    if compiled:
        told = "every block, one graph each" + (", asked for" if runtime.compile is True else ": on a GPU it pays")
    elif runtime.compile is False:
        told = "off, asked for"
    elif device.type == "cuda":
        told = f"off: {why_not_compile(runtime, device)}"
    else:
        told = "off: on a CPU it does not pay"
    if not runtime.recompute:
        return f"compile    {told}; nothing recomputed"
    # The last block of the packed predictor finishes few rows, and is never recomputed.
    packed = jepa.execution == "packed"
    blocks = [len(_blocks(jepa.encoder)), len(_blocks(jepa.predictor)) - packed]
    first, second = (min(runtime.recompute, count) for count in blocks)
    return f"compile    {told}; {first} of {blocks[0]} blocks of the encoder and {second} of the predictor recomputed"


# Without graph breaks, for functions whose numbers of rows change from step to step. Dynamic from the start: what a
# second step would find changed is then no reason to compile again.
COMPILE = partial(torch.compile, fullgraph=True, dynamic=True)


def _allow_graphs() -> None:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)


def _blocks(network: nn.Module) -> nn.ModuleList:
    blocks = network.blocks if hasattr(network, "blocks") else network.predictor_blocks
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _compile_modules(jepa: JEPA) -> None:
    """The blocks of the reference execution."""
    for network in (jepa.encoder, jepa.target_encoder, jepa.predictor):
        for block in _blocks(network):
            block.compile(fullgraph=True, dynamic=True)
