"""The time left, by a clock that the test moves: nothing here depends on how fast a machine is."""

import random

import pytest

from fastjepa.eta import MOST_POINTS, Aside, Eta


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def play(steps, seconds, *, log_every=10, probe=(0, 0.0), save=(0, 0.0), final_probe=0.0, guess=0.0, first=0):
    """(seconds left as told, seconds left in truth) at every log step of a run; `seconds(step)` is what one takes."""
    clock = Clock()
    asides = {"probe": Aside(probe[0], bool(final_probe), guess), "save": Aside(save[0], False)}
    eta = Eta(steps, asides, clock)
    told = {}
    for step in range(first + 1, steps + 1):
        clock.now += seconds(step)
        if step == first + 1:
            eta.stepped(step)
        if step % log_every == 0:
            eta.stepped(step)
            told[step] = (eta.left(step), clock.now)
        for kind, (every, cost) in (("save", save), ("probe", probe)):
            if every and step % every == 0 and step < steps:
                with eta.aside(kind):
                    clock.now += cost
    end = clock.now + final_probe
    return {step: (left, end - then) for step, (left, then) in told.items()}


def noisy(mean, spread, seed=0):
    draw = random.Random(seed)
    return lambda step: mean * (1 + spread * draw.uniform(-1, 1))


def stalls(step):
    return 0.5 + (6.0 if step % 37 == 0 else 0.0)


def compiles(step):
    return 180.0 if step == 1 else 0.4


RUNS = {
    "steady": {"seconds": lambda step: 0.5},
    "a first step that compiles": {"seconds": compiles},
    "noise": {"seconds": noisy(0.5, 0.8)},
    "stalls now and then": {"seconds": stalls},
    "probes": {"seconds": lambda step: 0.5, "probe": (50, 30.0), "final_probe": 30.0},
    "probes, saves, noise": {
        "seconds": noisy(0.3, 0.5, seed=1), "probe": (80, 20.0), "save": (25, 3.0), "final_probe": 20.0,
    },
    "slow for a while at the start": {"seconds": lambda step: 2.0 if step <= 30 else 0.5},
    "resumed in the middle": {"seconds": noisy(0.5, 0.3), "first": 500},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_after_a_tenth_the_time_left_is_right_within_a_fifth(name):
    told = play(1000, **RUNS[name])
    tenth = RUNS[name].get("first", 0) + (1000 - RUNS[name].get("first", 0)) // 10
    later = {step: both for step, both in told.items() if tenth <= step <= 900}
    assert len(later) >= 30
    for step, (left, truth) in later.items():
        assert left == pytest.approx(truth, rel=0.2), step


def test_a_lasting_slow_down_is_seen_once_it_was_half_of_the_run():
    told = play(1000, lambda step: 0.5 if step <= 200 else 1.5)
    for step in range(410, 1000, 10):
        left, truth = told[step]
        assert left == pytest.approx(truth, rel=0.01)


def test_a_probe_that_was_never_seen_takes_as_long_as_was_guessed():
    told = play(100, lambda step: 0.5, probe=(0, 0.0), final_probe=40.0, guess=80.0)
    for left, truth in told.values():
        assert left == pytest.approx(truth)


def test_what_is_left_is_exact_to_the_last_probe_and_checkpoint():
    told = play(100, lambda step: 0.5, log_every=1, probe=(20, 7.0), save=(30, 2.0), final_probe=7.0)
    for step in range(31, 101):
        left, truth = told[step]
        # A log step comes before the save and the probe of its own step.
        assert left == pytest.approx(truth), step


def test_nothing_is_told_before_two_points_are_known():
    clock = Clock()
    eta = Eta(100, {}, clock)
    assert eta.left(0) is None
    clock.now += 50
    eta.stepped(1)
    eta.stepped(1)  # the first step may be a log step too
    assert eta.left(1) is None
    clock.now += 2
    eta.stepped(2)
    assert eta.left(2) == pytest.approx(98 * 2)


def test_steps_that_are_forgotten_leave_the_rate_of_those_before():
    clock = Clock()
    eta = Eta(100, {}, clock)
    for step in range(1, 11):
        clock.now += 1
        eta.stepped(step)
    clock.now += 500  # ten steps under the profiler
    eta.forget()
    eta.stepped(20)
    assert eta.left(20) == pytest.approx(80)
    clock.now += 20
    eta.stepped(30)
    assert eta.left(30) == pytest.approx(140)


def test_a_long_run_keeps_few_points_and_is_told_right():
    clock = Clock()
    eta = Eta(100_000, {}, clock)
    for step in range(1, 50_001):
        clock.now += 0.25
        eta.stepped(step)
    assert len(eta._points) <= MOST_POINTS
    assert eta.left(50_000) == pytest.approx(12_500)
