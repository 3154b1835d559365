"""What got slower, or larger, between two measurements of the same series, beyond the spread of both."""

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.files import Row
from bench.report import cells
from bench.report.stored import Series, Stored, by_series, read, read_folder, row_key, speaking

COMMITTED = Path(__file__).parents[1] / "results"
MORE_IS_BETTER = {"clips/s", "frames/s", "videos/s", "batches/s", "images/s", "GB/s", "TFLOP/s", "x"}
LESS_IS_BETTER = {"ms", "s", "GB", "MB", "launches", "GFLOP/clip"}
# A processor's times say as much of it and its neighbours as of the code; ratios and counts do not.
OF_A_CPU = {"x", "GB", "MB", "launches", "GFLOP/clip"}
ALLOCATOR = 0.01  # of the peak memory: blocks are rounded up, and fit better or worse from run to run
ROUNDING = 1e-9  # counts are divided by a power of ten when they are written
HOST_CLOCKS = ("processor", "wall")
HOW = "measure with: pytest bench --benchmark-only"


@dataclass
class Comparison:
    """What is known of the figures of two sets of files, a line each."""

    commit: str
    files: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    same: int = 0
    new: int = 0
    cpu_times: int = 0

    def text(self) -> str:
        """For a person."""
        lines = [f"Against {self.commit}:", *self.files]
        if self.cpu_times:
            lines.append(
                "Of what a processor does only ratios and counts are compared: times depend on the processor and its "
                f"neighbours ({self.cpu_times} left out)."
            )
        for title, found in (
            ("slower or larger beyond the spread", self.worse),
            ("faster or smaller beyond the spread", self.better),
            ("not compared", self.apart),
        ):
            lines += ["", f"{title}: {len(found) or 'none'}", *(f"  {line}" for line in found)]
        return "\n".join([*lines, "", f"within the spread: {self.same}", f"new, nothing before: {self.new}"])


class Known(NamedTuple):
    """A row, and the file that it is from."""

    row: Row
    file: Stored


