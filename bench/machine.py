"""What a reader of a result file needs to know of the machine: device, versions, commit, clock and power."""

import platform
import re
import subprocess
import threading
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

# What a figure depends on: a changed page or an earlier result file does not make another program of it.
MEASURED = ("fastjepa", "kernels/fastjepa_kernels", "configs", "bench/*.py")

LOAD_FIELDS = {
    "clock_mhz": "clocks.sm",
    "max_clock_mhz": "clocks.max.sm",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def read_load(device: torch.device) -> dict[str, float | None]:
    """Clock, power and temperature of a CUDA device now; empty on a CPU or where nvidia-smi is missing or refuses.

    torch.cuda.clock_rate() gives the same figures but needs nvidia-ml-py, which torch does not install.
    """
    if device.type != "cuda":
        return {}
    # By its uuid: nvidia-smi's own numbering ignores CUDA_VISIBLE_DEVICES.
    uuid = "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    fields = ",".join(LOAD_FIELDS.values())
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}  # the figures stand without these readings, and their absence from the file is visible
    return parse_load(answer)


def parse_load(answer: str) -> dict[str, float | None]:
    """One line of nvidia-smi's CSV as numbers; None for what a card does not report ("[N/A]")."""
    values = [value.strip() for value in answer.strip().split(",")]
    if len(values) != len(LOAD_FIELDS):
        return {}
    number = re.compile(r"\d+(\.\d+)?")
    return {key: float(text) if number.fullmatch(text) else None for key, text in zip(LOAD_FIELDS, values)}


class LoadWatch:
    """Reads the load in a thread while a loop keeps the device busy; `last` is the newest reading, {} on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last: dict[str, float | None] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.last = read_load(self.device)
            self._stop.wait(0.1)

    def __enter__(self) -> "LoadWatch":
        if self.device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {processor_name()}"


def processor_name() -> str:
    """The processor's name, or its architecture where it tells none."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0].strip() if names else platform.machine()


def slug(text: str) -> str:
    """`text` as a part of a file name: "NVIDIA H100 80GB HBM3" becomes "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def facts(device: torch.device, command: str, *, quick: bool) -> dict[str, Any]:
    """What a reader needs to know about where a result file comes from.

    `idle`: clock and power before anything runs, empty on a CPU. Rows that were measured under load have their own.
    """
    return {
        "device": device_name(device),
        "processor": processor_name(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": _git("rev-parse", "--verify", "--quiet", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--", *MEASURED)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "quick": quick,
        "idle": read_load(device),
    }


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of this repository; None where there is no git, no repository, or an error."""
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
