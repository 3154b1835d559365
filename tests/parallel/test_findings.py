"""Files that any process meets: named once, listed once, counted against one quota."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch

from fastjepa.data.replaced import ALWAYS_TOLERATED, TooManyBadFiles
from fastjepa.findings import Findings
from fastjepa.parallel import join, launch
from tests.processes import run_processes


def batch(bad=(), short=()):
    return SimpleNamespace(bad=[(name, "no video") for name in bad], short=[(name, "3 frames") for name in short])


def made(folder):
    world = join(launch(os.environ), torch.device("cpu"), 1.0)
    said = []
    log = SimpleNamespace(say=said.append)
    return Findings(Path(folder), world, log, files=100, trained=90, max_bad_fraction=0.0), world.rank, said


def meet(folder: str) -> tuple[list[str], list[str], list[list[str]]]:
    findings, rank, said = made(folder)
    written = []
    for own in (
        (batch(bad=["a"]), batch(bad=["a", "b"], short=["s"])),  # each meets one, and both the same
        (batch(), batch(bad=["c"])),  # the second one alone
        (batch(bad=["b"]), batch()),  # known already
    ):
        findings.note(own[rank])
        findings.share()
        lists = (Path(folder) / name for name in ("bad_files.jsonl", "short_files.jsonl"))
        findings.world.wait()
        written.append([line for path in lists if path.exists() for line in path.read_text().splitlines()])
        findings.world.wait()
    return said, findings.summary(), written


def test_what_any_of_them_meets_is_listed_once(tmp_path):
    first, second = run_processes(meet, 2, str(tmp_path))
    assert first == second, "all know the same, and one of them speaks"
    said, summary, written = first
    bad = [f"bad file   {name}: no video (pyav); another video takes its place" for name in "abc"]
    assert said == [*bad[:2], "short file s: 3 frames; another video takes its place", bad[2]]
    assert [[json.loads(line)["path"] for line in lines] for lines in written] == [
        ["a", "b", "s"], ["a", "b", "c", "s"], ["a", "b", "c", "s"],
    ]  # fmt: skip
    assert summary[0].startswith("bad files  3 of 100, listed in ")


def meet_too_many(folder: str) -> tuple[str, int]:
    findings, rank, _ = made(folder)
    half = ALWAYS_TOLERATED // 2
    findings.note(batch(bad=[f"{rank}-{number}" for number in range(half)]))
    findings.share()
    findings.note(batch(bad=["one more"] if rank == 1 else []))
    try:
        findings.share()
    except TooManyBadFiles as error:
        return str(error), rank
    return "", rank


def test_the_quota_is_that_of_all_and_ends_all(tmp_path):
    (first, _), (second, _) = run_processes(meet_too_many, 2, str(tmp_path))
    assert first == second
    assert str(ALWAYS_TOLERATED + 1) in first