def against(commit: str, folder: Path) -> Comparison:
    """The newest results of `folder` beside those of a commit, row by row.

    The baseline of a row was measured at that commit, or else stands in the file of its series that the commit
    contains. What is held against it is the newest figure that was measured after it.
    Errors: ValueError with one sentence for a commit that git does not know, and where nothing can be compared.
    """
    stored = read_folder(folder)
    home = folder if _git(folder, "rev-parse", "--is-inside-work-tree") is not None else COMMITTED
    full = _git(home, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if full is None:
        raise ValueError(f"--against: expected a commit that git knows, given {commit!r}.")
    full = full.strip()
    # What is committed now may have been overwritten in the folder: a file of the same day has the same name.
    known = [*stored, *committed(home, "HEAD")]
    contained = by_series(committed(home, full) or committed(COMMITTED, full))
    measured = by_series(one for one in known if one.commit == full and not one.modified)
    bases = {
        # A part that was measured at the commit speaks for its rows; the others keep what the commit contains.
        series: [one for files in (measured, contained) if series in files for one in speaking(files[series])]
        for series in measured.keys() | contained.keys()
    }
    found = Comparison(full[:7] if full.startswith(commit) else f"{commit} ({full[:7]})")
    for series, files in by_series(stored).items():
        base = _known(bases.get(series, []))
        old = {(one.name, one.date) for of_commit in (measured, contained) for one in of_commit.get(series, [])}
        news = [one for one in files if base and (one.name, one.date) not in old and one.date > _oldest(base)]
        if news:
            _compare(found, series, base, news)
        else:
            found.apart.append(f"{series}: {'nothing newer' if base else 'nothing there'} ({files[0].name})")
    for series in sorted(bases.keys() - by_series(stored).keys()):
        found.apart.append(f"{series}: no file now")
    if not found.files:
        raise ValueError(f"--against: expected results newer than those of {commit}, found none; {HOW}.")
    if not (found.worse or found.better or found.same):
        raise ValueError(f"--against: expected figures that both measurements have, found none; {HOW}.")
    return found


Rows = dict[tuple[str, str], Known]


def _known(files: Iterable[Stored]) -> Rows:
    """The figures of files, each from the first that has it; a reason only where none has a figure."""
    found: Rows = {}
    for file in files:
        for row in _with_memory(file.rows):
            key = row_key(row)
            if key not in found or ("value" in row and "value" not in found[key].row):
                found[key] = Known(row, file)
    return found


def _oldest(base: Rows) -> str:
    return min(known.file.date for known in base.values())


def committed(folder: Path, commit: str) -> list[Stored]:
    """The result files that a commit holds in this folder of its repository; none where it has no such folder."""
    listed = _git(folder, "ls-tree", "--name-only", commit) or ""
    names = [name for name in listed.splitlines() if name.endswith(".json")]
    found = (read(name, _git(folder, "show", f"{commit}:./{name}") or "") for name in names)
    return [one for one in found if one is not None]


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says in a folder; None where it, or the folder's repository, is missing, or for an error."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _named(one: Stored) -> str:
    commit = one.commit[:7] if one.commit else "a commit not known"
    changed = " and changes to it" if one.modified else ""
    return f"{one.name} (of {commit}{changed}, {one.date[:16].replace('T', ' ')}, torch {one.header['torch']})"


def _compare(found: Comparison, series: Series, base: Rows, news: Sequence[Stored]) -> None:
    """`news`: the files of the series, the newest first, that the baseline is not among."""
    by_file = [(one, _known([one])) for one in news]
    sides: tuple[list[Stored], list[Stored]] = ([], [])  # files that figures came from, now and before
    for key, before in base.items():
        old, unit = before.row, before.row.get("unit")
        if unit not in MORE_IS_BETTER | LESS_IS_BETTER:
            continue
        later = [rows[key] for one, rows in by_file if key in rows and one.date > before.file.date]
        now = next((one for one in later if "value" in one.row), later[0] if later else None)
        new = now.row if now else {}
        for side, known in zip(sides, (now, before)):
            if known is not None and known.file not in side:
                side.append(known.file)
        if unit not in OF_A_CPU and (_of_a_processor(before) or (now is not None and _of_a_processor(now))):
            found.cpu_times += 1
        elif "value" not in new:
            found.apart.append(f"{_what(series, old)}: {new.get('skipped', 'not measured now')}")
        elif new["unit"] != unit:
            found.apart.append(f"{_what(series, old)}: {new['unit']} now, {unit} before")
        elif apart := _apart(old, new):
            gained = (apart > 0) == (unit in MORE_IS_BETTER)
            (found.better if gained else found.worse).append(f"{_what(series, old)}: {_change(old, new)}")
        else:
            found.same += 1
    present = _known(news)
    found.new += sum(
        "value" in one.row and (key not in base or "value" not in base[key].row) for key, one in present.items()
    )
    now_in, before_in = (", ".join(map(_named, side)) for side in sides)
    found.files.append(f"  {series}: {now_in or _named(news[0])} against {before_in}")


def _of_a_processor(known: Known) -> bool:
    """Whether it is a time of the host: on a CPU all are, and beside a GPU those rows that say so."""
    return known.file.on_a_cpu or known.row.get("clock") in HOST_CLOCKS


def _with_memory(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows, and the peak memory of those that tell it as a figure of its own, with the allocator's slack."""
    for row in rows:
        yield row
        peaks = ((row.get("peak_memory_gb"), "GB"), (cells.megabytes(row), "MB"))
        for peak, unit in peaks:
            if peak is not None:
                spread = {"p20": peak * (1 - ALLOCATOR), "p80": peak * (1 + ALLOCATOR)}
                yield {"name": f"{row['name']}, peak memory", "value": peak, "unit": unit, "n": 1, **spread,
                       "parameters": row["parameters"]}  # fmt: skip


def _apart(old: Row, new: Row) -> int:
    """1 where all of `new` lies above `old`, -1 where it lies below, 0 where their spreads meet."""
    (low, high), (new_low, new_high) = (cells.spread(row) or (row["value"],) * 2 for row in (old, new))
    slack = ROUNDING * max(abs(high), abs(new_high))
    return int(new_low > high + slack) - int(new_high < low - slack)


def _what(series: Series, row: Row) -> str:
    return ", ".join((series.kind, row["name"], *(cells.word(one) for one in row["parameters"].values())))


def _change(old: Row, new: Row) -> str:
    percent = f" ({new['value'] / old['value'] - 1:+.2%})" if old["value"] else ""
    before, now = cells.with_spread(old), cells.with_spread(new)
    if before == now:  # counts are exact: a change in their later digits is one
        before, now = f"{old['value']:,.9g}", f"{new['value']:,.9g}"
    return f"{before} -> {now} {old['unit']}{percent}"
