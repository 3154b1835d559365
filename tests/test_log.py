"""What a run says, and that a resumed run's metrics hold each step once."""

import errno
import io
import json
import os
import re

import pytest
from rich.console import Console

from fastjepa import log
from fastjepa.config import Log
from fastjepa.log import RunLog, duration, read_metrics


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def open_log(tmp_path):
    """Open the log of a run in tmp_path/run; closed at the end of the test."""
    folder = tmp_path / "run"
    folder.mkdir()
    opened = []

    def go(**settings):
        opened.append(RunLog(folder, Log(**settings), "vith-123abc", 100))
        return opened[-1]

    yield go
    for one in opened:
        one.__exit__(None, None, None)


@pytest.fixture
def terminal(monkeypatch):
    """Make every console a terminal; returns what was written to it."""
    screen = io.StringIO()

    def console(**options):
        return Console(file=screen, force_terminal=True, width=100, **options)

    monkeypatch.setattr(log, "Console", console)
    return screen


def steps(run_log: RunLog) -> list[int]:
    return [row["step"] for row in read_metrics(run_log.folder)]


# metrics.jsonl


def test_rows_come_back_in_order_as_soon_as_they_are_written(open_log):
    run = open_log()
    run.metrics({"step": 10, "loss": 0.5, "skipped": 0})
    run.metrics({"step": 20, "loss": 0.1 + 0.2, "loss_ratio": None})
    assert read_metrics(run.folder) == [
        {"step": 10, "loss": 0.5, "skipped": 0},
        {"step": 20, "loss": 0.1 + 0.2, "loss_ratio": None},
    ]


def test_numbers_that_are_not_finite_become_null_in_valid_json(open_log):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    run = open_log()
    run.metrics({"step": 1, "a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 2.0, "e": 3})
    (line,) = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": None, "d": 2.0, "e": 3}


def test_a_resume_drops_later_rows_so_that_each_step_is_there_once(open_log):
    first = open_log()
    for step in range(1, 8):
        first.metrics({"step": step, "loss": 1.0})
    second = open_log()
    second.rewind(4)
    assert steps(second) == [1, 2, 3, 4]
    for step in range(5, 9):
        second.metrics({"step": step, "loss": 2.0})
    assert steps(second) == list(range(1, 9))
    assert [row["loss"] for row in read_metrics(second.folder)] == [1.0] * 4 + [2.0] * 4
    third = open_log()
    third.rewind(8)
    assert steps(third) == list(range(1, 9))
    third.rewind(0)
    assert steps(third) == []


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step"', "{", '{"step": 3, "loss": {}', "\0" * 50, "}"])
def test_a_half_written_last_line_is_dropped(open_log, rest):
    run = open_log()
    run.metrics({"step": 1})
    run.metrics({"step": 2})
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(rest)
    again = open_log()
    again.rewind(5)
    assert steps(again) == [1, 2]
    again.metrics({"step": 3})
    assert steps(again) == [1, 2, 3]


def test_a_whole_last_line_without_its_newline_is_kept(open_log):
    run = open_log()
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1}\n{"step": 2}')
    run.rewind(2)
    run.metrics({"step": 3})
    assert steps(run) == [1, 2, 3]


def test_a_rewind_that_is_killed_keeps_the_old_rows(open_log, monkeypatch):
    run = open_log()
    for step in (1, 2, 3):
        run.metrics({"step": step})

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.rewind(1)
    assert steps(run) == [1, 2, 3]


# status.json


def test_status_has_state_step_and_heartbeat_and_is_replaced_as_a_whole(open_log, monkeypatch):
    run = open_log()
    monkeypatch.setattr(log.time, "time", lambda: 1234.5)
    run.status("training", 7, loss=0.5)
    path = run.folder / "status.json"
    assert json.loads(path.read_text()) == {
        "state": "training",
        "step": 7,
        "steps": 100,
        "heartbeat": 1234.5,
        "loss": 0.5,
    }
    seen = []
    replace = os.replace

    def watched(source, target):
        seen.append(json.loads(path.read_text())["state"])
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    run.status("done", 100)
    assert seen == ["training"]
    assert json.loads(path.read_text()) == {"state": "done", "step": 100, "steps": 100, "heartbeat": 1234.5}


# Console and train.log


def test_lines_go_to_the_console_and_with_a_date_into_train_log(open_log, capsys):
    run = open_log()
    run.say("step 1/100  loss 0.5")
    run.say("ends  [bold]here[/bold] :warning: " + "x" * 300)
    printed = capsys.readouterr().out
    assert printed == "step 1/100  loss 0.5\nends  [bold]here[/bold] :warning: " + "x" * 300 + "\n"
    lines = (run.folder / "train.log").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) for line in lines] == printed.splitlines()
    assert all(re.match(r"^\d{4}-\d\d-\d\d ", line) for line in lines)


def test_a_resumed_run_goes_on_in_train_log(open_log):
    open_log().say("first")
    run = open_log()
    run.say("second")
    assert [line.split("  ")[1] for line in (run.folder / "train.log").read_text().splitlines()] == ["first", "second"]


def test_there_is_no_bar_where_the_console_is_no_terminal(open_log, capsys):
    run = open_log()
    run.start_progress(10)
    run.advance(11)
    run.say("line")
    run.stop_progress()
    assert capsys.readouterr().out == "line\n"


def test_a_terminal_shows_a_bar_with_the_steps_and_takes_it_away(open_log, terminal):
    with open_log() as run:
        run.start_progress(10)
        run.advance(42)
        run._progress.refresh()
        assert re.search(r" 42/100", terminal.getvalue())
        assert "━" in terminal.getvalue()
        run.say("a line above the bar")
        assert "a line above the bar" in terminal.getvalue()
    assert run._progress is None
    assert "\x1b[2K" in terminal.getvalue().rsplit("━", 1)[1]  # the line of the bar is erased at the end


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4.4, "4 s"),
        (99, "99 s"),
        (100, "2 min"),
        (720, "12 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (12600, "3.5 h"),
        (360000, "100.0 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# A full disk


def test_a_full_disk_under_the_log_is_said_and_does_not_end_the_run(open_log, tmp_path, capsys, monkeypatch):
    (tmp_path / "run" / "train.log").symlink_to("/dev/full")
    with open_log() as run:
        run.say("goes to the console all the same")
        assert capsys.readouterr().out.count("No space left on device") == 1

        def full(path, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(log, "write_atomically", full)
        run.status("training", 3)
        printed = capsys.readouterr().out
        assert printed.startswith(f"warning: the log in {run.folder} cannot be written: ")
        assert printed.count("\n") == 1
        run.metrics({"step": 3})
        assert steps(run) == [3]


def test_rows_that_did_not_fit_are_written_once_there_is_room(open_log, tmp_path):
    run = open_log()
    full = open("/dev/full", "a")  # noqa: SIM115
    space = os.dup(run._metrics.fileno())
    os.dup2(full.fileno(), run._metrics.fileno())
    run.metrics({"step": 1})
    os.dup2(space, run._metrics.fileno())
    run.metrics({"step": 2})
    assert steps(run) == [1, 2]
    os.close(space)
    full.close()
