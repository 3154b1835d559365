"""What every shipped kernel needs of a GPU, as a table that can be committed and compared. Works on any machine.

The table is a TSV file: a first line with the version of Triton, the names of the columns, then a line for each kernel,
setting and architecture, sorted. A change of a kernel, a setting or the compiler shows as changed lines.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from fastjepa_kernels.testing.compile_only import TARGETS, Resources, compile_for

FIGURES = [field.name for field in fields(Resources)]
COLUMNS = ["kernel", "target", "settings", *FIGURES]
Row = dict[str, str]
# So few kernels are compiled sooner than further processes have loaded torch.
FEW = 8


def compiled(targets: Sequence[str] = tuple(TARGETS), processes: int = 2, only: str = "") -> Iterator[Row]:
    """A row for every shipped kernel whose name contains `only`, as soon as it is compiled; over several processes."""
    places = [(target, n) for target in targets for n, entry in enumerate(_shipped(target)) if only in entry.name]
    if processes == 1 or len(places) <= FEW:
        yield from (_compile(place) for place in places)
        return
    # Spawned: a forked process would inherit the locks of torch's threads.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_compile, places, chunksize=4)


def row_of(target: str, entry: Any) -> Row:
    """The row of one entry of the catalogue. Errors: RuntimeError of the compiler."""
    needs = compile_for(target, entry.kernel, entry.signature, entry.constants, warps=entry.warps, stages=entry.stages)
    settings = {**dict(sorted(entry.constants.items())), "warps": entry.warps, "stages": entry.stages}
    row = {"kernel": entry.name, "target": target, "settings": " ".join(f"{k}={v}" for k, v in settings.items())}
    return {**row, **{name: str(value) for name, value in asdict(needs).items()}}


def triton_version() -> str:
    """That of the installed Triton, which is loaded for it."""
    import triton

    return triton.__version__


def write_table(path: Path, rows: Sequence[Row], version: str) -> None:
    """Errors: ValueError where two rows are of the same kernel and target."""
    by_place = {_place(row): row for row in rows}
    if len(by_place) != len(rows):
        raise ValueError(f"{len(rows) - len(by_place)} kernels have the name of another one of the same target")
    lines = ["\t".join(by_place[place][column] for column in COLUMNS) for place in sorted(by_place)]
    path.write_text("\n".join([f"# triton {version}", "\t".join(COLUMNS), *lines]) + "\n")


def read_table(path: Path) -> tuple[str, list[Row]]:
    """The version of Triton and the rows. Errors: ValueError where the file is no such table."""
    first, *lines = path.read_text().splitlines() or [""]
    if not first.startswith("# triton ") or lines[:1] != ["\t".join(COLUMNS)]:
        raise ValueError(f"{path}: expected a table of `compile --table` with the columns {', '.join(COLUMNS)}")
    return first.removeprefix("# triton "), [dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in lines[1:]]


def differences(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """A sentence for each row that is new, gone or changed, sorted; empty where the tables agree."""
    old, new = ({_place(row): row for row in rows} for rows in (before, after))
    found = []
    for place in sorted(old.keys() | new.keys()):
        name = ", ".join(place)
        if place not in new:
            found.append(f"{name}: gone")
        elif place not in old:
            found.append(f"{name}: new")
        else:
            was, now = old[place], new[place]
            changed = [f"{key} {was[key]} -> {now[key]}" for key in COLUMNS if was[key] != now[key]]
            found += [f"{name}: {'; '.join(changed)}"] * bool(changed)
    return found


def _place(row: Row) -> tuple[str, str]:
    return row["kernel"], row["target"]


@cache
def _shipped(target: str) -> list[Any]:
    from fastjepa_kernels._triton.catalogue import shipped

    return list(shipped(target))


def _compile(place: tuple[str, int]) -> Row:
    target, n = place
    return row_of(target, _shipped(target)[n])
