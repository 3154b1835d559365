"""C19: a signal saves and leaves, a second one leaves at once, whatever the run is doing; nothing is lost by it."""

import json
import signal

import pytest

from fastjepa.exits import Exit
from tests.reliability.harness import assert_none_lost, steps

TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
# No save is due before the end but the one that a signal asks for, unless a moment needs one.
SETTINGS = ("checkpoint.every=100",)
# What is done to the run, and the step that it is saved at; None where the moment does not say.
MOMENTS = {
    "before the first step": ("at_file", {"name": ".tmp-metrics.jsonl"}, SETTINGS, 1),
    "in the first step": ("in_forward", {"call": 1}, SETTINGS, 1),
    "between two steps": ("after_row", {"step": 5}, SETTINGS, 5),
    "in a step": ("in_forward", {"call": 6}, SETTINGS, 6),
    "in a save": ("in_save", {"change": 7}, ("checkpoint.every=4",), None),
    "in a probe": ("in_probe", {"asked": 1}, ("eval.every=6", "eval.probe=linear", *SETTINGS), 6),
}


def cases(*signals):
    """Every moment with all signals and workers; those that only repeat a moment with other workers are long."""
    for place, moment in enumerate(MOMENTS):
        for kind, numbers in enumerate(signals):
            for workers in (0, 2):
                short = len(numbers) == 1 or kind == place % len(signals)
                marks = [] if short and workers == 2 * ((place + kind) % 2) else [pytest.mark.long]
                name = f"{moment}-{', '.join(number.name for number in numbers)}-{workers}"
                yield pytest.param(moment, numbers, workers, id=name, marks=marks)


@pytest.mark.parametrize(("moment", "numbers", "workers"), list(cases([TERM], [USR1], [INT])))
def test_a_signal_saves_and_leaves(lab, moment, numbers, workers):
    """With workers the whole group gets it, as SLURM and systemd do it."""
    name, arguments, settings, step = MOMENTS[moment]
    hit = [name, {**arguments, "numbers": numbers, "group": workers > 0}]
    child = lab.run("left", *settings, f"data.workers={workers}", code=Exit.SAVED_AFTER_SIGNAL, sabotage=[hit])
    status, rows = lab.status("left"), lab.rows("left")
    assert (status["state"], status["reason"]) == ("stopped", numbers[0].name)
    assert steps(rows) == list(range(1, status["step"] + 1))
    assert step in (None, status["step"])
    newest = lab.path("left") / "checkpoints" / "latest" / "trainer.json"
    assert json.loads(newest.read_text())["step"] == status["step"]
    assert numbers[0].name in child.out
    lab.run("left", "checkpoint.every=100")
    assert_none_lost(lab.rows("left"), lab.whole())


@pytest.mark.parametrize(("moment", "numbers", "workers"), list(cases([TERM, TERM], [INT, INT], [USR1, TERM])))
def test_a_second_signal_leaves_at_once(lab, moment, numbers, workers):
    name, arguments, settings, _ = MOMENTS[moment]
    hit = [name, {**arguments, "numbers": numbers}]
    lab.run("left", *settings, f"data.workers={workers}", code=Exit.SECOND_INTERRUPT, sabotage=[hit])
    lab.run("left", "checkpoint.every=100")
    assert_none_lost(lab.rows("left"), lab.whole())


@pytest.mark.parametrize(
    ("file", "number"), [(".tmp-config.yaml", TERM), (".tmp-config.yaml", INT), ("train.log", USR1), ("train.log", INT)]
)
def test_a_signal_while_the_run_is_set_up_ends_it_without_a_traceback(lab, file, number):
    """There is nothing to save yet."""
    child = lab.start("left", sabotage=[["at_file", {"name": file, "numbers": [number]}]])
    assert child.wait() in (-number, Exit.SECOND_INTERRUPT, Exit.SAVED_AFTER_SIGNAL)
    assert "Traceback" not in child.said()
    lab.run("left")
    assert_none_lost(lab.rows("left"), lab.whole())
