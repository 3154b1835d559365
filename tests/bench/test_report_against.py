"""--against: what got slower than at a commit is found, and nothing else is."""

import subprocess
from unittest.mock import patch

import pytest

from bench.census import figures
from bench.census.counting import Census
from bench.census.steps import count
from bench.files import Row
from bench.report import compare
from bench.report.__main__ import main
from fastjepa.models import packing
from tests.planted_results import CPU, H100, pair, plant, row

RATIO = "speed of packed over reference"


class Repository:
    """A git repository with a folder of result files."""

    def __init__(self, root):
        self.root, self.results = root, root / "bench" / "results"
        self.git("init", "-q")
        self.commit("empty")

    def git(self, *arguments: str) -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *names, *arguments], cwd=self.root, capture_output=True, text=True, check=True
        ).stdout.strip()

    def commit(self, message: str) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def plant(self, kind: str, rows: list[Row], *arguments, **header) -> None:
        plant(self.results, kind, rows, *arguments, **{"commit": self.git("rev-parse", "HEAD"), **header})

    def against(self, commit: str) -> int:
        return main(["--against", commit, "--results", str(self.results)])


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def lines(capsys, title: str) -> list[str]:
    """The lines under a title of what was printed."""
    printed = capsys.readouterr().out
    part = printed.partition(f"\n{title}: ")[2].partition("\n\n")[0]
    return [line.strip() for line in part.splitlines()[1:]]


SLOWER, FASTER, APART = "slower or larger beyond the spread", "faster or smaller beyond the spread", "not compared"


def test_a_slower_ratio_is_found_in_files_of_two_commits(repository, capsys):
    repository.plant("executions", [row(RATIO, 1.32, "x", 0.03, shape="64x3")], date="2026-11-25")
    first = repository.commit("first")
    repository.commit("slower")
    repository.plant("executions", [row(RATIO, 1.10, "x", 0.03, shape="64x3")], date="2026-11-26")
    assert repository.against(first) == 1
    assert lines(capsys, SLOWER) == [
        f"executions, {RATIO}, 64x3: 1.32 (1.28 to 1.36) -> 1.10 (1.07 to 1.13) x (-16.67%)"
    ]
    assert repository.against(first[:8]) == 1
    printed = capsys.readouterr().out
    measured = repository.git("rev-parse", "HEAD~2")[:7]
    assert f"executions on {CPU}: executions-cpu-amd-epyc-2026-11-26.json (of " in printed
    assert f"against executions-cpu-amd-epyc-2026-11-25.json (of {measured}, 2026-11-25 10:00, torch 2.13.0)" in printed


@pytest.mark.parametrize(
    ("old", "new", "unit", "spread", "code"),
    [
        (1.32, 1.28, "x", 0.03, 0),  # spreads meet
        (1.32, 1.50, "x", 0.03, 0),  # faster
        (1.32, 1.10, "x", 0.03, 1),
        (170.0, 171.0, "GB", None, 1),
        (170.0, 170.0 * (1 + 1e-15), "GB", None, 0),
        (1116, 1117, "launches", None, 1),
        (1116, 1115, "launches", None, 0),
        (50.0, 20.0, "clips/s", 0.03, 1),
        (50.0, 20.0, "ms", 0.03, 0),
        (20.0, 50.0, "ms", 0.03, 1),
    ],
)
def test_direction_and_spread(repository, old, new, unit, spread, code):
    for date, value in (("2026-11-25", old), ("2026-11-26", new)):
        repository.plant("steps-vitl", [row("figure", value, unit, spread)], H100, date)
        last = repository.commit(date)
    assert repository.against(f"{last}~2") == code  # the commit that the first file was measured at


def test_old_rows_have_lowest_and_highest(repository):
    for date, value in (("2026-11-25", 1.32), ("2026-11-26", 1.27)):
        repository.plant("executions", [row(RATIO, value, "x", None) | {"min": value - 0.04, "max": value + 0.04}],
                         date=date)  # fmt: skip
        last = repository.commit(date)
    assert repository.against(f"{last}~2") == 0


