"""Variants in turns, what becomes of their times, and the files of a session."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from bench import pairing, recording
from tests.pedantic import Pedantic

ROOT = Path(__file__).parents[2]
CASES = """
import pytest

from bench.conftest import BEGAN
from bench.pairing import alternate, rate_row, ratio_row, wall_clock

KIND = "made"
ON_A_DEVICE = {on_a_device}


@pytest.mark.parametrize("case", ["one", "two", "three"])
def test_made(benchmark, results, request, case):
    if case == "two":
        pytest.skip("there is no two")
    if case == "{slow}":
        request.config.stash[BEGAN] -= 1000
    assert case != "{failing}"
    times = alternate(benchmark, {{"ours": list, "theirs": list}}, wall_clock, 5)
    results([rate_row("made", times["ours"], 1.0, "clips/s", {{"case": case}})])
    results([ratio_row("made over", times, "theirs", {{"case": case}})])
"""


def test_variants_take_turns_and_warm_up_is_not_timed():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    times = pairing.alternate(Pedantic(), variants, lambda call: call() or len(calls), rounds=2, warm_up=1)
    assert calls == ["a", "b", "c", "b", "c", "a", "b", "c", "a"]
    assert times == {"a": [6, 9], "b": [4, 7], "c": [5, 8]}


def test_what_is_timed_by_the_processor_has_one_thread():
    torch.set_num_threads(2)
    seen = []
    pairing.alternate(
        Pedantic(), {"a": lambda: seen.append(torch.get_num_threads())}, pairing.processor_clock, rounds=1
    )
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2


def test_rows_have_their_spread_lower_figure_first():
    ms = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    rate = pairing.rate_row("x", ms, 3.0, "clips/s", {})
    assert (rate["p20"], rate["value"], rate["p80"]) == pytest.approx((60.0, 1e3 * 3 / 35, 150.0))
    time = pairing.time_row("x", ms, {})
    assert (time["p20"], time["value"], time["p80"]) == pytest.approx((20.0, 35.0, 50.0))
    ratio = pairing.ratio_row("x", {"ours": ms, "other": [2 * one for one in ms]}, "other", {})
    assert (ratio["p20"], ratio["value"], ratio["p80"], ratio["unit"]) == (2.0, 2.0, 2.0, "x")
    times = {"ours": ms, "second": [4 * one for one in ms], "other": [2 * one for one in ms]}
    assert pairing.ratio_row("x", times, "other", {}, of="second")["value"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["bench", "--benchmark-only"], "pytest bench --benchmark-only"),
        (["-q", "-o", "addopts=--x", "bench", "--results", "/private", "--benchmark-json=/a", "-k", "a or b"],
         "pytest bench -k 'a or b'"),
    ],
)  # fmt: skip
def test_the_command_of_a_file_has_no_private_paths(arguments, command, monkeypatch):
    monkeypatch.delenv("JEPA_REPO", raising=False)
    assert recording.plain_command(arguments) == command
    monkeypatch.setenv("JEPA_REPO", "/private/checkout")
    assert recording.plain_command(arguments) == f"JEPA_REPO=CHECKOUT {command}"


def session(tmp_path, *arguments, on_a_device=False, failing="none", slow="none", out="out"):
    """pytest on a folder that has the benches' own conftest: (its process, contents of result files by name)."""
    folder = tmp_path / "cases"
    folder.mkdir(exist_ok=True)
    (folder / "conftest.py").write_text("from bench.conftest import *\nfrom bench.conftest import _within_budget\n")
    (folder / "test_made.py").write_text(CASES.format(on_a_device=on_a_device, failing=failing, slow=slow))
    out = tmp_path / out
    options = ["-p", "no:cacheprovider", "-o", f"cache_dir={tmp_path / 'cache'}", "--import-mode=importlib"]
    options += ["--rootdir", str(folder), "--benchmark-only", "--results", str(out)]
    printed, said = io.StringIO(), io.StringIO()
    # In this process: to start one and import torch takes longer than all else. Bytecode would outlive the next case.
    with patch.object(sys, "dont_write_bytecode", True), redirect_stdout(printed), redirect_stderr(said):
        code = pytest.main([*options, *arguments])
    for name in ("conftest", "test_made"):
        sys.modules.pop(name, None)  # the next session has its own
    done = subprocess.CompletedProcess(arguments, code, printed.getvalue(), said.getvalue())
    return done, {path.name: json.loads(path.read_text()) for path in out.glob("*")} if out.is_dir() else {}


