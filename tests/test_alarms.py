"""Healthy runs raise no alarm; collapse, spikes and learning nothing do, once, and their end is said."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from fastjepa.alarms import Alarms
from fastjepa.health import measure

# Rows of real runs: the demo (configs/demo.yaml, every second step), and the recipe of conftest.py with three seeds.
RUNS = json.loads((Path(__file__).parent / "healthy_rows.json").read_text())
WARM_UP = {"demo": 300}


def rows_of(name):
    columns = RUNS[name]
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def healthy(count, seed=0, first=1, **changed):
    """Rows of a run that learns, every tenth step."""
    rng = random.Random(seed)
    return [
        {
            "step": 10 * number,
            "loss": 0.4 + 0.02 * rng.gauss(0, 1),
            "loss_ratio": 0.8 + 0.02 * rng.gauss(0, 1),
            "rank": 60 + 2 * rng.gauss(0, 1),
            "feature_std": 0.9 + 0.02 * rng.gauss(0, 1),
            "grad_norm": 0.5 * math.exp(0.3 * rng.gauss(0, 1)),
            **changed,
        }
        for number in range(first, first + count)
    ]


def follow(rows, alarms=None):
    """(step, kind, severe, sentence) of all alarms."""
    alarms = alarms or Alarms(100)
    return [
        (row["step"], alarm.kind, alarm.severe, alarm.sentence)
        for row in rows
        for alarm in alarms.check(row["step"], row)
    ]


# Healthy runs


@pytest.mark.parametrize("name", RUNS)
def test_a_healthy_run_raises_no_alarm(name):
    rows = rows_of(name)
    assert len(rows) >= 300
    assert follow(rows, Alarms(WARM_UP.get(name, 60))) == []


@pytest.mark.parametrize("seed", range(10))
def test_noise_around_healthy_values_raises_no_alarm(seed):
    assert follow(healthy(300, seed)) == []


def test_the_recorded_demo_does_what_made_the_limits():
    """Its loss falls to a fifth and rises again, and so does the deviation; the rank settles far below its start."""
    rows = rows_of("demo")
    losses = [row["loss"] for row in rows]
    assert min(losses) < 0.2 * losses[0]
    assert losses[-1] > 2 * min(losses)
    assert min(row["feature_std"] for row in rows) < 0.3 * rows[0]["feature_std"]
    assert rows[-1]["rank"] < 0.5 * max(row["rank"] for row in rows)


def test_a_slow_decline_of_a_fifth_raises_no_alarm():
    rows = healthy(300)
    for number, row in enumerate(rows):
        for key in ("rank", "feature_std", "loss"):
            row[key] *= 1 - 0.2 * number / 300
    assert follow(rows) == []


def test_a_loss_that_rises_slowly_raises_no_alarm():
    rows = healthy(300)
    for number, row in enumerate(rows):
        row["loss"] *= 1 + number / 100
    assert follow(rows) == []


# Collapse


def features(kind, clips=8, tokens=32, width=64):
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(clips, tokens, width, generator=generator)
    if kind == "constant":
        made = torch.randn(width, generator=generator) + 1e-4 * made
    elif kind == "rank 4":
        made = torch.randn(clips, tokens, 4, generator=generator) @ torch.randn(4, width, generator=generator)
    return torch.nn.functional.layer_norm(made, (width,))


def measured(kind):
    return measure(features(kind), [features(kind)], 1.0)


def row_of(kind, step):
    """What a run would log of such features."""
    health = measured(kind)
    row = healthy(1, first=step // 10)[0]
    return row | {"rank": health.rank.item(), "feature_std": health.feature_std.item()}


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(("kind", "key"), [("constant", "standard deviation"), ("rank 4", "effective rank")])
def test_forced_collapse_is_said_within_two_checks(kind, key, learns):
    rows = [row_of("healthy", 10 * number) for number in range(1, 31)]
    if not learns:
        rows = [row | {"loss_ratio": 1.01} for row in rows]
    assert follow(rows) == []
    found = follow([*rows, *(row_of(kind, 10 * number) | {"loss": 0.05} for number in range(31, 60))])
    step, alarm, severe, sentence = found[0]
    assert (step, alarm) == (320, "collapse")
    assert sentence.startswith("warning: step 320: the target features ")
    assert f"their {key} is " in sentence
    assert "the loss that fell from 0.4" in sentence
    assert "checkpoint" in sentence
    assert severe == ("have collapsed" in sentence)
    assert {severe for _, alarm, severe, _ in found if alarm == "collapse"} == {True}
    assert len([one for one in found if one[1] == "collapse"]) == 1


def test_features_that_are_all_the_same_may_have_a_high_rank():
    """What is left is rounding, which has all directions: that is why the deviation is watched too."""
    assert measured("constant").rank.item() > 40
    assert measured("constant").feature_std.item() < 1e-3
    assert measured("healthy").feature_std.item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("key", ["rank", "feature_std"])
def test_a_collapse_is_said_when_it_begins_when_it_is_there_and_when_it_is_over(key):
    rows = healthy(80)
    top = max(row[key] for row in rows)
    shares = {30: 0.29, 40: 0.35, 45: 0.25, 50: 0.09, 55: 0.12, 58: 0.05, 60: 0.4, 65: 0.6}
    for number, row in enumerate(rows):
        share = next((shares[start] for start in sorted(shares, reverse=True) if number >= start), None)
        if share is not None:
            row[key] = share * top
    found = follow(rows)
    assert [(step, kind, severe) for step, kind, severe, _ in found] == [
        (320, "collapse", False), (520, "collapse", True), (670, "collapse", False)
    ]  # fmt: skip
    for (*_, sentence), word in zip(found, ("are collapsing", "have collapsed", "have recovered")):
        assert f"the target features {word}: their " in sentence
    assert "29% of the" in found[0][3]
    assert "no progress" not in found[0][3]


def test_one_odd_batch_is_no_collapse():
    rows = healthy(60)
    rows[30]["rank"] = rows[40]["feature_std"] = 0.01
    assert follow(rows) == []


def test_a_run_that_collapsed_before_it_learnt_has_not_recovered_by_staying_there():
    rows = healthy(400, loss_ratio=1.01)
    for row in rows[30:]:
        row["rank"] = 3.0
    assert [(step, severe) for step, kind, severe, _ in follow(rows) if kind == "collapse"] == [(320, True)]


@pytest.mark.parametrize(("first", "said"), [(100, []), (140, [(1420, False)])])
def test_where_nothing_says_that_a_run_learns_it_is_taken_to_after_a_while(first, said):
    """One clip a step gives no loss ratio. A rank of a fifth may be what a young encoder comes to; later it is not."""
    rows = healthy(170, loss_ratio=None)
    for row in rows[first:]:
        row["rank"] /= 5
    assert [(step, severe) for step, _, severe, _ in follow(rows)] == said


# Spikes


@pytest.mark.parametrize(("key", "name", "factor"), [("loss", "the loss", 3), ("grad_norm", "the gradient norm", 20)])
def test_a_spike_is_said_once_and_so_is_its_end(key, name, factor):
    rows = healthy(100)
    for row in rows[50:54]:
        row[key] *= factor
    found = follow(rows)
    assert [(step, kind) for step, kind, *_ in found] == [(510, "spike"), (550, "spike")]
    assert f"warning: step 510: {name} jumped to {rows[50][key]:.4g}" in found[0][3]
    assert f"{name} is back at {rows[54][key]:.4g}" in found[1][3]


def test_a_loss_that_jumps_with_the_content_of_the_targets_is_no_spike():
    rows = healthy(100, content=0.2)
    for row in rows[50:]:
        row["loss"], row["content"] = 3 * row["loss"], 0.5
    assert follow(rows) == []
    for row in rows[50:]:
        row["content"] = 0.2
    assert next(kind for _, kind, *_ in follow(rows)) == "spike"


def test_a_second_spike_is_said_again():
    rows = healthy(100)
    rows[50]["loss"] = rows[60]["loss"] = 2.0
    assert [step for step, *_ in follow(rows)] == [510, 520, 610, 620]


def test_the_first_rows_spike_as_they_like():
    rows = healthy(10)
    for row in rows:
        row["loss"] *= 1 + row["step"]
    rows[-1]["loss"] = 1e6
    assert follow(rows) == []


def test_a_level_that_stays_is_the_usual_one_in_the_end():
    rows = healthy(200)
    for row in rows[100:]:
        row["loss"] += 3.0
    found = follow(rows)
    assert [step for step, *_ in found] == [1010, 1310]
    assert "stays at 3." in found[1][3]


# Learning nothing


def test_a_loss_that_stays_trivial_is_said_after_the_warm_up_and_a_thousand_steps():
    rows = healthy(300, loss_ratio=1.02)
    rows += healthy(5, first=301, loss_ratio=0.98) + healthy(5, first=306, loss_ratio=0.9)
    found = follow(rows, Alarms(500))
    assert [(step, kind, severe) for step, kind, severe, _ in found] == [
        (1510, "trivial", False),
        (3070, "trivial", False),
    ]
    assert "for 1000 steps" in found[0][3]


def test_a_long_warm_up_has_long_patience():
    rows = healthy(800, loss_ratio=1.02)
    assert [step for step, *_ in follow(rows, Alarms(3000))] == [6010]


def test_a_single_better_row_starts_anew_and_few_rows_are_no_evidence():
    rows = healthy(250, loss_ratio=1.02)
    rows[100]["loss_ratio"] = 0.99
    assert [step for step, *_ in follow(rows)] == [2020]
    rare = [row | {"step": 10 * row["step"]} for row in healthy(40, loss_ratio=1.02)]
    assert [step for step, *_ in follow(rare)] == [2100]


# Rows with holes, and a resume


@pytest.mark.parametrize("hole", [None, math.nan, math.inf, -math.inf, "absent"])
def test_what_a_row_lacks_is_passed_over(hole):
    keys = ("loss", "loss_ratio", "rank", "feature_std", "grad_norm")
    plain, holes = troubled(), []
    for row in plain:
        empty = {"step": row["step"]} | ({} if hole == "absent" else dict.fromkeys(keys, hole))
        holes += [row, empty]
    assert follow(holes) == follow(plain)
    assert follow(plain)


def troubled():
    """A run with everything: it learns nothing, spikes, collapses and recovers."""
    rows = healthy(150, loss_ratio=1.05) + healthy(150, seed=1, first=151)
    rows[40]["loss"], rows[200]["grad_norm"] = 5.0, 80.0
    for row in rows[170:190]:
        row["rank"] = 15.0
    for row in rows[180:190]:
        row["rank"] = 2.0
    for row in rows[240:260]:
        row["feature_std"] = 0.01
    return rows


@pytest.mark.parametrize("stop", [0, 1, 5, 40, 41, 120, 170, 171, 172, 181, 190, 200, 241, 299])
def test_a_resumed_run_says_what_an_unbroken_one_says(stop):
    rows = troubled()
    whole = follow(rows)
    assert len(whole) >= 10
    resumed = Alarms(100)
    # As they come out of metrics.jsonl.
    kept = [json.loads(json.dumps(row)) for row in rows[:stop]]
    assert resumed.replay(kept) is None
    assert follow(rows[stop:], resumed) == [one for one in whole if one[0] > 10 * stop]


@pytest.mark.parametrize(("stop", "collapsed"), [(172, False), (181, False), (182, True), (190, True), (195, False)])
def test_a_replay_knows_whether_the_features_have_collapsed(stop, collapsed):
    """It says nothing, so whoever wants to end such a run must be able to ask."""
    alarms = Alarms(100)
    alarms.replay(troubled()[:stop])
    assert alarms.collapsed == collapsed