def test_times_of_a_cpu_and_figures_that_are_no_speeds_are_left_out(repository, capsys):
    for date, scale in (("2026-11-25", 1.0), ("2026-11-26", 3.0)):
        rows = [
            row("step packed", 30 * scale, "ms"), row("loader", 60 / scale, "clips/s"), row(RATIO, 1.3, "x"),
            row("motion", 70 / scale, "%", None), row("difference", 1e-6 * scale, "relative", None),
        ]  # fmt: skip
        repository.plant("executions", rows, date=date)
        last = repository.commit(date)
    assert repository.against(f"{last}~2") == 0
    printed = capsys.readouterr().out
    assert "times depend on the processor and its neighbours (2 left out)" in printed
    assert "within the spread: 1\n" in printed


def test_what_cannot_be_compared_is_listed(repository, capsys):
    old = [row("a", 1.0, "x"), row("b", 1.0, "x"), row("c", 1.0, "x")]
    repository.plant("data", old, date="2026-11-25")
    repository.plant("executions", [row(RATIO, 1.3, "x")], "CPU other", "2026-11-25")
    repository.plant("scaling", [row("gone", 1.3, "x")], date="2026-11-25")
    first = repository.commit("first")
    (repository.results / "scaling-cpu-amd-epyc-2026-11-25.json").unlink()
    new = [row("a", 1.0, "x"), {"name": "b", "skipped": "no time", "parameters": {}}, row("d", 1.0, "x")]
    repository.plant("data", new, date="2026-11-26", modified=True)
    repository.plant("executions", [row(RATIO, 1.0, "x")], CPU, "2026-11-26", commit="b" * 40)
    assert repository.against(first) == 0
    assert lines(capsys, APART) == [
        "data, b: no time", "data, c: not measured now",
        f"executions on {CPU}: nothing there (executions-cpu-amd-epyc-2026-11-26.json)",
        "executions on CPU other: nothing newer (executions-cpu-other-2026-11-25.json)",
        f"scaling on {CPU}: no file now",
    ]  # fmt: skip
    repository.against(first)
    assert "new, nothing before: 1" in capsys.readouterr().out


def test_a_baseline_that_was_overwritten_on_the_same_day_is_taken_from_the_commit(repository, capsys):
    repository.plant("executions", [row(RATIO, 1.3, "x", 0.01)], date="2026-11-25T08:00:00+00:00")
    first = repository.commit("first")
    repository.plant("executions", [row(RATIO, 1.1, "x", 0.01)], date="2026-11-25T09:00:00+00:00", modified=True)
    assert len(list(repository.results.iterdir())) == 1
    assert repository.against("HEAD") == 1
    printed = capsys.readouterr().out
    assert f"Against HEAD ({first[:7]}):" in printed
    assert f"(of {first[:7]} and changes to it, 2026-11-25 09:00, torch 2.13.0) against " in printed


def test_a_baseline_is_a_measurement_of_the_commit_rather_than_one_that_it_contains(repository, capsys):
    repository.plant("executions", [row(RATIO, 1.0, "x", 0.01)], date="2026-11-25T08:00:00+00:00")
    first = repository.commit("contains what was measured before it")
    repository.plant("executions", [row(RATIO, 1.3, "x", 0.01)], date="2026-11-25T09:00:00+00:00")
    assert repository.against(first) == 2  # its own measurement is no news of it
    repository.commit("contains what was measured of the first")
    repository.plant("executions", [row(RATIO, 1.1, "x", 0.01)], date="2026-11-25T10:00:00+00:00", modified=True)
    assert repository.against(first) == 1
    assert lines(capsys, SLOWER)[0].endswith("1.30 (1.29 to 1.31) -> 1.10 (1.09 to 1.11) x (-15.38%)")


def test_a_file_of_modified_code_is_no_baseline(repository, capsys):
    repository.plant("executions", [row(RATIO, 1.3, "x", 0.01)], date="2026-11-25")
    first = repository.commit("first")
    repository.plant("executions", [row(RATIO, 1.1, "x", 0.01)], date="2026-11-26", modified=True)
    repository.plant("executions", [row(RATIO, 1.1, "x", 0.01)], date="2026-11-27", commit="b" * 40)
    assert repository.against(first) == 1  # not the one of that commit and changes, but the one that it contains
    assert "-> 1.10" in lines(capsys, SLOWER)[0]


