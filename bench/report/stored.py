"""Result files as they are stored, and which of them speak for a series of measurements.

A *series* is what is measured (`kind`, and its `part`: the stage of `bench.ceilings`) and the device; figures
without a device are the same on any. The file names say it:
KIND[-PART][-DEVICE]-DATE[-SELECTION][-unfinished].
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.files import Row
from bench.machine import slug

NAME = re.compile(
    r"(?P<series>[a-z0-9_]+(?:-[a-z0-9_-]+)??)-\d{4}-\d\d-\d\d(?:-(?P<selection>.+?))??(?:-unfinished)?\.json"
)
HEADER = ("device", "torch", "commit", "date", "command", "quick", "complete")


class Series(NamedTuple):
    """What one file continues: the kind of figure, its part or "", the device or ""."""

    kind: str
    part: str
    device: str

    def __str__(self) -> str:
        what = " ".join(word for word in (self.kind, self.part) if word)
        return f"{what} on {self.device}" if self.device else what


@dataclass(frozen=True)
class Stored:
    """A result file. `completed_by`: files of the same device and commit that some of the rows come from."""

    name: str
    series: Series
    selected: bool
    header: dict[str, Any]
    rows: list[Row]
    completed_by: tuple[str, ...] = ()

    @property
    def commit(self) -> str | None:
        """The commit that was measured, where git knew it."""
        return self.header["commit"]

    @property
    def modified(self) -> bool:
        """Whether the measured code differed from that commit. Files from before this was noted say nothing."""
        return bool(self.header.get("modified"))

    @property
    def on_a_cpu(self) -> bool:
        """Whether the device that was measured is a processor."""
        return self.header["device"].startswith("CPU")

    @property
    def place(self) -> str:
        """The device; beside a GPU the processor too, where rows are times of it. "" where any machine will do."""
        host = not self.on_a_cpu and any("clock" in row for row in self.rows) and self.header.get("processor")
        return f"{self.series.device}, processor {host}" if host else self.series.device

    @property
    def date(self) -> str:
        """When it was measured, in UTC: in the order of the alphabet too."""
        return self.header["date"]

    @property
    def whole(self) -> bool:
        """Whether all cases ran to the end."""
        return bool(self.header["complete"]) and not self.selected

    def named(self, name: str) -> list[Row]:
        """Its figures of this name."""
        return [row for row in self.figures() if row["name"] == name]

    def figures(self) -> list[Row]:
        """Its rows that have a value."""
        return [row for row in self.rows if "value" in row]

    def skipped(self) -> list[Row]:
        """Its rows that have a reason instead."""
        return [row for row in self.rows if "skipped" in row]


def row_key(row: Row) -> tuple[str, str]:
    """What a row is of: two rows with the same key are the same figure, measured twice."""
    return row["name"], json.dumps(row["parameters"], sort_keys=True)


def read(name: str, text: str) -> Stored | None:
    """A result file by its name and text; None for what is none (no date in its name, no rows) or measured nothing.

    Errors: ValueError where it is no JSON, or has rows and lacks what a reader must know.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected JSON, found none: {error}") from None
    found = NAME.fullmatch(name)
    if found is None or not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        return None
    missing = [key for key in HEADER if key not in content]
    if missing:
        raise ValueError(f"{name}: expected a result file with {', '.join(missing)}, found none")
    if content["quick"]:
        return None
    header = {key: value for key, value in content.items() if key != "rows"}
    return Stored(name, _series(found["series"], header["device"]), bool(found["selection"]), header, content["rows"])


def _series(name: str, device: str) -> Series:
    for end in (slug(device), "cpu" if device.startswith("CPU") else ""):
        if end and name.endswith(f"-{end}"):
            return Series(*_parts(name.removesuffix(f"-{end}")), device)
    return Series(*_parts(name), "")


def _parts(name: str) -> tuple[str, str]:
    kind, _, part = name.partition("-")
    return kind, part


def read_folder(folder: Path) -> list[Stored]:
    """All result files of a folder. Errors: ValueError where it is none, or holds a broken file."""
    if not folder.is_dir():
        raise ValueError(f"--results: expected a folder, given {str(folder)!r}")
    found = (read(path.name, path.read_text()) for path in sorted(folder.glob("*.json")))
    return [one for one in found if one is not None]


def by_series(files: Iterable[Stored]) -> dict[Series, list[Stored]]:
    """The files of each series, the newest first."""
    found: dict[Series, list[Stored]] = {}
    for one in sorted(files, key=lambda one: one.date, reverse=True):
        found.setdefault(one.series, []).append(one)
    return dict(sorted(found.items()))


def choose(files: Iterable[Stored]) -> list[Stored]:
    """One file a series, completed."""
    return [completed(*speaking(candidates)) for candidates in by_series(files).values()]


def speaking(candidates: Sequence[Stored]) -> list[Stored]:
    """The files of one series, the newest first, that speak for it: one, then those that know what it lacks.

    The one is the newest that is whole, else the newest of a session that was to run all cases, else the newest. The
    others have its device and commit.
    """
    base = min(candidates, key=lambda one: (not one.whole, one.selected))  # of equals the first, which is the newest
    return [base, *(one for one in candidates if one is not base and _same_code(one, base))]


def _same_code(one: Stored, base: Stored) -> bool:
    # Without a commit, or with changes to it, nobody can tell whether both measured the same code.
    same = one.commit == base.commit is not None and not one.modified and not base.modified
    return same and one.header["device"] == base.header["device"]


def completed(base: Stored, *others: Stored) -> Stored:
    """`base` with the figures that it lacks and the others have, the first of them that has one."""
    rows = {row_key(row): row for row in base.rows}
    names = []
    for one in others:
        new = {row_key(row): row for row in one.figures() if "value" not in rows.get(row_key(row), {})}
        rows |= new
        names += [one.name] if new else []
    return replace(base, rows=list(rows.values()), completed_by=tuple(names))
