"""Result files: what a row is, how a file is written, and the table of its rows.

A *row* is one figure: `name value unit parameters` and, where it was timed, `ms` (the median behind the value), `p20`
and `p80` (the value's quantiles, in its own unit, the lower figure first), `n`; the further keys are the bench's own. A
case that the machine cannot run is a row as well: `name skipped parameters`, where `skipped` is the reason, so that a
missing figure can be told from a forgotten one.
"""

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(p20, median, p80)."""
    if len(values) == 1:
        return (values[0],) * 3
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return p20, statistics.median(values), p80


def made(folder: Path, option: str) -> Path:
    """The folder that this option names, made where it is missing.

    Errors: ValueError with one sentence where it is a file, or cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: expected a folder, given {str(folder)!r} ({error.strerror}).") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option}: expected a folder that may be written to, given {str(folder)!r}.")
    return folder


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