def test_nothing_to_compare_is_one_sentence(repository, capsys):
    repository.plant("executions", [row(RATIO, 1.3, "x")])
    assert repository.against("nonsense") == 2
    assert capsys.readouterr().err == "--against: expected a commit that git knows, given 'nonsense'.\n"
    repository.commit("first")
    assert repository.against("HEAD") == 2  # the newest file is the one that the commit contains
    printed = capsys.readouterr().err
    assert "found none; measure with: pytest bench --benchmark-only" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("place", ["outside", "elsewhere in it"])
def test_results_of_another_folder_are_compared_with_the_projects_own(
    repository, tmp_path_factory, monkeypatch, capsys, place
):  # fmt: skip
    monkeypatch.setattr(compare, "COMMITTED", repository.results)
    repository.plant("executions", [row(RATIO, 1.3, "x", 0.01)], date="2026-11-25")
    repository.commit("first")
    folder = tmp_path_factory.mktemp("made") if place == "outside" else repository.root / "made"
    plant(folder, "executions", [row(RATIO, 1.1, "x", 0.01)], date="2026-11-26")
    assert main(["--against", "HEAD", "--results", str(folder)]) == 1
    assert "-> 1.10" in lines(capsys, SLOWER)[0]


def counted() -> list[Row]:
    """The census of the packed ViT-L step; a copy does not touch the reference, for which plain figures stand."""
    reference = Census()
    reference.components["target linear"].add(5_800, 362 * 10**9, 61 * 10**12)
    with patch.object(figures, "count", lambda *what: reference if "reference" in what else count(*what)):
        return figures.result_rows(figures.census("vitl", 0))


def test_a_copy_in_the_packed_step_is_found_by_the_census(repository, capsys):
    repository.plant("census", counted(), date="2026-11-25", on_a_device=False)
    before = repository.commit("the step as it is")
    plain = packing.encode_sets
    with patch.object(packing, "encode_sets", lambda *arguments, **named: plain(*arguments, **named).clone()):
        rows = counted()
    repository.plant("census", rows, date="2026-11-26", on_a_device=False, modified=True)
    assert repository.against(before) == 1
    worse = lines(capsys, SLOWER)
    for name, unit in (("bytes", "GB"), ("launches", "launches")):
        (total,) = [line for line in worse if line.startswith(f"census, {name}, vitl, packed, total")]
        assert f" {unit} (+" in total
        assert any(line.startswith(f"census, times fewer {name}, vitl") for line in worse)
    assert not any("reference" in line for line in worse)


@pytest.mark.parametrize(("peak", "code"), [(33.5, 0), (35.0, 1)])
def test_more_memory_is_found_beyond_what_an_allocator_rounds(repository, capsys, peak, code):
    repository.plant("step", pair("vith", "packed", "reference", (100.0, 60.0)), H100, date="2026-11-25")
    first = repository.commit("first")
    repository.commit("hungry")
    rows = pair("vith", "packed", "reference", (100.0, 60.0))
    rows[0]["peak_memory_gb"] = peak
    repository.plant("step", rows, H100, date="2026-11-26")
    assert repository.against(first) == code
    found = lines(capsys, SLOWER)
    assert len(found) == code
    assert all(line.startswith("step, step packed, peak memory, vith, packed, reference: 33.3 ") for line in found)


def test_a_count_that_grew_in_its_later_digits_is_shown_with_them(repository, capsys):
    repository.plant("census", [row("bytes", 169.901, "GB", None, model="vitl")], date="2026-11-25")
    first = repository.commit("first")
    repository.commit("a little more")
    repository.plant("census", [row("bytes", 169.948, "GB", None, model="vitl")], date="2026-11-26")
    assert repository.against(first) == 1
    assert lines(capsys, SLOWER) == ["census, bytes, vitl: 169.901 -> 169.948 GB (+0.03%)"]


TWO = {"a": 1.30, "b": 1.30}


def ratios(values: dict[str, float]) -> list[Row]:
    return [row(name, value, "x", 0.01) for name, value in values.items()]