def test_a_session_writes_its_figures_and_says_what_it_skipped(tmp_path):
    done, files = session(tmp_path, str(tmp_path / "cases"))
    assert done.returncode == 0, done.stdout
    ((name, content),) = files.items()
    assert re.fullmatch(r"made-\d{4}-\d\d-\d\d\.json", name)
    assert content["complete"]
    assert content["device"] == f"CPU {content['processor']}"
    assert content["idle"] == {}
    assert [row["name"] for row in content["rows"]] == ["made", "made over", "test_made[two]", "made", "made over"]
    assert content["rows"][2]["skipped"] == "there is no two"
    assert "skipped 1: there is no two" in done.stdout
    assert f"wrote {tmp_path / 'out' / name}" in done.stdout


def test_a_failed_case_leaves_the_file_unfinished_and_a_whole_one_where_it_is(tmp_path):
    _, before = session(tmp_path, str(tmp_path / "cases"))
    ((whole, _),) = before.items()
    done, files = session(tmp_path, str(tmp_path / "cases"), failing="three")
    assert done.returncode == 1
    unfinished = files.pop(f"{whole.removesuffix('.json')}-unfinished.json")
    assert files == before
    assert not unfinished["complete"]
    assert len(unfinished["rows"]) == 3
    assert "-unfinished.json" in done.stdout
    _, files = session(tmp_path, str(tmp_path / "cases"))
    assert files.keys() == {whole}, "what was unfinished is finished now"
    assert files[whole]["date"] > before[whole]["date"]


@pytest.mark.parametrize("stopped", [["--budget", "500"], ["-x"]])
def test_what_time_or_a_stop_left_out_leaves_the_file_unfinished(tmp_path, stopped):
    # After the first case the budget is gone; the stop comes with the third.
    done, files = session(tmp_path, str(tmp_path / "cases"), *stopped, slow="one", failing="three")
    assert ("no time was left of --budget 500" in done.stdout) == (stopped[0] == "--budget")
    ((name, content),) = files.items()
    assert name.endswith("-unfinished.json")
    assert not content["complete"]
    assert content["rows"][0]["name"] == "made"


def test_deselected_cases_make_a_selection_too(tmp_path):
    done, files = session(tmp_path, str(tmp_path / "cases"), "--deselect", "test_made.py::test_made[three]")
    assert "1 deselected" in done.stdout
    ((name, content),) = files.items()
    assert name.endswith("-some.json")
    assert content["complete"]


def test_a_repetition_of_failures_is_a_selection_too(tmp_path):
    folder = str(tmp_path / "cases")
    cache = ["-p", "cacheprovider", "-o", f"cache_dir={tmp_path / 'cache'}"]
    session(tmp_path, folder, *cache, failing="three", out="first")
    done, files = session(tmp_path, folder, *cache, "--lf")
    assert done.returncode == 0, done.stdout
    ((name, content),) = files.items()
    assert name.endswith("-some.json")
    assert [row["parameters"] for row in content["rows"]] == 2 * [{"case": "three"}]


@pytest.mark.parametrize("out", ["a file", "a file/folder"])
def test_results_in_a_file_are_one_sentence(tmp_path, out):
    (tmp_path / "a file").touch()
    done, _ = session(tmp_path, str(tmp_path / "cases"), out=out)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: --results: expected a folder, given '{tmp_path / out}' (" in done.stderr
    assert "INTERNALERROR" not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_some_cases_have_a_file_of_their_own_and_time_may_run_out(tmp_path):
    done, files = session(tmp_path, str(tmp_path / "cases"), "-k", "one", on_a_device=True)
    assert done.returncode == 0, done.stdout
    ((name, _),) = files.items()
    assert name.startswith("made-cpu-")
    assert name.endswith("-one.json")
    done, _ = session(tmp_path, str(tmp_path / "cases"), "--budget", "0")
    assert "skipped 3: no time was left of --budget 0" in done.stdout
