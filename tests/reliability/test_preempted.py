"""A run that is preempted again and again, and started again with the same command, reaches its end."""

import random
import signal
import time

import pytest

from fastjepa.exits import Exit
from tests.reliability.harness import assert_none_lost, steps

SETTINGS = ("optim.steps=40", "checkpoint.every=100", "data.workers=1")


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, pytest.param(("optim.steps=400", *SETTINGS[1:]), marks=pytest.mark.long)],
    ids=["short", "long"],
)
def test_under_random_sigterm_a_run_reaches_its_end(lab, settings):
    """Never a save but those that the signals ask for; each start goes on where the last one has left."""
    rng = random.Random(3)
    left = 0
    while True:
        child, before = lab.start("preempted", *settings), len(lab.rows("preempted"))
        # Not by time alone: on a slow machine a run could be preempted for ever before its first step.
        lab.wait_for(child, "preempted", before + 1)
        time.sleep(rng.uniform(0, 0.15))
        child.send(signal.SIGTERM)
        code, rows = child.wait(), lab.rows("preempted")
        assert steps(rows) == list(range(1, len(rows) + 1)), child.said()
        # A signal in the last step leaves a start that has only the end to see to.
        assert len(rows) > before or before == len(lab.whole(*settings))
        if lab.status("preempted")["state"] == "done":
            # A signal that comes when all is done may still end the process in its own way.
            assert code in (Exit.DONE, -signal.SIGTERM), child.said()
            break
        assert code == Exit.SAVED_AFTER_SIGNAL, child.said()
        status = lab.status("preempted")
        assert (status["state"], status["step"]) == ("stopped", len(rows))
        left += 1
    assert left >= 3
    assert_none_lost(lab.rows("preempted"), lab.whole(*settings))
