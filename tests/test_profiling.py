"""The profiler switch: what it leaves behind, and that it changes nothing else."""

import gzip
import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from fastjepa import configfile
from fastjepa.log import read_metrics
from fastjepa.profiling import Profiler, table


def profiled(folder, wanted, steps, work=lambda: torch.ones(8, 8) @ torch.ones(8, 8)):
    said = []
    profiler = Profiler(wanted, folder, torch.device("cpu"), said.append)
    for number in steps:
        with profiler.step(number):
            work()
    profiler.close()
    return said


def trace(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_a_run_leaves_a_trace_and_a_table_of_ten_and_computes_the_same(run, capsys):
    _, folder = run("optim.steps=8", "log.every=2", "runtime.profile=3..5")
    shown = capsys.readouterr().out
    events = trace(folder / "profile" / "trace-steps-3-5.json.gz")
    assert sum(event.get("name") == "aten::addmm" for event in events) > 10
    lines = (folder / "profile" / "operations.txt").read_text().splitlines()
    assert lines[0] == "steps 3 to 5 on cpu"
    rows = [re.fullmatch(r" *(\d+\.\d+) +(\d+\.\d)% +([\d.e+]+)   (\S.*)", line) for line in lines[2:]]
    assert len(rows) == 10
    assert all(rows)
    times = [float(row[1]) for row in rows]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(float(row[2]) for row in rows) <= 100.5
    assert all(line in shown for line in lines[1:])
    marked = [row["step"] for row in read_metrics(folder) if row.get("profiled")]
    assert marked == [4, 6]
    assert re.findall(r"step (\d)/8 .* while profiled", shown) == ["4", "6"]

    _, plain = run("optim.steps=8", "log.every=2", folder="plain")
    assert not (plain / "profile").exists()
    losses = [[row["loss"] for row in read_metrics(one)] for one in (folder, plain)]
    assert losses[0] == losses[1]


def test_a_run_that_goes_on_behind_these_steps_says_that_nothing_is_profiled(run, capsys):
    run("optim.steps=6", "runtime.stop_at=4")
    capsys.readouterr()
    _, folder = run("optim.steps=6", "runtime.profile=3..5")
    assert "profile    nothing: runtime.profile names steps 3 to 5, and this run goes on after step 4" in (
        capsys.readouterr().out
    )
    assert not (folder / "profile").exists()


def test_a_run_that_ends_in_between_leaves_what_it_has(tmp_path):
    said = profiled(tmp_path, "2..9", range(1, 5))
    assert [path.name for path in (tmp_path / "profile").glob("trace*")] == ["trace-steps-2-4.json.gz"]
    assert "steps 2 to 4" in said[0]


def test_only_the_named_steps_are_in_the_trace(tmp_path):
    profiled(tmp_path, "2..3", range(1, 7))
    events = trace(tmp_path / "profile" / "trace-steps-2-3.json.gz")
    assert sum(event.get("name") == "aten::matmul" for event in events) == 2


def test_a_disk_that_is_full_is_said(tmp_path):
    (tmp_path / "profile").write_text("no folder")
    said = profiled(tmp_path, "1..1", [1])
    assert said[0].startswith("warning: the profile cannot be written: ")


def test_the_rows_of_the_table_are_per_step_and_shares_of_all():
    def event(key, microseconds, count, **more):
        facts = {"device_type": DeviceType.CPU, "is_user_annotation": False, **more}
        return SimpleNamespace(key=key, self_cpu_time_total=microseconds, count=count, **facts)

    kernel = event("on the GPU", 1e9, 1, device_type=DeviceType.CUDA)
    events = [event("aten::add", 1500.0, 3), event("aten::mm", 4500.0, 6), kernel]
    _, *rows = table([*events, event("a part", 1e9, 1, is_user_annotation=True)], torch.device("cpu"), steps=3)
    assert [row.split() for row in rows] == [["1.500", "75.0%", "2", "aten::mm"], ["0.500", "25.0%", "1", "aten::add"]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("9..3", "expected the first step before the last, given 9..3"),
        ("5..11", "expected steps up to the last of this run, 10, given 5..11"),
        ("0..3", "expected steps FROM..TO or null, given '0..3'"),
        ("7", "expected steps FROM..TO or null, given 7"),
        ("3-5", "expected steps FROM..TO or null, given '3-5'"),
        ("1..101", "expected at most 100 steps"),
        ("3..7", "(eval.every 6 has one after step 6), given 3..7"),
    ],
)
def test_what_is_no_range_of_steps_is_refused_in_a_sentence(recipe, given, expected):
    more = ["optim.steps=200"] if given == "1..101" else []
    with pytest.raises(configfile.SettingsError) as error:
        configfile.load(recipe, [f"runtime.profile={given}", "eval.every=6", *more])
    assert len(error.value.mistakes) == 1
    assert expected in str(error.value)


def test_a_probe_right_behind_the_last_step_is_allowed(recipe):
    assert configfile.load(recipe, ["runtime.profile=3..6", "eval.every=6"]).runtime.profile == "3..6"
