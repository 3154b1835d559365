"""What `info RUN` tells of a run from its folder alone."""

import json
import subprocess
import sys

import pytest

from fastjepa.runstate import told

NOW = 1_000_000.0
HOLDS = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "vith-123abc"
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    (folder / "command.txt").write_text("2026-01-01 00:00:00  python -m fastjepa train a.yaml\n")
    return folder


@pytest.fixture
def held(folder):
    """Another process holds the run, as one that trains does."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", HOLDS, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        yield
        process.stdin.close()


def write(folder, state="training", age=3.0, **more):
    content = {"state": state, "step": 40, "steps": 100, "heartbeat": NOW - age, **more}
    (folder / "status.json").write_text(json.dumps(content))


def lines(folder):
    return dict(told(folder, NOW))


def test_a_run_at_work_is_alive_with_its_place_and_the_time_left(folder, held):
    write(folder, log_seconds=5.0, seconds_left=300.0, verdict_text="alive: more than the position is predicted")
    row = {"step": 40, "loss": 0.5, "loss_ratio": 0.9, "rank": 12.0, "clips_per_s": 100.0, "data_wait": 0.02}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 50, "lo')
    found = lines(folder)
    assert found["state"] == "training, step 40 of 100 (40%), 5 min left"
    assert found["alive"] == "yes, its last line is 3 s old, usual are 5 s"
    assert found["verdict"] == "alive: more than the position is predicted"
    assert found["last line"].startswith("step 40, loss 0.5000 (0.900 of trivial")
    assert found["checkpoint"] == "none yet"
    assert found["goes on by"] == "python -m fastjepa train a.yaml"


def test_a_run_that_is_silent_for_long_may_hang(folder, held):
    write(folder, age=400.0, log_seconds=5.0)
    assert lines(folder)["alive"].startswith(
        "yes, its last line is 7 min old, usual are 5 s; it probes, saves or hangs"
    )


@pytest.mark.parametrize(("age", "expected"), [(400.0, "no process works in it"), (3.0, "perhaps: no process works")])
def test_a_run_that_nobody_holds_was_killed_or_is_elsewhere(folder, age, expected):
    write(folder, age=age, log_seconds=5.0)
    assert lines(folder)["alive"].startswith(expected)


def test_a_run_that_has_ended_says_how(folder):
    write(folder, state="failed", age=7200.0, reason="the loss is not finite")
    found = lines(folder)
    assert found["state"] == "failed, step 40 of 100 (40%): the loss is not finite"
    assert found["alive"] == "no, it ended 2.0 h ago"


def test_files_that_are_damaged_are_no_trouble(folder):
    (folder / "status.json").write_text("{")
    (folder / "metrics.jsonl").write_bytes(b"\0\0\n[1]\n")
    found = lines(folder)
    assert found["state"] == "it has said nothing yet"
    assert "last line" not in found


def test_a_folder_of_runs_names_them(folder):
    with pytest.raises(ValueError, match="which holds the runs vith-123abc"):
        lines(folder.parent)
    with pytest.raises(ValueError, match="which does not exist"):
        lines(folder / "nothing")
