"""C3: SIGKILL at random moments, some inside a save. What is resumed has the losses of an unbroken run, bit by bit."""

import random
import signal
import time

import pytest

from tests.reliability.harness import assert_none_lost, exact

KILLS = 50
SETTINGS = ("optim.steps=40", "checkpoint.every=2")
# A save makes about twenty changes to the disk: up to two saves are finished before the kill.
CHANGES = 50


def scratch(lab, name):
    """What saves that did not finish have left."""
    return list((lab.folder / name).glob("tiny-*/checkpoints/.tmp-*"))


@pytest.mark.parametrize("inside", [False, True], ids=["anywhere", "inside a save"])
def test_killed_again_and_again_a_run_loses_nothing(lab, inside):
    want = lab.whole(*SETTINGS)
    rng = random.Random(8 + inside)
    kills = half_written = runs = 0
    while kills < KILLS // 2:
        runs += 1
        name, done = f"killed-{runs}", 0
        while True:
            kill = [["in_save", {"change": rng.randint(1, CHANGES), "numbers": [signal.SIGKILL]}]] if inside else []
            child = lab.start(name, *SETTINGS, f"data.workers={rng.choice([0, 0, 2])}", sabotage=kill)
            if not inside and kills < KILLS // 2:
                lab.wait_for(child, name, done + rng.randint(0, 5))
                time.sleep(rng.uniform(0, 0.05))
                child.send(signal.SIGKILL)
            code = child.wait()
            rows = lab.rows(name)
            # What was logged before a kill is what the unbroken run logged, too.
            assert exact(rows) == want[: len(rows)], child.said()
            if code == 0:
                break
            assert code == -signal.SIGKILL, child.said()
            kills, done = kills + 1, len(rows)
            half_written += bool(scratch(lab, name))
        assert_none_lost(lab.rows(name), want)
        assert not scratch(lab, name)
    assert half_written >= (10 if inside else 0)


@pytest.mark.parametrize("change", range(1, 25, 3))
def test_killed_at_this_change_of_the_first_save_a_run_begins_again(lab, change):
    """There is no checkpoint before this one."""
    kill = [["in_save", {"change": change, "numbers": [signal.SIGKILL]}]]
    lab.run("killed", sabotage=kill, code=-signal.SIGKILL)
    lab.run("killed")
    assert_none_lost(lab.rows("killed"), lab.whole())
