"""What this machine offers, and what a run would take of it: each a pair (label, text) for `info`."""

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import fastjepa_kernels as kernels
from fastjepa.build import DTYPES, attention_sizes, build_jepa
from fastjepa.compiling import compiles, run_blocks
from fastjepa.config import Piece, Settings
from fastjepa.configchecks import needs_frames
from fastjepa.data.decoders import dali, torchcodec
from fastjepa.data.processes import processors
from fastjepa.data.synthetic import default_cache
from fastjepa.memory import usable_memory
from fastjepa.pieces import build_operations, explain_attention, explained

Line = tuple[str, str]

PACKAGES = ("fastjepa", "torch", "triton", "numpy", "av", "torchcodec", "nvidia-dali-cuda130", "xformers")
ON_REQUEST = ("tensorboard", "wandb")
WHAT: dict[Piece, str] = {
    "embed": "patches to tokens",
    "assemble": "predictor input, noise",
    "norm": "norms",
    "mlp": "MLP",
    "attention": "attention",
    "loss": "targets and loss",
    "update": "optimizer and EMA",
}


def versions() -> Iterator[Line]:
    """Of Python and the packages that matter."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in (*PACKAGES, *ON_REQUEST):
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed" + (f" (only for log.{name})" if name in ON_REQUEST else "")


def devices() -> Iterator[Line]:
    """Processor, memory, GPUs, and how several processes would talk."""
    cpu = torch.device("cpu")
    yield "cpu", f"{processors()} processors, {torch.get_num_threads()} threads of torch"
    free = os.sysconf("SC_PAGE_SIZE") * _free_pages() / 1e9
    yield "memory", f"{free:.1f} GB free now; a run on the CPU plans with {usable_memory(cpu) / 1e9:.1f} GB"
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        left, total = (value / 1e9 for value in torch.cuda.mem_get_info(index))
        yield (
            f"cuda:{index}",
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, {left:.0f} of {total:.0f} GB free",
        )
    if not torch.cuda.is_available():
        yield "cuda", "no device" if torch.version.cuda else "no device, and this torch is built for the CPU alone"
    if not torch.distributed.is_available():
        yield "processes", "one: this torch is built without torch.distributed"
    else:
        ways = {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
        yield "processes", f"several may share a run through {' and '.join(name for name, can in ways.items() if can)}"
    try:
        yield "cache", f"{default_cache()} (synthetic videos, indexes; XDG_CACHE_HOME moves it)"
    except OSError as error:
        yield "cache", str(error.strerror)


def decoders() -> Iterator[Line]:
    """Which can run, and why the others cannot."""
    reasons = {
        "pyav": "",
        "torchcodec": torchcodec.why_not(),
        "dali_gpu": dali.why_not(torch.device("cuda")),
        "dali_cpu": dali.why_not(torch.device("cpu")),
    }
    for name, reason in reasons.items():
        yield f"decoder {name}", reason or "ready"


def chosen(settings: Settings, device: torch.device) -> Iterator[Line]:
    """What a run with these settings takes here for each piece of a step, and why.

    Errors: ValueError where something that was asked for cannot run on this machine.
    """
    runtime = settings.runtime
    yield "decoding", _decoder(settings, device)
    compiled = compiles(runtime, device)
    if runtime.execution == "reference":
        yield "step", "torch's own functions, as the public code runs: runtime.execution is reference"
        return
    wanted, attention = runtime.kernels, runtime.attention
    operations, _ = build_operations(wanted, attention, device, deterministic=runtime.deterministic)
    with torch.device("meta"):  # shapes only
        jepa = build_jepa(settings, operations)
    for piece, told in explained(wanted, attention, device).items():
        if piece != "attention":
            yield WHAT[piece], told
    like = torch.empty(0, device=device, dtype=DTYPES[settings.optim.dtype])
    for name, network in (("encoder", jepa.encoder), ("predictor", jepa.predictor)):
        told = explain_attention(operations, [attention_sizes(network)], like).removeprefix("attention").strip()
        yield f"attention, {name}", told
    reason = kernels.why_not_triton(torch.empty(0, device=device))
    yield "fused kernels", f"cannot run: {reason}" if reason else "can run: runtime.kernels=triton takes them"
    yield "torch.compile", run_blocks(runtime, jepa, device, compiled).removeprefix("compile").strip()


def _decoder(settings: Settings, device: torch.device) -> str:
    wanted = settings.data.decoder
    if wanted != "auto":
        return f"{wanted}, asked for"
    if device.type != "cuda":
        return "pyav: there is no GPU to decode on"
    frames = needs_frames(settings)
    reason = f"{frames} works on frames in the loader processes" if frames else dali.why_not(device)
    return f"pyav, not dali_gpu: {reason}" if reason else "dali_gpu, and pyav for files that it does not take"


def _free_pages() -> int:
    """Pages that programs could get: on Linux with what the disk cache would give up."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        pass
    return os.sysconf("SC_PHYS_PAGES")