def test_a_part_that_was_measured_at_the_commit_does_not_hide_the_whole_that_it_contains(repository, capsys):
    repository.plant("executions", ratios(TWO), date="2026-11-25")
    first = repository.commit("first")
    repository.plant("executions", ratios({"a": 1.20}), CPU, "2026-11-26", "a")
    repository.commit("slower")
    repository.plant("executions", ratios({"a": 1.20, "b": 1.00}), date="2026-11-27")
    assert repository.against(first) == 1
    printed = capsys.readouterr().out
    assert "executions, b: 1.30 (1.29 to 1.31) -> 1.00 (0.99 to 1.01) x (-23.08%)" in printed
    assert "within the spread: 1" in printed, "a is held against what was measured at the commit"
    assert " against executions-cpu-amd-epyc-2026-11-26-a.json (" in printed
    assert "), executions-cpu-amd-epyc-2026-11-25.json (" in printed


def test_a_newer_part_does_not_hide_the_whole_that_is_slower(repository, capsys):
    repository.plant("executions", ratios(TWO), date="2026-11-25")
    first = repository.commit("first")
    repository.commit("slower")
    repository.plant("executions", ratios({"a": 1.00, "b": 1.00}), date="2026-11-26")
    repository.commit("a is mended")
    repository.plant("executions", ratios({"a": 1.30}), CPU, "2026-11-27", "a")
    assert repository.against(first) == 1
    assert lines(capsys, SLOWER) == ["executions, b: 1.30 (1.29 to 1.31) -> 1.00 (0.99 to 1.01) x (-23.08%)"]
    skips = [{"name": "b", "skipped": "no time", "parameters": {}}]
    repository.plant("executions", [*ratios({"a": 1.30}), *skips], CPU, "2026-11-28", complete=False)
    assert repository.against(first) == 1, "a reason is no figure"


def test_what_a_commit_contains_is_no_news_of_it(repository):
    repository.plant("executions", ratios(TWO), date="2026-11-24")
    repository.commit("more")
    repository.plant("executions", ratios({"b": 1.00}), CPU, "2026-11-25", "b")
    last = repository.commit("contains a part that is newer than its whole")
    repository.commit("later")
    repository.plant("executions", ratios({"a": 1.30}), CPU, "2026-11-26", "a")
    assert repository.against(last) == 0


@pytest.mark.parametrize("clock", ["processor", "wall"])
def test_times_of_the_host_beside_a_gpu_are_left_out_like_those_of_a_cpu(repository, capsys, clock):
    for date, scale in (("2026-11-25", 1.0), ("2026-11-26", 3.0)):
        host = {} if date == "2026-11-25" else {"clock": clock}  # the older file is from before the key
        rows = [row("decode", 60 / scale, "clips/s") | host, row("speed", 2 / scale, "x") | host]
        repository.plant("data", [*rows, row("steps alone", 30, "clips/s")], H100, date)
        last = repository.commit(date)
    assert repository.against(f"{last}~2") == 1
    printed = capsys.readouterr().out
    assert "times depend on the processor and its neighbours (1 left out)" in printed
    assert "data, speed: 2.00" in printed
    assert "data, decode" not in printed
    assert "within the spread: 1\n" in printed


@pytest.mark.parametrize(("peak", "code"), [(100_500_000, 0), (110_000_000, 1), (90_000_000, 0)])
def test_more_memory_of_an_operation_is_found(repository, capsys, peak, code):
    for date, size in (("2026-11-25", 100_000_000), ("2026-11-26", peak)):
        repository.plant("kernels", [row("norm forward", 900, "GB/s", way="ours") | {"peak_bytes": size}], H100, date)
        last = repository.commit(date)
    assert repository.against(f"{last}~2") == code
    found = lines(capsys, SLOWER)
    assert len(found) == code
    assert all(line.startswith("kernels, norm forward, peak memory, ours: 100 ") and " MB " in line for line in found)


def test_the_commit_is_named_short(repository, capsys):
    repository.plant("executions", ratios(TWO), date="2026-11-25")
    first = repository.commit("first")
    repository.commit("second")
    repository.plant("executions", ratios(TWO), date="2026-11-26")
    assert repository.against(first) == 0
    assert capsys.readouterr().out.startswith(f"Against {first[:7]}:\n")
