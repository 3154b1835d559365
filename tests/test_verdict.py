"""The verdict on recorded runs: collapsing ones are called so in time, healthy ones never, and it does not waver.

`verdict_rows.json` has rows of real runs, one each tenth step (each fifth where 16 rows are all): "demo" are those of
configs/demo.yaml or configs/demo_noised.yaml, "tiny" those of the recipe in conftest.py with optim.steps=2000
optim.warmup_steps=100, changed by optim.momentum=0 optim.final_momentum=0, by optim.lr or optim.seed, as names say.
"""

import json
import math
from itertools import groupby
from pathlib import Path

import pytest

from fastjepa.alarms import Alarms
from fastjepa.verdict import Judge
from tests.test_alarms import RUNS as HEALTHY
from tests.test_alarms import rows_of

RUNS = json.loads((Path(__file__).parent / "verdict_rows.json").read_text())
BAD = {"collapsing", "collapsed", "diverged"}


def recorded(name):
    columns = RUNS[name]
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def words(rows, judge=None):
    """(step, word) of every row."""
    judge = judge or Judge(Alarms(100))
    found = []
    for row in rows:
        judge.check(row["step"], row)
        found.append((row["step"], judge.verdict.word))
    return found


def course(rows):
    """The words in their order, each once in a row."""
    return [word for word, _ in groupby(word for _, word in words(rows))]


@pytest.mark.parametrize(
    "name",
    [
        "demo, momentum 0", "demo, 100 times the learning rate", "tiny, momentum 0", "tiny, momentum 0, seed 1",
        "tiny, 1000 times the learning rate, no clipping",
    ],
)  # fmt: skip
@pytest.mark.parametrize("every", [1, 2])
def test_a_collapsed_run_is_called_collapsed_within_200_steps_and_stays_so(name, every):
    found = words(recorded(name)[every - 1 :: every])
    first = next(step for step, word in found if word == "collapsed")
    assert first <= 200
    assert {word for step, word in found if step >= first} == {"collapsed"}


def test_a_scale_collapse_is_seen_though_the_rank_stays_high():
    rows = recorded("demo, momentum 0")
    assert min(row["rank"] for row in rows) > 0.8 * rows[0]["rank"]
    assert words(rows)[-1][1] == "collapsed"


def test_a_run_that_explodes_after_it_collapsed_has_diverged():
    rows = recorded("demo, 1000 times the learning rate")
    assert course(rows) == ["early", "collapsing", "collapsed", "diverged"]
    assert max(row["loss"] for row in rows) > 5


def test_predictions_far_longer_than_targets_with_a_far_higher_loss_have_diverged():
    rows = recorded("tiny")[:10]
    rows += [row | {"step": row["step"] + 100, "loss": 9.0, "norm_ratio": 12.0} for row in rows[:3]]
    assert [word for _, word in words(rows)][9:] == ["position only", "position only", "diverged", "diverged"]


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_figures_that_are_not_finite_twice_in_a_row_have_diverged(key):
    for hole in (None, math.nan, math.inf):
        rows = recorded("tiny")[:20]
        rows[7][key] = hole
        assert "diverged" not in course(rows)
        rows[8][key] = hole
        assert next(step for step, word in words(rows) if word == "diverged") == 90


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("name", "steps"), [("tiny", 2000), ("tiny, seed 1", 2000), ("demo", 700), ("demo, noised targets", 700)]
)
def test_a_healthy_run_comes_alive_and_is_never_called_otherwise(name, steps, every):
    """The demo loses four fifths of its content before it learns, and gets it back; with noise its loss ratio waits."""
    rows = contents(rows_of("demo"))[4::5] if name == "demo" else recorded(name)
    assert rows[-1]["step"] == steps
    judge, rows = Judge(Alarms(100)), rows[every - 1 :: every]
    assert course(rows) == ["early", "position only", "alive"]
    assert not [text for row in rows for text in judge.check(row["step"], row) if "warning" in text]


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("every", [1, 5, 10])
def test_no_healthy_run_is_called_bad_however_often_it_logs(name, every):
    assert not BAD & set(course(contents(rows_of(name))[::every]))


def contents(rows):
    """With the content of a run that logged none: that of an L1 loss is the trivial one."""
    return [row | {"content": row["loss"] / row["loss_ratio"]} for row in rows]


def test_a_young_run_is_not_called_alive_by_a_lucky_batch():
    rows = recorded("tiny")[:30]
    rows[12]["loss_ratio"] = rows[20]["loss_ratio"] = 0.5
    assert "alive" not in course(rows)


def test_between_its_limits_a_verdict_stays():
    rows = [recorded("tiny")[-1] | {"step": 10 * n, "loss_ratio": 0.9 if n < 20 else 0.985} for n in range(1, 60)]
    assert course(rows) == ["early", "alive"]
    rows = [row | {"loss_ratio": 1.03 if row["step"] < 200 else 0.985} for row in rows]
    assert course(rows) == ["early", "position only"]


def test_without_a_trivial_loss_nothing_is_claimed():
    rows = [row | {"loss_ratio": None, "content": None} for row in recorded("tiny")]
    assert course(rows) == ["early", "unknown"]


def test_what_only_learns_the_position_for_long_is_stuck_and_comes_alive_when_it_learns():
    first = recorded("tiny")[15]
    rows = [first | {"step": 10 * n, "loss_ratio": 1.02 if n < 150 else 0.8} for n in range(1, 170)]
    assert course(rows) == ["early", "position only", "stuck", "alive"]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stop", [1, 4, 7, 12])
def test_a_resumed_run_has_the_verdict_of_an_unbroken_one(name, stop):
    rows = recorded(name)
    resumed = Judge(Alarms(100))
    assert resumed.replay(json.loads(json.dumps(rows[:stop]))) is None
    assert words(rows[stop:], resumed) == words(rows)[stop:]


def test_a_change_is_said_once_with_what_it_means():
    judge, said = Judge(Alarms(100)), []
    for row in recorded("demo, momentum 0"):
        said += judge.check(row["step"], row)
    verdicts = [text for text in said if text.startswith("verdict")]
    assert [text.split(": ")[0] for text in verdicts] == ["verdict    step 60", "verdict    step 90"]
    assert [text.split(": ")[1] for text in verdicts] == ["collapsing", "collapsed"]
    assert any("the targets change faster than the predictor learns" in text for text in said)
