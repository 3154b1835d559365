"""Timing, result files and machine facts that every bench here shares. Needs torch and the standard library only.

A *row* is one figure: `name value unit min max ms n drift parameters`, where value is a rate (work per second) and ms
the median time behind it. A case that the machine cannot run is a row as well: `name skipped parameters`, where
`skipped` is the reason, so that a missing figure can be told from a forgotten one.
"""

import json
import math
import os
import platform
import re
import statistics
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

Row = dict[str, Any]
Call = Callable[[], object]

UNIT_SIZE = {"TFLOP/s": 1e12, "GB/s": 1e9}
# What torch raises for a kernel, a dtype or an amount of memory that this machine lacks. The two in the middle are
# RuntimeErrors already; they are written out because they are the ones expected.
CANNOT_RUN = (RuntimeError, NotImplementedError, torch.OutOfMemoryError, ImportError)

SHORTEST_SAMPLE_S = 1e-3  # shorter calls are timed several at a time, so that the two events' own cost disappears
MOST_CALLS = 20  # in a sample: a full launch queue (about 1,000 kernels) would stall the host
MOST_SAMPLES = 10_000
FASTEST_CLOCK_HZ = (
    2e9  # no H100 or H200 runs above it: turns seconds into a number of cycles that lasts at least so long
)


def gemm_flops(m: int, n: int, k: int) -> int:
    """Operations of an [m, k] by [k, n] product, a multiply-add counted as two."""
    return 2 * m * n * k


def attention_forward_flops(batch: int, heads: int, length: int, head_dim: int) -> int:
    """Operations of softmax(QK^T)V, no mask: two products of 2*N*N*d for each head; the softmax is not counted."""
    return 4 * batch * heads * length * length * head_dim


def attention_backward_flops(batch: int, heads: int, length: int, head_dim: int) -> int:
    """Operations of the backward pass alone: dV, dP, dQ, dK. Scores that fused kernels recompute are not counted."""
    return 8 * batch * heads * length * length * head_dim


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Call, device: torch.device, seconds: float, min_samples: int = 3) -> list[float]:
    """Milliseconds of one call, one figure per sample, in the order in which they ran.

    Two calls come first, outside the timing: compilation, kernel choice and allocation belong to them. Samples fill
    about `seconds`, but never fewer than `min_samples` are taken.
    """
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    host_s = time.perf_counter() - start
    synchronize(device)
    total_s = max(time.perf_counter() - start, 1e-7)
    calls = min(max(math.ceil(SHORTEST_SAMPLE_S / total_s), 1), MOST_CALLS)
    samples = min(max(int(seconds / (total_s * calls)), min_samples), MOST_SAMPLES)
    if device.type == "cuda":
        return _cuda_samples(call, samples, calls, host_s, launch_bound=host_s > 0.5 * total_s)
    return [_cpu_sample(call, calls) for _ in range(samples)]


def _cpu_sample(call: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) * 1e3 / calls


def _cuda_samples(call: Call, samples: int, calls: int, host_s: float, *, launch_bound: bool) -> list[float]:
    # Nothing waits inside the loop: a device that idles between samples raises its clock and flatters the result.
    marks = []
    for _ in range(samples):
        if launch_bound:
            # The host needs longer to launch these kernels than the device to run them. Keep the device busy until all
            # of the sample is queued: otherwise the host's time would be taken for the kernels'.
            torch.cuda._sleep(int(1.5 * host_s * calls * FASTEST_CLOCK_HZ))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / calls for start, end in marks]


@dataclass(frozen=True)
class Case:
    """One thing to measure: `prepare(device)` builds the inputs and returns the call whose time is taken.

    `work` is the FLOP or the bytes of one call, `unit` what its rate is given in. `share` scales the time spent on it.
    `watch_load` adds clock, power and temperature under this load, where the machine tells them.
    """

    name: str
    prepare: Callable[[torch.device], Call]
    work: float
    unit: str
    parameters: dict[str, Any]
    share: float = 1.0
    watch_load: bool = False


