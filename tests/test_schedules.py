"""Learning rate, weight decay and momentum at a step, against published and recorded values."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from fastjepa.schedules import Schedule

RECIPE = {
    "lr": 6.25e-4, "start_lr": 2e-4, "final_lr": 1e-6, "weight_decay": 0.04, "final_weight_decay": 0.4,
    "momentum": 0.998, "final_momentum": 1.0,
}  # fmt: skip
PUBLISHED = Schedule(90_000, 12_000, **RECIPE, ipe_scale=1.25)
COOL_DOWN = Schedule(
    12_000, 0, **{**RECIPE, "lr": 5.25e-4, "final_weight_decay": 0.04, "momentum": 0.99925, "final_momentum": 0.99925},
    ipe_scale=1.25, decay="linear",
)  # fmt: skip


@pytest.mark.parametrize(
    ("count", "lr"),
    [(1, 2.000354e-4), (6000, 4.125e-4), (12000, 6.25e-4), (30000, 5.768996e-4), (60000, 3.349262e-4),
     (90000, 7.504222e-5), (112500, 1e-6)],
)  # fmt: skip
def test_published_learning_rates(count, lr):
    assert PUBLISHED.lr_at(count - 1) == pytest.approx(lr, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "decay"), [(1, 0.04), (12000, 0.050012), (30000, 0.099556), (60000, 0.238815), (90000, 0.365623)]
)
def test_published_weight_decays(count, decay):
    assert PUBLISHED.weight_decay_at(count - 1) == pytest.approx(decay, abs=1e-6)


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.998), (12000 - 6, 0.9982132), (90000 - 1, 0.9996000)])
def test_published_momenta(step, momentum):
    assert PUBLISHED.momentum_at(step) == pytest.approx(momentum, abs=1e-7)


@pytest.mark.parametrize(
    ("count", "lr"), [(1, 5.2496507e-4), (6000, 3.154e-4), (12_000, 1.058e-4), (15_000, 1e-6), (16_000, 1e-6)]
)
def test_the_published_cool_down_is_a_line_that_is_cut_off(count, lr):
    assert COOL_DOWN.lr_at(count - 1) == pytest.approx(lr, rel=1e-7)


def test_weight_decay_and_momentum_without_another_end_are_constant_to_the_bit():
    for step in (0, 1, 4567, 11_999):
        assert (COOL_DOWN.weight_decay_at(step), COOL_DOWN.momentum_at(step)) == (0.04, 0.99925)


def test_a_rate_that_grows_to_its_end_does_not_jump_there():
    for decay in ("cosine", "linear"):
        plan = Schedule(100, 10, **{**RECIPE, "lr": 1e-3, "start_lr": 1e-4, "final_lr": 1e-2}, decay=decay)
        rates = [plan.lr_at(step) for step in range(100)]
        assert rates == sorted(rates)
        assert max(after - before for before, after in itertools.pairwise(rates)) < 2e-4
        assert rates[-1] == pytest.approx(1e-2)


def test_a_constant_rate_stays_at_its_peak_after_the_warm_up():
    plan = Schedule(240_000, 12_000, **{**RECIPE, "lr": 5.25e-4, "start_lr": 1e-4}, decay="constant", ipe_scale=1.25)
    assert plan.lr_at(0) == pytest.approx(1e-4 + 4.25e-4 / 12_000, rel=1e-12)
    assert plan.lr_at(5_999) == pytest.approx(3.125e-4, rel=1e-12)
    assert [plan.lr_at(step) for step in (11_999, 12_000, 100_000, 239_999)] == [5.25e-4] * 4


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_decay_of_some_last_steps_follows_a_constant_rate(decay):
    plan = Schedule(1000, 100, **RECIPE, decay=decay, decay_steps=200)
    assert plan.lr_at(98) == Schedule(1000, 100, **RECIPE).lr_at(98) < 6.25e-4
    assert [plan.lr_at(step) for step in (99, 100, 500, 798)] == [6.25e-4] * 4
    assert plan.lr_at(799) == pytest.approx(6.25e-4, rel=1e-12)
    assert plan.lr_at(800) < 6.25e-4
    assert plan.lr_at(899) == pytest.approx(1e-6 + 0.5 * 6.24e-4, rel=1e-9)
    quarter = {"linear": 0.75, "cosine": 0.5 * (1 + math.cos(math.pi / 4))}[decay]
    assert plan.lr_at(849) == pytest.approx(1e-6 + quarter * 6.24e-4, rel=1e-9)
    assert plan.lr_at(999) == pytest.approx(1e-6, rel=1e-9)


def test_a_stretched_decay_of_some_last_steps_is_cut_off_where_the_run_ends():
    plan = Schedule(1000, 100, **RECIPE, decay="linear", decay_steps=200, ipe_scale=1.25)
    assert plan.lr_at(999) == pytest.approx(6.25e-4 - 200 / 250 * 6.24e-4, rel=1e-9)


def test_both_published_phases_in_one_run_cool_down_as_the_second_does():
    peak = {**RECIPE, "lr": 5.25e-4, "start_lr": 1e-4}
    plan = Schedule(252_000, 12_000, **peak, decay="linear", decay_steps=12_000, ipe_scale=1.25)
    assert plan.lr_at(239_999) == 5.25e-4
    for step in (0, 5_999, 11_999):
        assert plan.lr_at(240_000 + step) == pytest.approx(COOL_DOWN.lr_at(step), rel=1e-12)
    assert plan.lr_at(251_999) == pytest.approx(1.058e-4, rel=1e-9)


def test_a_line_may_rise():
    plan = Schedule(100, 0, **{**RECIPE, "lr": 1e-6, "final_lr": 1e-4}, decay="linear")
    assert [plan.lr_at(step) for step in (49, 99)] == pytest.approx([5.05e-5, 1e-4], rel=1e-9)


def test_without_a_stretch_the_schedules_end_at_their_final_values():
    plan = Schedule(1000, 100, **RECIPE)
    assert plan.lr_at(999) == pytest.approx(1e-6, rel=1e-9)
    assert plan.weight_decay_at(999) == pytest.approx(0.4, rel=1e-9)
    assert plan.momentum_at(1000) == pytest.approx(1.0, rel=1e-12)


def test_no_warm_up_starts_at_the_peak_and_warm_up_may_last_all_steps():
    assert Schedule(1000, 0, **RECIPE).lr_at(0) == pytest.approx(6.25e-4, rel=1e-4)
    whole = Schedule(10, 10, **RECIPE)
    assert [whole.lr_at(step) for step in (0, 4, 9)] == pytest.approx([2.425e-4, 4.125e-4, 6.25e-4], rel=1e-9)


def test_schedules_equal_the_recorded_ones_at_every_step(shared):
    folder = shared / "golden" / "cases"
    info, tensors = (
        json.loads((folder / "07_schedules.json").read_text()),
        load_file(folder / "07_schedules.safetensors"),
    )
    limits = {key: info["tolerance"]["default"][key] for key in ("rtol", "atol")}
    for call in info["calls"]:
        o, name = call["optimization"], call["prefix"]
        values = {key: o[key] for key in RECIPE if key in o} | dict(zip(("momentum", "final_momentum"), o["ema"]))
        plan = Schedule(o["epochs"] * o["ipe"], int(o["warmup"] * o["ipe"]), **values, ipe_scale=o["ipe_scale"])
        assert plan.planned == call["planned_steps"]
        assert plan.warmup_steps == call["warmup_steps"]
        for key, at in (("lr", plan.lr_at), ("wd", plan.weight_decay_at)):
            got = torch.tensor([at(count - 1) for count in tensors[f"{name}step"].tolist()])
            torch.testing.assert_close(got, tensors[f"{name}{key}"], **limits)
            if f"{name}beyond.{key}" in tensors:
                beyond = tensors[f"{name}beyond.{key}"]
                got = torch.tensor([at(plan.planned + i) for i in range(len(beyond))])
                torch.testing.assert_close(got, beyond, **limits)
        left = torch.tensor([1.0 - plan.momentum_at(step) for step in tensors[f"{name}momentum_index"].tolist()])
        torch.testing.assert_close(left, tensors[f"{name}one_minus_momentum"], rtol=1e-6, atol=1e-9)
        for row in call["exact"]:
            step = row["call"] - 1
            got = (plan.lr_at(step), plan.weight_decay_at(step), plan.momentum_at(step))
            assert got == pytest.approx((row["lr"], row["wd"], row["momentum"]), rel=1e-12, abs=1e-15)
