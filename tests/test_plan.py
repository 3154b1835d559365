"""The numbers printed before a run, and the batch that `auto` comes to."""

import time

import pytest
import torch

from fastjepa.build import build_jepa, build_masks
from fastjepa.config import Data, Mask, MaskSet, Model, Optim, Runtime, Settings
from fastjepa.memory import STATE, held_bytes
from fastjepa.plan import at_batch, batch_sizes, describe, largest_fitting, make_plan
from tests.published import RECIPES, settings

PLENTY = 1e15
# Mean tokens a clip of the published masks at 224 px, cut in groups of 24: (context, target) of both sets.
PUBLISHED_TOKENS = ((365, 100), (749, 1103))


def planned(settings, usable=PLENTY, before=None):
    with torch.device("meta"):
        jepa = build_jepa(settings)
    return make_plan(settings, jepa, build_masks(settings), usable, before), jepa


class Drawn:
    """Masks of these tokens for every clip."""

    def __init__(self, clips):
        self.sets = [[torch.arange(count).expand(clips, -1) for count in side] for side in PUBLISHED_TOKENS]

    def draw(self, step, slots):
        return self.sets


@pytest.mark.parametrize(("recipe", "teraflop"), [("L", 2.516), ("H", 4.644)])
@pytest.mark.parametrize("execution", ["packed", "reference"])
def test_work_of_a_clip_is_the_published_minimum_whatever_the_execution(recipe, teraflop, execution):
    s = settings(recipe, parts=2, execution=execution)
    with torch.device("meta"):
        jepa = build_jepa(s)
    plan = make_plan(s, jepa, Drawn(24), PLENTY)
    assert plan.flop_per_clip / 1e12 == pytest.approx(teraflop, rel=0.01)
    assert plan.tokens == 1568
    assert [*plan.context, *plan.target] == pytest.approx([*PUBLISHED_TOKENS[0], *PUBLISHED_TOKENS[1]])
    assert (plan.batch_size, plan.accumulation) == (24, 2)


@pytest.mark.parametrize("recipe", ["L", "H384"])
def test_the_masks_of_a_recipe_keep_the_counted_tokens(recipe):
    plan, _ = planned(settings(recipe))
    for found, counted in zip(plan.shape.sets, RECIPES[recipe][3]):
        assert found.context == pytest.approx(counted.context, rel=0.1, abs=15)
        assert found.target == pytest.approx(counted.target, rel=0.02)
        assert found.sequence_squared == pytest.approx(counted.sequence_squared, rel=0.03)
        assert found.target_sequence == pytest.approx(counted.target_sequence, rel=0.03)
        assert found.context_squared > found.context**2
    assert plan.shape.union == pytest.approx(RECIPES[recipe][4], rel=0.02)


def small(batch_size="auto", global_batch=16, clips=1, dtype="bfloat16", execution="packed", **mask):
    return Settings(
        model=Model(name="vit_nano", predictor_depth=2, predictor_dim=48),
        mask=Mask(sets=(MaskSet(spatial_scale=(0.3, 0.3)),), **mask),
        data=Data(frames=4, crop=32, patch=8, batch_size=batch_size, clips_per_video=clips),
        optim=Optim(global_batch=global_batch, steps=100, warmup_steps=10, start_lr=1e-4, lr=1e-3, dtype=dtype),
        runtime=Runtime(execution=execution),
    )


def test_token_means_are_those_of_the_masks_that_a_run_draws():
    settings = small(group=8)
    plan, _ = planned(settings)
    draws = [build_masks(settings).draw(step, range(16 * step, 16 * step + 8)) for step in range(128)]
    for side, means in enumerate((plan.context, plan.target)):
        assert means == pytest.approx((sum(draw[side][0].shape[1] for draw in draws) / 128,))
    assert plan.tokens == 32


def test_with_one_set_the_targets_of_any_set_are_its_own():
    plan, _ = planned(small(group=8))
    assert plan.shape.union == pytest.approx(plan.target[0])


def test_without_truncation_a_clip_keeps_more_and_context_and_target_divide_it():
    cut, whole = (planned(small(group=16, truncation=truncation))[0] for truncation in ("group", "none"))
    assert whole.context[0] + whole.target[0] == pytest.approx(32)
    assert whole.shape.sets[0].sequence_squared == pytest.approx(32**2)
    assert cut.context[0] + cut.target[0] < 32
    assert whole.flop_per_clip > cut.flop_per_clip


