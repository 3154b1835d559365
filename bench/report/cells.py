"""Figures as text, and tables of rows whose parameters nobody knows beforehand."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bench.files import Row

# Keys that a row may have beside its value, with the heading of their column.
MORE = {"share": "of the ceiling", "mfu": "MFU", "peak_memory_gb": "peak GB", "over_first": "over the first point"}
SHARES = ("share", "mfu")
MOST_ACROSS = 6  # columns: more are not readable


def number(value: float) -> str:
    """Three digits that say something, all digits before the point: 0.0123, 1.23, 170, 5,798."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def figure(value: float, unit: str) -> str:
    """A value in the digits that its unit deserves."""
    return f"{value:.2f}" if unit == "x" else f"{value:,.1f}" if unit == "%" else number(value)


def spread(row: Row) -> tuple[float, float] | None:
    """The interval that a figure is known to: its p20 and p80, or the lowest and highest; None for a count."""
    low, high = row.get("p20", row.get("min")), row.get("p80", row.get("max"))
    known = [one for one in (low, high) if one is not None]
    return (min(row["value"], *known), max(row["value"], *known)) if known else None


def ends(rows: Iterable[Row]) -> str:
    """What the spread in parentheses is, for the heading of a column; "" where no row has one."""
    known = [row for row in rows if spread(row) is not None]
    return " (p20 to p80)" if any("p20" in row for row in known) else " (lowest to highest)" if known else ""


def with_spread(row: Row) -> str:
    """ "1.32 (1.29 to 1.37)"; without the spread where there is none."""
    value, between = figure(row["value"], row["unit"]), spread(row)
    if between is None or between[0] == between[1]:
        return value
    return f"{value} ({figure(between[0], row['unit'])} to {figure(between[1], row['unit'])})"


def megabytes(row: Row) -> float | None:
    """What a call allocates at most, where it was counted."""
    size = row.get("peak_bytes")
    return None if size is None else size / 1e6


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join([_line(heads), "|" + "---|" * len(heads), *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def word(value: Any) -> str:
    """A parameter as text."""
    if isinstance(value, list):
        return " x ".join(map(word, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {word(one)}" for key, one in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def tables(rows: Sequence[Row], what: str = "what") -> list[str]:
    """A table for each set of parameters that rows have: name, the parameters that vary, value with spread.

    Parameters that are the same in all rows of a table stand in a line above it. Where a few figures are known at
    several points each, a point has one line and a figure one column; what is too wide for that is split by unit.
    """
    return [_table(part, what) for group in by_parameters(rows) for part in _narrow(group)]


def _narrow(rows: list[Row]) -> list[list[Row]]:
    points = {tuple(map(word, row["parameters"].values())) for row in rows}
    if len({row["name"] for row in rows}) <= MOST_ACROSS or len(points) == 1:
        return [rows]
    return [[row for row in rows if row["unit"] == unit] for unit in dict.fromkeys(row["unit"] for row in rows)]


def by_parameters(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows with the same set of parameters, together."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row["parameters"]), []).append(row)
    return list(groups.values())


def _table(rows: Sequence[Row], what: str) -> str:
    varying = [key for key in rows[0]["parameters"] if len({word(row["parameters"][key]) for row in rows}) > 1]
    same = {key: value for key, value in rows[0]["parameters"].items() if key not in varying}
    above = ", ".join(f"{key} {word(one)}" for key, one in same.items())
    names, points = {row["name"] for row in rows}, {tuple(word(row["parameters"][k]) for k in varying) for row in rows}
    across = 1 < len(names) <= MOST_ACROSS and len(points) > 1 and len(rows) >= 2 * len(points) and not _extras(rows)
    table = _across(rows, varying) if across else _down(rows, varying, what)
    return f"{above[:1].upper()}{above[1:]}:\n\n{table}" if above else table


def _across(rows: Sequence[Row], varying: Sequence[str]) -> str:
    heads = {row["name"]: f"{row['name']} ({row['unit']})" for row in rows}
    points: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        at = tuple(word(row["parameters"][key]) for key in varying)
        points.setdefault(at, {})[row["name"]] = with_spread(row)
    lines = [[*at, *(found.get(name, "-") for name in heads)] for at, found in points.items()]
    return markdown([*varying, *heads.values()], lines)


def _down(rows: Sequence[Row], varying: Sequence[str], what: str) -> str:
    units = {row["unit"] for row in rows}
    extra = _extras(rows)
    value = (units.pop() if len(units) == 1 else "value") + ends(rows)
    lines = []
    for row in rows:
        cells = [row["name"], *(word(row["parameters"][key]) for key in varying)]
        cells.append(with_spread(row) + (f" {row['unit']}" if units else ""))
        lines.append([*cells, *(_extra(key, row.get(key)) for key in extra)])
    return markdown([what, *varying, value, *(MORE[key] for key in extra)], lines)


def _extras(rows: Sequence[Row]) -> list[str]:
    return [key for key in MORE if any(row.get(key) is not None for row in rows)]


def _extra(key: str, value: float | Row | None) -> str:
    if isinstance(value, dict):  # a row of its own that stands beside this one
        return with_spread(value)
    return "-" if value is None else f"{value:.0%}" if key in SHARES else number(value)


def reasons(rows: Iterable[Row]) -> str:
    """What was skipped, a reason once; "" where nothing was."""
    counted = Counter(row["skipped"] for row in rows)
    parts = [f"{reason}{f' ({count})' if count > 1 else ''}" for reason, count in counted.items()]
    return f"Skipped: {'; '.join(parts)}." if parts else ""
