"""C24: whatever ended a run, what it has logged goes on without a gap, a repeat or a line that is no row."""

import json
import signal

import pytest

from fastjepa.exits import Exit
from tests.reliability.harness import assert_none_lost


def test_every_step_is_logged_once_through_kills_and_half_written_rows(lab):
    kill = [["after_row", {"step": 5, "numbers": [signal.SIGKILL]}]]
    lab.run("runs", code=-signal.SIGKILL, sabotage=kill)
    metrics = lab.path("runs") / "metrics.jsonl"
    for rest in ('{"step": 6, "loss": 0.7', '{"step": 6}\n{"step"', "\0\0\0\0"):
        with metrics.open("a") as out:
            out.write(rest)
        lab.run("runs", "checkpoint.every=100", code=-signal.SIGKILL, sabotage=kill)
    stop = [["after_row", {"step": 8, "numbers": [signal.SIGTERM]}]]
    lab.run("runs", code=Exit.SAVED_AFTER_SIGNAL, sabotage=stop)
    lab.run("runs", "runtime.stop_at=10")
    lab.run("runs")
    assert_none_lost(lab.rows("runs"), lab.whole())
    lines = metrics.read_text().splitlines()
    assert len(lines) == 12
    assert len({tuple(json.loads(line)) for line in lines}) == 1  # the same columns in the same order
    assert len((lab.path("runs") / "command.txt").read_text().splitlines()) == 7


def test_rows_further_apart_than_checkpoints_are_not_repeated(lab):
    """A row of step 6 was logged after the checkpoint that the run goes on from."""
    lab.run("whole", "log.every=3", "checkpoint.every=4")
    kill = [["after_row", {"step": 6, "numbers": [signal.SIGKILL]}]]
    lab.run("runs", "log.every=3", "checkpoint.every=4", code=-signal.SIGKILL, sabotage=kill)
    lab.run("runs", "log.every=3", "checkpoint.every=4")
    assert [row["step"] for row in lab.rows("runs")] == [3, 6, 9, 12]
    assert [row["loss"] for row in lab.rows("runs")] == [row["loss"] for row in lab.rows("whole")]


def test_tensorboard_shows_no_step_twice(lab):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    kill = [["after_row", {"step": 5, "numbers": [signal.SIGKILL]}]]
    lab.run("runs", "log.tensorboard=true", code=-signal.SIGKILL, sabotage=kill)
    lab.run("runs", "log.tensorboard=true")
    events = reader.EventAccumulator(str(lab.path("runs") / "tensorboard")).Reload()
    shown = [event.step for event in events.Scalars("loss")]
    assert shown == sorted(set(shown))
    assert shown[-1] == 12