@pytest.mark.parametrize(
    ("mask", "runs"),
    [({"group": 4}, 4), ({"group": 16}, 1), ({"group": 8, "truncation": "random"}, 2), ({"truncation": "none"}, 16)],
)
def test_a_pass_falls_into_runs_of_clips_with_equally_many_tokens(mask, runs):
    assert planned(small(batch_size=16, **mask))[0].shape.runs == runs


def test_tubes_are_one_run():
    s = Settings(
        model=Model(name="vit_nano", predictor_dim=48), mask=Mask(kind="tube", ratio=0.75),
        data=Data(frames=4, crop=32, patch=8, batch_size=8), optim=Optim(global_batch=16),
    )  # fmt: skip
    shape = planned(s)[0].shape
    assert shape.runs == 1
    assert [(t.context, t.target) for t in shape.sets] == [(8, 24)]


@pytest.mark.parametrize("usable", [0, 1e7, 1e8, PLENTY])
@pytest.mark.parametrize("global_batch", [1, 12, 96, 97, 100])
def test_an_automatic_batch_divides_the_global_batch_and_grows_with_the_memory(usable, global_batch):
    settings = small(global_batch=global_batch, group=1)
    plan, _ = planned(settings, usable)
    assert plan.batch_size * plan.accumulation == global_batch
    largest = {1: 1, 12: 12, 96: 48, 97: 1, 100: 50}[global_batch]
    if usable in (0, PLENTY):
        assert plan.batch_size == (largest if usable else 1)
    assert plan.batch_size == 1 or sum(plan.held.values()) <= usable
    larger = [size for size in batch_sizes(settings) if plan.batch_size < size <= largest]
    assert not larger or sum(held_bytes(at_batch(settings, plan.shape, larger[0])).values()) > usable


@pytest.mark.parametrize("usable", [0, 1e7, 1e8, PLENTY])
@pytest.mark.parametrize(("global_batch", "clips", "largest"), [(12, 3, 12), (96, 2, 48), (100, 4, 20), (144, 72, 72)])
def test_an_automatic_batch_holds_whole_videos(usable, global_batch, clips, largest):
    plan, _ = planned(small(global_batch=global_batch, clips=clips, group=1), usable)
    assert plan.batch_size * plan.accumulation == global_batch
    assert plan.batch_size % clips == 0
    if usable in (0, PLENTY):
        assert plan.batch_size == (largest if usable else clips)
    assert plan.batch_size == clips or sum(plan.held.values()) <= usable


def test_the_batch_that_a_run_began_with_is_kept_if_it_holds_whole_videos():
    settings = small(global_batch=24, clips=4, group=1)
    assert planned(settings, before=8)[0].batch_size == 8
    assert planned(settings, usable=0, before=8)[0].batch_size == 8
    assert planned(settings, before=6)[0].batch_size % 4 == 0
    assert planned(settings, before=16)[0].batch_size == 24  # not a divisor


def test_the_largest_batch_that_fits_is_found_without_a_cap():
    settings = small(global_batch=960, group=1)
    plan, _ = planned(settings)
    sizes = batch_sizes(settings)
    assert sizes[0] == 1
    assert sizes[-1] == 960
    assert all(960 % size == 0 for size in sizes)
    assert largest_fitting(settings, plan.shape, PLENTY, sizes) == 960
    limit = sum(held_bytes(at_batch(settings, plan.shape, 320)).values())
    assert largest_fitting(settings, plan.shape, limit, sizes) == 320
    assert largest_fitting(settings, plan.shape, limit - 1, sizes) == 240
    assert largest_fitting(settings, plan.shape, 0, sizes) is None


@pytest.mark.parametrize("truncation", ["group", "random", "none"])
def test_token_means_of_several_clips_are_those_of_their_videos(truncation):
    """The 16 videos of a step have 16 slots, be they 16 or 64 clips."""
    videos = planned(small(group=8, truncation=truncation))[0]
    clips = planned(small(group=8, truncation=truncation, global_batch=64, clips=4))[0]
    assert (clips.context, clips.target, clips.flop_per_clip) == (videos.context, videos.target, videos.flop_per_clip)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({}, "clips      4 frames of 32 px at stride 4"),
        ({"duration": 2.5}, "clips      4 frames of 32 px over 2.5 s at any frame rate"),
        (
            {"clips_per_video": 2, "filter_short": True},
            "clips      4 frames of 32 px at stride 4; 2 of each video with the same masks (8 videos a step); "
            "shorter videos are replaced",
        ),
    ],
)
def test_the_description_says_what_a_clip_is(data, line):
    settings = small(group=8)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update=data)})
    plan, jepa = planned(settings)
    lines = describe(settings, plan, jepa)
    assert line in lines
    assert any("group of 8 videos" in text for text in lines) == ("clips_per_video" in data)


