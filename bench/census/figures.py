"""Both executions of a model counted, as plain numbers, rows of a result file, and a table."""

from typing import Any

from bench import files
from bench.census.counting import Census, Figures
from bench.census.steps import CLIPS, FRAMES, KERNELS, MODELS, count

ORDER = ("patch embed", "target", "context", "predictor", "loss", "optimizer")
Row = dict[str, Any]


def census(model: str, items: int) -> Row:
    """All executions of one model, as plain numbers: totals, components, and the `items` largest single items."""
    m = MODELS[model]
    counted = {execution: count(model, execution) for execution in m.executions}
    reference, packed = counted["reference"].total(), counted["packed"].total()
    return {
        "model": model,
        "clips": CLIPS,
        "frames": FRAMES,
        "side": m.side,
        "context_tokens": m.context,
        "target_tokens": m.target,
        **{execution: _figures(one, items) for execution, one in counted.items()},
        "times_fewer_bytes": reference.bytes / packed.bytes,
        "times_fewer_launches": reference.launches / packed.launches,
    }


def _figures(one: Census, items: int) -> Row:
    components = sorted(one.components.items(), key=lambda pair: (ORDER.index(phase_of(pair[0])), pair[0]))
    largest = sorted(one.items.items(), key=lambda pair: -pair[1].bytes)[:items]
    return {
        **_numbers(one.total()),
        "components": {name: _numbers(figures) for name, figures in components},
        "items": [
            {"phase": phase, "operation": operation, "inputs": inputs, **_numbers(figures)}
            for (phase, operation, inputs), figures in largest
        ],
    }


def phase_of(component: str) -> str:
    """ "target" of "target linear"."""
    return component.rpartition(" ")[0]


def _numbers(figures: Figures) -> Row:
    return {"launches": figures.launches, "bytes": figures.bytes, "flops_per_clip": figures.flops / CLIPS}


def table(row: Row) -> str:
    """The figures of a model for people."""
    executions = MODELS[row["model"]].executions
    tokens = " + ".join(map(str, row["context_tokens"])), " + ".join(map(str, row["target_tokens"]))
    lines = [
        f"{row['model']}: {row['clips']} clips of {row['frames']} frames at {row['side']} px, {tokens[0]} context and "
        f"{tokens[1]} target tokens a clip",
        f"{'':<24}" + "".join(f"{execution:>18}{'GB':>10}{'GFLOP/clip':>12}" for execution in executions),
    ]
    parts = {execution: {**row[execution]["components"], "total": row[execution]} for execution in executions}
    names = [*dict.fromkeys(name for execution in executions for name in row[execution]["components"])]
    names.sort(key=lambda name: ORDER.index(phase_of(name)))
    for name in (*names, "total"):
        lines.append(f"{name:<24}" + "".join(_cells(parts[execution].get(name)) for execution in executions))
    fewer = row["times_fewer_bytes"], row["times_fewer_launches"]
    lines.append(f"packed moves {fewer[0]:.2f} times fewer bytes in {fewer[1]:.2f} times fewer launches")
    for execution in executions:
        for item in row[execution]["items"]:
            figures = f"{item['bytes'] / 1e9:8.2f} GB {item['launches']:5d} launches"
            lines.append(f"{execution:<17}{figures}  {item['phase']}: {item['operation']} {item['inputs']}")
    return "\n".join(lines)


def _cells(figures: Row | None) -> str:
    if figures is None:
        return f"{'-':>18}{'-':>10}{'-':>12}"
    return f"{figures['launches']:>18,}{figures['bytes'] / 1e9:>10.1f}{figures['flops_per_clip'] / 1e9:>12,.1f}"


def result_rows(row: Row) -> list[files.Row]:
    """The totals and components of a model as rows of a result file."""
    rows: list[files.Row] = []
    for execution in MODELS[row["model"]].executions:
        parts = {"total": row[execution], **row[execution]["components"]}
        for component, figures in parts.items():
            for name, value, unit in (
                ("launches", figures["launches"], "launches"),
                ("bytes", figures["bytes"] / 1e9, "GB"),
                ("work", figures["flops_per_clip"] / 1e9, "GFLOP/clip"),
            ):
                where = {"model": row["model"], "execution": execution, "component": component}
                rows.append({"name": name, "value": value, "unit": unit, "parameters": where})
    for figure in ("bytes", "launches"):
        where = {"model": row["model"]}
        rows.append({"name": f"times fewer {figure}", "value": row[f"times_fewer_{figure}"], "unit": "x",
                     "parameters": where})  # fmt: skip
    return rows


def rows_without(model: str, piece: str) -> list[files.Row]:
    """The totals of a packed step that has all kernels but those of one piece, as rows of a result file.

    `piece` is one of `fastjepa.pieces.PIECES`. Errors: ValueError for another.
    """
    if piece not in KERNELS:
        raise ValueError(f"piece: expected one of {', '.join(KERNELS)}, given {piece!r}")
    total = count(model, "packed", {**KERNELS, piece: "library"}).total()
    where = {"model": model, "execution": "packed", "without": piece}
    return [
        {"name": "launches", "value": total.launches, "unit": "launches", "parameters": where},
        {"name": "bytes", "value": total.bytes / 1e9, "unit": "GB", "parameters": where},
    ]
