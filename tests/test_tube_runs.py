"""Runs with tube masks, from the settings to the end of a run."""

import json

import pytest
import torch

from fastjepa import configfile
from fastjepa.build import build_jepa, build_masks
from fastjepa.config import Mask, Settings
from fastjepa.configchecks import cross_checks
from fastjepa.exits import Exit
from fastjepa.masks import RandomTubeMaskGenerator
from fastjepa.plan import describe, make_plan

WAY_OUT = "; mask={kind: tube} in the place of single settings of mask drops those of a recipe"
TUBE = "mask={kind: tube, ratio: 0.7}"  # in place of the recipe's own group of mask settings: 4 of 16 cells, 2 slots


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def settings(recipe, *overrides):
    return configfile.load(recipe, [TUBE, *overrides])


# Settings


def test_kind_ratio_and_seed_reach_the_masks_and_clips_see_four_cells(recipe):
    context, target = build_masks(settings(recipe, "optim.seed=5")).draw(3, range(4))
    want = RandomTubeMaskGenerator(32, 4, 8, 2, ratio=0.7, seed=5).draw(3, range(4))
    assert torch.equal(context[0], want[0])
    assert torch.equal(target[0], want[1])
    assert (context[0].shape, target[0].shape) == ((4, 8), (4, 24))
    more, _ = build_masks(settings(recipe, "mask.ratio=0.5")).draw(3, range(4))
    assert more[0].shape == (4, 16)


def test_a_tube_run_has_one_mask_set_and_one_mask_token(recipe):
    s = settings(recipe)
    assert s.mask.number_of_sets == 1
    assert [len(side) for side in build_masks(s).draw(0, range(4))] == [1, 1]
    assert len(build_jepa(s).predictor.mask_tokens) == 1
    assert Mask().number_of_sets == 2
    assert len(build_jepa(configfile.load(recipe)).predictor.mask_tokens) == 2


def test_the_plan_tells_the_ratio_and_nothing_of_cutting(recipe):
    s = settings(recipe)
    jepa = build_jepa(s)
    plan = make_plan(s, jepa, build_masks(s), 1e12)
    assert (plan.context, plan.target) == (pytest.approx((8,)), pytest.approx((24,)))
    (line,) = (line for line in describe(s, plan, jepa) if line.startswith("tokens"))
    assert line == "tokens     32 a clip; set 0: 8 context, 24 target; tube masks, ratio 0.7"


@pytest.mark.parametrize(
    ("mask", "sentences"),
    [
        ({"ratio": 0.75}, ["mask.ratio: expected the default 0.9 with mask.kind multiblock, given 0.75"]),
        (
            {"kind": "tube", "truncation": "random"},
            ["mask.truncation: expected the default group with mask.kind tube, given random" + WAY_OUT],
        ),
        ({"kind": "tube", "group": 8}, ["mask.group: expected the default 24 with mask.kind tube, given 8" + WAY_OUT]),
        (
            {"kind": "tube", "sets": Mask().sets[:1]},
            [
                "mask.sets: expected the default with mask.kind tube, which draws one set by mask.ratio, "
                "given other sets" + WAY_OUT
            ],
        ),
        ({"kind": "tube", "ratio": 0.75}, []),
        ({"ratio": 0.9}, []),
        ({"truncation": "random", "group": 8, "sets": Mask().sets[:1]}, []),
    ],
)
def test_what_only_the_other_kind_of_mask_reads_is_a_contradiction(mask, sentences):
    found = list(cross_checks(Settings(mask=Mask(**mask))))
    assert [sentence for _, sentence in found] == sentences
    assert all("mask.kind" in keys for keys, _ in found)


@pytest.mark.parametrize(
    "overrides",
    [("mask.kind=tubes", "mask.ratio=0.5"), ("mask.kind=tube", "mask.group=none"), ("mask.kind=tube", "mask.sets=3")],
)
def test_a_value_that_is_wrong_by_itself_brings_no_second_sentence(recipe, overrides):
    with pytest.raises(configfile.SettingsError) as caught:
        configfile.load(recipe, ["mask={}", *overrides])
    assert len(caught.value.mistakes) == 1


def test_the_way_out_of_a_recipe_that_sets_masks_is_one(recipe):
    with pytest.raises(configfile.SettingsError) as caught:
        configfile.load(recipe, ["mask.kind=tube"])
    assert all(str(mistake).endswith(WAY_OUT) for mistake in caught.value.mistakes)
    assert configfile.load(recipe, ["mask={kind: tube}"]).mask == Mask(kind="tube")


def test_tubes_are_in_no_group_so_the_batch_need_not_be_a_multiple_of_it():
    assert Settings(mask=Mask(kind="tube")).mask.group == 24
    configured = Settings(mask=Mask(kind="tube"))
    odd = configured.model_copy(update={"optim": configured.optim.model_copy(update={"global_batch": 30})})
    assert not list(cross_checks(odd))
    assert len(list(cross_checks(odd.model_copy(update={"mask": Mask()})))) == 1


# Runs


def test_both_executions_give_the_same_losses(run):
    code, packed = run(TUBE, "runtime.stop_at=4", folder="packed")
    assert code == Exit.DONE
    code, reference = run(TUBE, "runtime.stop_at=4", "runtime.execution=reference", folder="reference")
    assert code == Exit.DONE
    assert len(losses(packed)) == 4
    assert losses(packed) == pytest.approx(losses(reference), rel=2e-5)


def test_stopping_early_and_going_on_equals_one_run_bitwise(run):
    _, whole = run(TUBE, folder="whole")
    for stop_at in (1, 4, 7):
        _, parts = run(TUBE, f"runtime.stop_at={stop_at}", folder="parts")
        assert len(losses(parts)) == stop_at
    _, parts = run(TUBE, folder="parts")
    assert len(losses(whole)) == 10
    assert losses(parts) == losses(whole)


def test_workers_and_accumulation_change_nothing_but_rounding(run):
    _, whole = run(TUBE, "runtime.stop_at=4", folder="whole")
    _, worker = run(TUBE, "runtime.stop_at=4", "data.workers=2", folder="worker")
    assert losses(worker) == losses(whole)
    _, parts = run(TUBE, "runtime.stop_at=4", "data.batch_size=1", folder="parts")
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-5)


def test_noised_targets_pictures_and_the_probe_work_with_tubes(run):
    code, folder = run(
        TUBE, "model.targets=noised", "model.noise=linear", "log.images=true", "eval.probe=linear", "optim.steps=2"
    )
    assert code == Exit.DONE
    assert (folder / "viz" / "masks.png").is_file()
    assert (folder / "probe" / "step-0000002.json").is_file()


def test_a_ratio_that_leaves_nothing_to_see_ends_a_run_in_one_sentence(run, capsys):
    code, folder = run("mask={kind: tube, ratio: 0.97}")
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    assert capsys.readouterr().err == ("mask ratio 0.97 leaves no context on a frame of 4x4 tokens: lower mask.ratio\n")


def test_another_kind_or_ratio_is_another_run(run):
    folders = [
        run(*overrides, "runtime.stop_at=1")[1].name for overrides in ((), (TUBE,), ("mask={kind: tube, ratio: 0.5}",))
    ]
    assert len(set(folders)) == 3
