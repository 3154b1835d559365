"""The device of a process: threads, precision, determinism. The networks know nothing of this."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from fastjepa.config import Runtime
from fastjepa.parallel.launch import BY_HAND, Launch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def set_up(runtime: Runtime, found: Launch = BY_HAND) -> tuple[torch.device, str]:
    """(device, why it was chosen); sets threads and determinism of the process.

    Of several processes on a machine each takes the GPU of its number. Errors: ValueError where there is none.
    """
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    device, reason = _device(runtime.device) if found.size == 1 else _device_of(runtime.device, found)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device, reason


def _device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
        return torch.device("cpu"), f"{torch.get_num_threads()} threads, no GPU found"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"runtime.device: expected a device of this machine, given {name}: no GPU found")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"runtime.device: this machine has {torch.cuda.device_count()} GPUs, given {name}")
        # set_device takes no "cuda" without a number.
        device = torch.device("cuda", device.index or 0)
        return device, f"asked for: {torch.cuda.get_device_name(device)}"
    return device, f"asked for: {torch.get_num_threads()} threads"


def _device_of(name: str, found: Launch) -> tuple[torch.device, str]:
    """The device of one process among several."""
    if name.startswith("cuda:"):
        raise ValueError(f"runtime.device: expected auto, cuda or cpu with {found.size} processes, given {name}")
    if name == "cpu" or not torch.cuda.is_available():
        return _device(name)
    count = torch.cuda.device_count()
    # srun may show each process the one GPU that is its own.
    number = 0 if count == 1 and found.by == "srun" else found.local_rank
    if number >= count:
        raise ValueError(f"this machine has {count} GPUs, too few for process {number} on it: start {count} a machine")
    device = torch.device("cuda", number)
    return device, f"one for each process: {torch.cuda.get_device_name(device)}"


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """The autocast region of a forward pass; nothing for float32."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, dtype=DTYPES[dtype])


def gradient_scaler(device: torch.device, dtype: str) -> torch.amp.GradScaler | None:
    """A loss scaler for float16; bfloat16 has the range of float32 and needs none."""
    return torch.amp.GradScaler(device.type) if dtype == "float16" else None


def synchronise(device: torch.device) -> None:
    """Wait for the device, for timing on log steps."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
