"""Result files of a session of `pytest bench`: one for each kind of figure, anew after every case.

A *kind* is what a module of cases measures (`KIND`), and the beginning of its file's name. A session that was told to
run some of the cases only (-k, -m, a case by name, --deselect, --lf) has a file name of its own: it must not replace a
whole one. Nor must a session that does not get so far: its file is called unfinished until all cases have ended.
"""

import os
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.files import Row, write_results
from bench.machine import facts, slug

UNFINISHED = "-unfinished"  # the end of a file's name until all of its cases have ended


class Kind:
    """The file of one kind. It is begun by the first figure: reasons alone make none.

    `lacking`: a case failed, or there was no time for it.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """`path`: of the finished file."""
        self.finished, self.header = path, header
        self.path = path.with_stem(path.stem + UNFINISHED)
        self.rows: list[Row] = []
        self.lacking = False

    def add(self, rows: Sequence[Row]) -> None:
        """More rows, written at once where there is a figure among them or before."""
        self.rows += rows
        if self.begun():
            write_results(self.path, self.header, self.rows, complete=False)

    def finish(self) -> None:
        """All cases have ended: mark the file as complete and give it its name."""
        write_results(self.path, self.header, self.rows, complete=True)
        os.replace(self.path, self.finished)
        self.path = self.finished

    def begun(self) -> bool:
        """Whether there is a figure."""
        return any("value" in row for row in self.rows)


class Session:
    """All kinds of a session."""

    def __init__(self, folder: Path, arguments: Sequence[str], selection: str) -> None:
        """`arguments`: of pytest; `selection`: what chooses among the cases, empty where all run."""
        self.folder, self.selection = folder, selection
        self.command = plain_command(arguments)
        self.kinds: dict[str, Kind] = {}

    def some_cases_only(self) -> None:
        """Not all cases run, whatever chose them. To be called before the first case."""
        self.selection = self.selection or "some"

    def kind(self, name: str, device: torch.device | None = None) -> Kind:
        """The file of this kind; figures of a kind without a device are the same on any machine."""
        if name not in self.kinds:
            header = facts(device or torch.device("cpu"), self.command, quick=False)
            parts = [name, slug(header["device"]) if device else "", f"{datetime.now(UTC):%Y-%m-%d}", self.selection]
            self.kinds[name] = Kind(self.folder / f"{'-'.join(part for part in parts if part)}.json", header)
        return self.kinds[name]

    def close(self, *, ended: bool) -> list[Path]:
        """Finish what is complete, and name the files. `ended`: no case is missing because the session broke off."""
        begun = [kind for kind in self.kinds.values() if kind.begun()]
        for kind in begun:
            if ended and not kind.lacking:
                kind.finish()
        return [kind.path for kind in begun]


def plain_command(arguments: Sequence[str]) -> str:
    """The command line that repeats this, without what changes no figure (where files go, how it prints)."""
    # The public code is part of what is measured; where its checkout lies is not.
    words, skip = (["JEPA_REPO=CHECKOUT"] if os.environ.get("JEPA_REPO") else []) + ["pytest"], False
    for word in arguments:
        if skip or word in ("-o", "--results", "--benchmark-json"):
            skip = not skip
        elif not re.match(r"--(results|benchmark-json)=|-[qvr]", word):
            words.append(word)
    return shlex.join(words)


def selection_of(keyword: str, mark: str, arguments: Sequence[str]) -> str:
    """What chose among the cases, as a part of a file name: "" where nothing did."""
    named = [argument.partition("::")[2] for argument in arguments if "::" in argument]
    return slug(" ".join([keyword, mark, *named]))
