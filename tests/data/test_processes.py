import os
import time

import pytest

from fastjepa.data import processes
from fastjepa.data.processes import CRASHED, Lost, each_apart


def unruly(item):
    if item.startswith("crash"):
        if item != "crash once" or not os.path.exists(os.environ["MARK"]):
            open(os.environ["MARK"], "w").close()
            os._exit(11)
    elif item == "hang":
        time.sleep(600)
    elif item == "raise":
        raise KeyError("nothing there")
    return item.upper()


@pytest.fixture(autouse=True)
def mark(tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))


def outcome(items, workers, seconds=30.0):
    return dict(each_apart(unruly, items, workers, lambda item: 0.3 if item == "hang" else seconds))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_a_hang_and_an_exception_cost_their_item_alone(workers):
    items = ["a", "crash", "b", "hang", "raise", "c"]
    start = time.monotonic()
    assert outcome(items, workers) == {
        0: "A",
        1: Lost(CRASHED),
        2: "B",
        3: Lost("reading it took more than 0 s"),
        4: Lost("KeyError: 'nothing there'"),
        5: "C",
    }
    assert time.monotonic() - start < 60  # the hanging one sleeps for ten minutes


def test_an_item_whose_process_was_killed_once_is_tried_again():
    assert outcome(["crash once", "a"], 1) == {0: "CRASH ONCE", 1: "A"}


def test_nothing_to_do_starts_nothing(monkeypatch):
    monkeypatch.setattr(processes, "_Worker", None)
    assert outcome([], 4) == {}


def test_without_workers_nothing_can_be_done():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        outcome(["a"], 0)


def test_no_process_is_left_when_the_caller_stops_listening(monkeypatch):
    started = []
    real = processes._Worker.__init__
    monkeypatch.setattr(processes._Worker, "__init__", lambda self, f: (started.append(self), real(self, f))[1])
    answers = each_apart(unruly, ["a", "b", "hang"], 2, lambda _: 30.0)
    next(answers)
    answers.close()
    assert len(started) == 2
    assert not any(worker.process.is_alive() for worker in started)