def measure(case: Case, device: torch.device, seconds: float) -> Row:
    """Time one case. Building or running it may turn out impossible here (CANNOT_RUN); its row then says why."""
    row: Row = {"name": case.name, "parameters": case.parameters}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            times, load = _times_and_load(case, device, seconds * case.share)
            row |= _figures(times, case.work, case.unit) | load
        except torch.AcceleratorError:
            raise  # the device itself has failed, and everything after this would fail with it: not a missing kernel
        except CANNOT_RUN as error:
            row["skipped"] = f"{type(error).__name__}: {_first_line(error)}"
    if heard:  # this is where torch says why it refused or replaced a kernel
        row["warnings"] = sorted({_first_line(warning.message) for warning in heard})
    if device.type == "cuda":
        torch.cuda.empty_cache()  # one case's freed blocks must not fragment the next one's memory
    return row


def _times_and_load(case: Case, device: torch.device, seconds: float) -> tuple[list[float], dict[str, float | None]]:
    # A function of its own: the inputs die with it, before the next case builds its own.
    call = case.prepare(device)
    if not case.watch_load:
        return time_calls(call, device, seconds), {}
    with LoadWatch(device) as load:
        times = time_calls(call, device, seconds)
    return times, load.last


def _figures(times_ms: list[float], work: float, unit: str) -> Row:
    scale = work / UNIT_SIZE[unit] * 1e3
    median = statistics.median(times_ms)
    part = max(len(times_ms) // 10, 1)
    return {
        "value": scale / median,
        "unit": unit,
        "min": scale / max(times_ms),
        "max": scale / min(times_ms),
        "ms": median,
        "n": len(times_ms),
        # time of the last tenth over the first: above 1 the device slowed down, as hot or power-limited ones do
        "drift": statistics.median(times_ms[-part:]) / statistics.median(times_ms[:part]),
    }


def _first_line(message: object) -> str:
    text = str(message).strip()
    return text.splitlines()[0][:300] if text else "no message"


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
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f"CPU {names[0].strip() if names else platform.machine()}"


def slug(text: str) -> str:
    """`text` as a part of a file name: "NVIDIA H100 80GB HBM3" becomes "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def facts(device: torch.device, command: str, *, quick: bool) -> dict[str, Any]:
    """What a reader needs to know about where a result file comes from."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "quick": quick,
        **read_load(device),
    }


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def write_results(path: Path, header: dict[str, Any], rows: list[Row], *, complete: bool) -> None:
    """Write a result file so that a reader never sees half of it: under a temporary name, then renamed.

    Benches call this after every row; `complete` says whether all of them are there.
    """
    text = json.dumps({**header, "complete": complete, "rows": rows}, indent=1, allow_nan=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def table(rows: Iterable[Row]) -> str:
    """Rows as aligned text, one line each; a case that could not run shows its reason."""
    lines = [("name", "value", "unit", "min", "max", "ms", "n", "note")]
    for row in rows:
        if "skipped" in row:
            lines.append((row["name"], "-", "", "", "", "", "", f"skipped: {row['skipped'][:90]}"))
            continue
        figures = (f"{row[key]:.4g}" for key in ("min", "max", "ms"))
        clock = f"{row['clock_mhz']:.0f} MHz" if row.get("clock_mhz") else ""
        lines.append((row["name"], f"{row['value']:.4g}", row["unit"], *figures, str(row["n"]), clock))
    widths = [max(map(len, column)) for column in zip(*lines)]
    text_columns = (0, 2, 7)
    return "\n".join("  ".join(_aligned(line, widths, text_columns)).rstrip() for line in lines)


def _aligned(line: tuple[str, ...], widths: list[int], text_columns: tuple[int, ...]) -> list[str]:
    pairs = enumerate(zip(line, widths))
    return [cell.ljust(width) if column in text_columns else cell.rjust(width) for column, (cell, width) in pairs]
