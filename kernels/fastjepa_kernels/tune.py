"""Launch settings by measurement, on a GPU and ahead of time: `python -m fastjepa_kernels tune --operation NAME`.

All candidates of an operation take turns, round after round, so that a clock that drifts is fair to all. A candidate
whose result is not exact enough is refused before any timing, whatever its speed; so is one that does not compile.
"""

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastjepa_kernels import config
from fastjepa_kernels.resources import triton_version
from fastjepa_kernels.testing.cases import Case, Shape, case_of, fresh, results, timed, yardstick

# Milliseconds of one call.
Clock = Callable[[Callable[[], object]], float]
Say = Callable[[str], object]
# Larger than the second-level cache of any GPU, in bytes.
FLUSHED = 1 << 28


def cuda_clock(call: Callable[[], object]) -> float:
    """One call on the current CUDA device, with cold caches, and without the time that the host needs to launch it."""
    cold = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cold.zero_()
    torch.cuda._sleep(1_000_000)  # about half a millisecond, in which the host queues all of it
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def tune(
    operation: str,
    *,
    device: torch.device,
    clock: Clock,
    shapes: Iterable[Shape] = (),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    rounds: int = 30,
    result: str = "timings",
    say: Say = lambda line: None,
) -> tuple[list[config.Row], list[dict[str, Any]]]:
    """The fastest exact settings of each shape and dtype, as rows of a file of settings, and the timings of all.

    Without `shapes`, those of the operation's case. `result` is the name of the file that will hold the timings.
    Errors: ValueError for an operation that has no candidates, or a shape of which no candidate is exact.
    """
    from fastjepa_kernels._triton.catalogue import candidates

    case = case_of(operation)
    rows, timings = [], []
    for shape in list(shapes) or [case.shapes[name] for name in case.benched()]:
        _check_shape(case, shape)
        for dtype in dtypes:
            name, width, length = config.name_of(dtype), shape.get("width", 1), shape["rows"]
            now = config.lookup(operation, device=device, dtype=dtype, width=width, length=length)
            tried = [now, *(one for one in candidates(operation, width) if one != now)]
            say(f"{operation} {name} {shape}: {len(tried)} candidates")
            kept = _exact(case, operation, tried, shape, device, dtype, say)
            if not kept:
                raise ValueError(f"{operation}: none of the {len(tried)} candidates is exact enough for {shape}")
            times = _times(case, operation, kept, clock, rounds, shape, device, dtype)
            best = min(times, key=lambda one: one["median_ms"])
            about = {
                "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
                "torch": torch.__version__,
                "triton": triton_version(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "shape": shape,
            }
            timings.append({"operation": operation, "dtype": name, **about, "pinned_before": now, "candidates": times})
            measured = about | {key: value for key, value in best.items() if key != "settings"}
            place = config.architecture_of(device), name, shape.get("width"), length
            rows.append(config.Row(*place, best["settings"], "measured", result, measured))
            before = next((one["median_ms"] for one in times if one["settings"] == now), None)
            was = "not exact" if before is None else f"{before:.4f} ms"
            say(f"  {best['settings']}: {best['median_ms']:.4f} ms; pinned so far {now}: {was}")
    return rows, timings


def save(operation: str, out: Path, rows: list[config.Row], timings: list[dict[str, Any]]) -> Path:
    """Write rows into a file of settings and the timings beside it, into what is there already; its name.

    Errors: ValueError where there is a file that is not as it should be.
    """
    beside = timings_of(out)
    table = {row.place: row for row in config.parse(out.read_text(), operation, str(out))} if out.exists() else {}
    before = json.loads(beside.read_text()) if beside.exists() else []
    table |= {row.place: replace(row, result=beside.name) for row in rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps([*before, *timings], indent=1) + "\n")
    out.write_text(config.dump(operation, list(table.values())))
    return beside


def timings_of(out: Path) -> Path:
    """The file of timings that belongs to a file of settings."""
    return out.with_name(f"{out.stem}.timings.json")


def shape_from(text: str) -> Shape:
    """The shape in "rows=13440,width=1280". Errors: ValueError for anything else."""
    try:
        shape = {name: int(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"--shapes: expected numbers such as rows=13440,width=1280, got {text}") from None
    # Rows of operations on tokens follow from the rest.
    if {"masks", "clips", "kept"} <= set(shape):
        shape.setdefault("rows", shape["masks"] * shape["clips"] * shape["kept"])
    return shape


def _check_shape(case: Case, shape: Shape) -> None:
    known = next(iter(case.shapes.values()))
    if set(shape) != set(known):
        raise ValueError(f"{case.name}: a shape has {', '.join(known)}, got {', '.join(shape)}")


def _exact(
    case: Case,
    operation: str,
    tried: list[dict[str, int]],
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    say: Say,
) -> list[dict[str, int]]:
    from triton.errors import TritonError

    inputs = case.make(shape, device, dtype)
    check = yardstick(case, inputs, dtype)
    kept = []
    for settings in tried:
        try:
            with config.forced(operation, **settings):
                check(results(case, case.ours(), fresh(case, inputs), dtype))
        except AssertionError as error:
            say(f"  {settings} is refused: {error}")
        except (TritonError, RuntimeError) as error:
            say(f"  {settings} does not run: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        else:
            kept.append(settings)
    return kept


def _times(
    case: Case,
    operation: str,
    kept: list[dict[str, int]],
    clock: Clock,
    rounds: int,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    call = timed(case, case.ours(), fresh(case, case.make(shape, device, dtype)), case.pinned[operation])
    samples: list[list[float]] = [[] for _ in kept]
    for n in range(rounds + 1):
        for settings, own in zip(kept, samples):
            with config.forced(operation, **settings):
                taken = clock(call)
            if n:  # the first round warms up
                own.append(taken)
    return [
        {
            "settings": settings,
            "median_ms": statistics.median(own),
            "p20_ms": _share(own, 0.2),
            "p80_ms": _share(own, 0.8),
            "rounds": rounds,
        }
        for settings, own in zip(kept, samples)
    ]


def _share(samples: list[float], share: float) -> float:
    return sorted(samples)[round(share * (len(samples) - 1))]
