"""Result files as the benches write them, with made-up figures: what the report is tested on."""

import json
from pathlib import Path
from typing import Any

from bench.files import Row
from bench.machine import slug

CPU, H100 = "CPU AMD EPYC", "NVIDIA H100 80GB HBM3"


def row(name: str, value: float, unit: str, spread: float | None = 0.05, **parameters: Any) -> Row:
    """A figure; `spread`: the share of it that p20 and p80 lie away, None for a count."""
    found: Row = {"name": name, "value": value, "unit": unit, "parameters": parameters}
    return found if spread is None else found | {"p20": value * (1 - spread), "p80": value * (1 + spread), "n": 20}


def skipped(name: str, reason: str, **parameters: Any) -> Row:
    """A case that could not run."""
    return {"name": name, "skipped": reason, "parameters": parameters}


def plant(
    folder: Path, kind: str, rows: list[Row], device: str = CPU, date: str = "2026-11-27", selection: str = "", *,
    on_a_device: bool = True, **header: Any,
) -> Path:  # fmt: skip
    """Write one result file. `date` may have a time after its day; `kind` has the part after a dash."""
    parts = [kind, slug(device) if on_a_device else "", date[:10], selection]
    path = folder / f"{'-'.join(part for part in parts if part)}.json"
    facts = {
        "device": device, "torch": "2.13.0", "triton": "3.7.1", "cuda": None, "cudnn": None, "commit": "a" * 40,
        "modified": False, "date": date if "T" in date else f"{date}T10:00:00+00:00",
        "command": "pytest bench --benchmark-only", "quick": False, "complete": True,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, **header, "rows": rows}))
    return path


def pair(model: str, ours: str, other: str, rates: tuple[float, float], **more: Any) -> list[Row]:
    """Rows of two ways of a step that took turns; `more`: keys of the row of ours."""
    rows = [
        row(f"step {way}", rate, "clips/s", 0.01, model=model, way=way, beside=beside)
        | {"ms": 24e3 / rate, "batch": 24, "mfu": 0.31, "peak_memory_gb": 33.3}
        for way, beside, rate in ((ours, other, rates[0]), (other, ours, rates[1]))
    ]
    ratio = row(f"step {ours} over {other}", rates[0] / rates[1], "x", 0.01, model=model)
    return [rows[0] | more, rows[1], ratio | {"in_turns": model != "vith_384"}]


def operation(name: str, shape: str, rates: dict[str, float], unit: str = "GB/s") -> list[Row]:
    """Rows of an operation and pass at one shape: all ways, then ours over the others."""
    rows = [row(name, rate, unit, shape=shape, way=way, dtype="bfloat16") for way, rate in rates.items()]
    rows[0]["share"] = 0.8
    others = list(rates)[1:]
    return rows + [
        row(f"{name}, ours over {way}", rates["ours"] / rates[way], "x", shape=shape, dtype="bfloat16")
        for way in others
    ]


def plant_everything(folder: Path) -> None:
    """A file of each kind that a machine with a GPU leaves; none of the demo, the census and the executions."""
    decode = [
        row(name, value, unit, size=size, gop=gop, frames=16)
        for size, scale in (("340x256", 4.0), ("1280x720", 1.0))
        for gop in (12, 250)
        for name, value, unit in (
            ("decode, ours", 30 * scale, "clips/s"), ("decode, PyAV", 7 * scale, "clips/s"),
            ("source frames, ours", 90 * scale, "frames/s"), ("speed of ours over PyAV", 30 / 7, "x"),
        )
    ]  # fmt: skip
    loader = [row("loader", 20.0 * workers, "clips/s", workers=workers) for workers in (1, 2)]
    loader.append(row("loader, batches", 2.5, "batches/s", workers=1))
    loader.append(row("masks", 120, "batches/s", model="vith"))
    missing = [skipped("decode", "torchcodec is not installed", size=size, frames=16) for size in ("a", "b")]
    plant(folder, "data", [*decode, *loader, row("waiting for data", 3.21, "%", None), *missing])
    points = {"batch": (1, 2, 4, 8), "frames": (4, 8, 16), "crop": (64, 96, 128), "workers": (1, 2)}
    scaled = [
        row(f"{'loader' if axis == 'workers' else 'step'} against {axis}", 50 + 10 * at**0.5, "clips/s",
            model="tiny", **{axis: at})
        for axis, all_points in points.items()
        for at in all_points
    ]  # fmt: skip
    alone = [row("step against processes", 50, "clips/s", model="tiny", processes=1)]
    plant(folder, "scaling", [*scaled, *alone, skipped("step against processes", "one process only", processes=2)])
    parts = {"target": 10.0, "context": 12.0, "predictor": 9.0, "loss": 1.0, "backward": 60.0, "optimizer": 4.0}
    steps = [
        *pair("vith", "packed", "reference", (150.0, 75.0), components={**parts, "step": 96.0}),
        *pair("vith_384", "packed", "reference", (20.0, 10.0)),
        *pair("vitl", "packed", "reference", (240.0, 120.0), components={**parts, "step": 97.0}),
        *pair("vitl", "packed", "packed-eager", (240.0, 200.0), components={**parts, "step": 98.0}),
        skipped("test_step[vitl-packed-fused-packed]", "packed-fused: TritonError: no"),
    ]
    plant(folder, "step", steps, H100, command="pytest bench/test_step.py --benchmark-only")
    plant(folder, "public", pair("vitl", "packed", "public as shipped", (240.0, 110.0)), H100)
    plant(folder, "rejected", [row("embed: product over convolution", 1.2, "x", clips=4)])
    rates = {"ours": 2400.0, "eager": 900.0, "compiled": 1900.0, "liger": 2100.0}
    products = {"ours": 500.0, "eager": 450.0, "compiled": 520.0, "flash": 560.0, "cudnn": 610.0}
    kernels = [
        row("ceiling copy", 2900, "GB/s"),
        *operation("layer_norm forward", "vith target", rates),
        *operation("layer_norm backward", "vith context", rates),
        *operation("indexed_attention forward", "vith target", products, "TFLOP/s"),
        skipped("indexed_attention forward", "xformers is not installed", shape="vith target", way="xformers"),
    ]
    plant(folder, "kernels", kernels, H100, command="pytest bench/test_kernels.py --benchmark-only")
    for stage, unit in (("gemm", "TFLOP/s"), ("copy", "GB/s")):
        rows = [row(f"{stage}.{size}", 600.0 + size, unit, size=size) for size in (1, 2, 3)]
        plant(folder, f"ceilings-{stage}", rows, H100, command="python -m bench.ceilings")