def test_a_given_batch_is_taken_whether_it_fits_or_not():
    for usable in (0, PLENTY):
        plan, _ = planned(small(batch_size=4), usable)
        assert (plan.batch_size, plan.accumulation) == (4, 4)


def test_state_is_what_does_not_follow_the_batch():
    plan, jepa = planned(small(dtype="float32", batch_size=4))
    frozen = sum(p.nbytes for p in jepa.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in jepa.parameters() if p.requires_grad)
    assert plan.state_bytes == 4 * trained + frozen
    assert plan.state_bytes == sum(plan.held[name] for name in STATE)
    twice = planned(small(dtype="float32", batch_size=8))[0]
    assert twice.state_bytes == plan.state_bytes
    assert twice.held["activations"] == 2 * plan.held["activations"]


@pytest.mark.parametrize(
    ("dtype", "execution", "shape"),
    [
        ("bfloat16", "packed", (2, True, False)),
        ("bfloat16", "reference", (2, False, False)),
        ("float16", "packed", (2, False, True)),
        ("float32", "packed", (4, False, False)),
    ],
)
def test_only_the_packed_bf16_step_has_masters(dtype, execution, shape):
    step = planned(small(dtype=dtype, execution=execution))[0].shape
    assert (step.value_bytes, step.masters, step.loss_scaled) == shape
    assert step.packed == (execution == "packed")


def test_erased_boxes_need_clips_of_floats():
    s = small()
    erased = s.model_copy(update={"data": s.data.model_copy(update={"erase": 0.25})})
    assert (planned(s)[0].shape.pixel_bytes, planned(erased)[0].shape.pixel_bytes) == (1, 4)


@pytest.mark.parametrize(("group", "line"), [(24, "group of 16 (the whole batch)"), (8, "group of 8")])
def test_the_description_says_when_a_group_is_the_whole_batch(group, line):
    settings = small(group=group, batch_size=8)
    plan, jepa = planned(settings)
    lines = describe(settings, plan, jepa)
    tokens = next(text for text in lines if text.startswith("tokens"))
    assert tokens.endswith(f"truncation group, {line}")
    assert any("16 clips a step = 8 x 2 accumulated" in text for text in lines)
    assert any("lr 0.00019 -> 0.001 -> 1e-06" in text for text in lines)


def test_counting_the_tokens_of_large_groups_takes_a_moment_only():
    began = time.process_time()
    planned(small(global_batch=3072, group=3072))
    planned(small(global_batch=3072, truncation="none"))
    assert time.process_time() - began < 5


def lines_of(**groups):
    """What is printed of a small run with these settings of its groups, by the first word of each line."""
    values = small().model_dump(by_alias=True)
    for name, changes in groups.items():
        values[name] |= changes
    plan, jepa = planned(s := Settings.model_validate(values))
    return {line.split()[0]: line for line in describe(s, plan, jepa)}


def test_the_model_line_names_layers_levels_and_what_the_context_loss_comes_to():
    model = {"mlp": "swiglu", "predictor_mlp": "swiglu_full", "drop_path": 0.1, "levels": "deep"}
    line = lines_of(model=model, loss={"context": 0.5, "context_full": 1000})["model"]
    assert ", mlp: swiglu, predictor_mlp: swiglu_full, drop path up to 0.1, of 3 levels, context tokens too" in line
    assert "(weight 0.0495 at the last step, of 0.5)" in line
    assert "(weight 0.5)" in lines_of(loss={"context": 0.5, "context_full": 99})["model"]
    assert ", " not in lines_of()["model"].partition("mask_tokens")[2]


def test_the_schedule_line_has_a_peak_only_where_the_run_comes_to_it():
    falling = {"warmup_steps": 0, "decay": "linear", "lr": 1e-3, "final_lr": 1e-5}
    assert "lr 0.00099 -> 1e-05 (" in lines_of(optim=falling)["schedule"]
    assert "lr 0.001 -> 0.001 -> 1e-05 (" in lines_of(optim=falling | {"decay_steps": 50})["schedule"]
    assert "lr 0.00019 -> 0.001 -> 1e-05 (" in lines_of(optim=falling | {"warmup_steps": 10})["schedule"]


def test_clips_of_one_frame_have_no_stride():
    path = {"a": {"frames": 4, "fps": 6}, "b": {"frames": 1}}
    assert "single frames of 32 px" in lines_of(data={"path": {"a": {"frames": 1}}, "frames": 2, "tubelet": 2})["clips"]
    assert "4 frames at 6 frames/s or single frames of 32 px" in lines_of(data={"path": path})["clips"]
