"""C5: wherever a run was left, what is resumed is the unbroken run."""

import signal

import pytest

from fastjepa.exits import Exit
from tests.reliability.harness import assert_none_lost, exact

# Thirty videos and six a step: a pass over them is five steps.
SETTINGS = ("optim.global_batch=6", "data.batch_size=6", "mask.group=6", "optim.steps=17", "optim.warmup_steps=4")
PLACES = {
    "after the first step": [1],
    "in the warm-up": [3],
    "with the last step of the warm-up": [4],
    "after the last step of a pass": [5],
    "after the first step of a pass": [6],
    "three times in one pass": [11, 12, 14],
    "before and after a pass ends": [9, 10, 11],
    "before the last step": [16],
    "after the last step": [17],
}


@pytest.mark.parametrize(
    ("place", "leave"),
    [
        *((place, "SIGTERM") for place in PLACES),
        # test_kills.py has kills by the dozen.
        *(pytest.param(place, "SIGKILL", marks=[] if "three" in place else [pytest.mark.long]) for place in PLACES),
    ],
)
def test_left_there_and_resumed_it_is_one_run(lab, place, leave):
    for number, step in enumerate(PLACES[place]):
        workers = f"data.workers={2 * (number % 2)}"
        code = Exit.SAVED_AFTER_SIGNAL if leave == "SIGTERM" else -signal.SIGKILL
        hit = ["after_row", {"step": step, "numbers": [signal.Signals[leave]]}]
        child = lab.run("parts", *SETTINGS, workers, code=code, sabotage=[hit])
        assert "30 for pretraining" in child.out
        rows = lab.rows("parts")
        assert rows[-1]["step"] == step
        assert exact(rows) == lab.whole(*SETTINGS)[:step]
    lab.run("parts", *SETTINGS)
    assert_none_lost(lab.rows("parts"), lab.whole(*SETTINGS))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("asked", [1, 2])
def test_left_in_a_probe_and_resumed_it_is_one_run(lab, number, asked):
    settings = ("eval.every=6", "eval.probe=linear")
    code = Exit.SAVED_AFTER_SIGNAL if number == signal.SIGTERM else -number
    lab.run("parts", *settings, code=code, sabotage=[["in_probe", {"asked": asked, "numbers": [number]}]])
    assert lab.rows("parts")[-1]["step"] == 6
    lab.run("parts")
    assert_none_lost(lab.rows("parts"), lab.whole())


@pytest.mark.parametrize("change", [1, 8, 30])
def test_left_in_a_save_and_resumed_it_is_one_run(lab, change):
    hit = ["in_save", {"change": change, "numbers": [signal.SIGTERM]}]
    lab.run("parts", code=Exit.SAVED_AFTER_SIGNAL, sabotage=[hit])
    assert len(lab.rows("parts")) < 12
    lab.run("parts")
    assert_none_lost(lab.rows("parts"), lab.whole())


def test_a_finished_run_ends_at_once_and_touches_nothing_of_its_training(lab):
    lab.run("done")
    folder = lab.path("done")
    texts = [folder / "metrics.jsonl", folder / "status.json"]
    saved = sorted((folder / "checkpoints").rglob("*"))
    before = [path.read_bytes() for path in texts], [path.stat().st_mtime_ns for path in saved]
    child = lab.run("done")
    assert "this run has its 12 steps" in child.out
    assert sorted((folder / "checkpoints").rglob("*")) == saved
    assert ([path.read_bytes() for path in texts], [path.stat().st_mtime_ns for path in saved]) == before
