"""Health figures on features whose answer is known, and the numbers printed before a run."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastjepa.build import build_jepa, build_masks
from fastjepa.config import Data, Mask, MaskSet, Model, Optim, Settings
from fastjepa.health import MOST_ROWS, effective_rank, measure
from fastjepa.models import build_vit
from fastjepa.plan import describe, make_plan, peak_flops

CPU = torch.device("cpu")
# Mean tokens a clip of the published masks at 224 px: (context, target) of both sets, cut in groups of 24.
PUBLISHED_TOKENS = ((365, 100), (749, 1103))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Effective rank


def test_features_in_four_directions_have_rank_four():
    basis, _ = torch.linalg.qr(normal(64, 4, seed=1))
    assert effective_rank(normal(2000, 4) @ basis.T).item() == pytest.approx(4, rel=0.05)


def test_isotropic_features_have_the_rank_of_their_width():
    assert effective_rank(normal(8000, 48)).item() == pytest.approx(48, rel=0.02)


def test_the_rank_is_the_exponential_of_the_entropy_of_the_singular_values():
    left, _ = torch.linalg.qr(normal(500, 3) - normal(500, 3).mean(dim=0))
    left, _ = torch.linalg.qr(left - left.mean(dim=0))
    right, _ = torch.linalg.qr(normal(32, 3, seed=1))
    shares = torch.tensor([0.7, 0.2, 0.1])
    want = math.exp(-sum(p * math.log(p) for p in shares.tolist()))
    rows = left @ torch.diag(shares * 50) @ right.T
    assert effective_rank(rows + 3.0).item() == pytest.approx(want, rel=0.02)


def test_equal_features_have_rank_one_and_no_scale_matters():
    assert effective_rank(torch.ones(100, 16)).item() == 1
    rows = normal(400, 16)
    assert effective_rank(rows * 1e-3).item() == pytest.approx(effective_rank(rows).item(), rel=1e-4)


@pytest.mark.parametrize(("rows", "stride"), [(MOST_ROWS, 1), (2 * MOST_ROWS - 1, 2), (2 * MOST_ROWS + 2, 3)])
def test_at_most_8192_rows_evenly_spread_are_used(rows, stride):
    features = normal(rows, 4) * torch.linspace(1, 3, rows).unsqueeze(1) ** torch.arange(4)
    used = features[::stride]
    assert len(used) <= MOST_ROWS
    assert torch.equal(effective_rank(features), effective_rank(used.clone()))


def test_features_that_are_not_finite_have_no_rank():
    rows = normal(100, 8)
    rows[3, 2] = math.inf
    assert math.isnan(effective_rank(rows).item())


# measure


def test_targets_that_depend_on_the_position_only_are_predicted_trivially():
    targets = normal(1, 20, 16).expand(6, 20, 16)
    health = measure(targets, 1.0)
    assert health.trivial_loss.item() == pytest.approx(0, abs=1e-6)
    assert health.rank.item() > 5


def test_the_trivial_loss_of_a_single_clip_says_nothing():
    assert measure(normal(1, 20, 16), 1.0).trivial_loss.item() == 0


@pytest.mark.parametrize(("exponent", "value"), [(1.0, 0.798), (2.0, 0.5)])
def test_the_trivial_loss_of_unrelated_clips_is_that_of_normal_features(exponent, value):
    assert measure(normal(64, 40, 32), exponent).trivial_loss.item() == pytest.approx(value, rel=0.02)


def test_a_loss_ratio_of_one_is_the_best_prediction_that_knows_the_position_only():
    targets = normal(1, 30, 24) + 0.3 * normal(32, 30, 24, seed=1)
    trivial = measure(targets, 2.0).trivial_loss
    position_only = ((targets.mean(dim=0) - targets).square().mean() / 2).item()
    assert position_only / trivial.item() == pytest.approx(31 / 32, rel=1e-5)  # of the infinite batch
    blind = ((targets.mean(dim=(0, 1)) - targets).square().mean() / 2).item()
    assert blind / trivial.item() > 5
    informed = ((targets + 0.1 * normal(32, 30, 24, seed=2) - targets).square().mean() / 2).item()
    assert informed / trivial.item() < 0.2


# plan


def stand_in(name):
    """The shapes of a large encoder: one block, listed as often as the real one has blocks."""
    encoder = build_vit(name, num_frames=16, uniform_power=True, depth=1)
    encoder.blocks = nn.ModuleList([encoder.blocks[0]] * {"vit_large": 24, "vit_huge": 32}[name])
    return encoder


@pytest.mark.parametrize(("name", "teraflop"), [("vit_large", 2.516), ("vit_huge", 4.644)])
def test_work_of_a_clip_is_the_published_minimum(name, teraflop):
    settings = Settings(model=Model(name=name), data=Data(batch_size=24))
    sets = [[torch.zeros(24, count, dtype=torch.int64) for count in side] for side in PUBLISHED_TOKENS]
    jepa = nn.ModuleDict({"encoder": stand_in(name)})
    jepa = SimpleNamespace(encoder=jepa["encoder"], parameters=jepa.parameters)
    plan = make_plan(settings, jepa, SimpleNamespace(draw=lambda step, slots: sets), CPU)
    assert plan.flop_per_clip / 1e12 == pytest.approx(teraflop, rel=0.01)
    assert plan.tokens == 1568
    assert [*plan.context, *plan.target] == pytest.approx([*PUBLISHED_TOKENS[0], *PUBLISHED_TOKENS[1]])
    assert (plan.batch_size, plan.accumulation) == (24, 128)


def small(batch_size="auto", global_batch=16, clips=1, **mask):
    return Settings(
        model=Model(name="vit_nano", predictor_depth=2, predictor_dim=48),
        mask=Mask(sets=(MaskSet(spatial_scale=(0.3, 0.3)),), **mask),
        data=Data(frames=4, crop=32, patch=8, batch_size=batch_size, clips_per_video=clips),
        optim=Optim(global_batch=global_batch, steps=100, warmup_steps=10, start_lr=1e-4, lr=1e-3),
    )


def planned(settings):
    jepa = build_jepa(settings)
    return make_plan(settings, jepa, build_masks(settings), CPU), jepa


def test_token_means_are_those_of_the_masks_that_a_run_draws():
    settings = small(group=8)
    plan, _ = planned(settings)
    draws = [build_masks(settings).draw(step, range(16 * step, 16 * step + 8)) for step in range(32)]
    for side, means in enumerate((plan.context, plan.target)):
        assert means == pytest.approx((sum(draw[side][0].shape[1] for draw in draws) / 32,))
    assert plan.tokens == 32


def test_without_truncation_a_clip_keeps_more_and_context_and_target_divide_it():
    cut, whole = (planned(small(group=16, truncation=truncation))[0] for truncation in ("group", "none"))
    assert whole.context[0] + whole.target[0] == pytest.approx(32)
    assert cut.context[0] + cut.target[0] < 32
    assert whole.flop_per_clip > cut.flop_per_clip


@pytest.mark.parametrize("memory", [0, 10**8, 10**9, 10**12])
@pytest.mark.parametrize("global_batch", [1, 12, 96, 97, 100])
def test_an_automatic_batch_divides_the_global_batch_and_grows_with_the_memory(monkeypatch, memory, global_batch):
    monkeypatch.setattr("fastjepa.plan._memory", lambda device: float(memory))
    plan, _ = planned(small(global_batch=global_batch, group=1))
    assert plan.batch_size * plan.accumulation == global_batch
    largest = {1: 1, 12: 12, 96: 48, 97: 1, 100: 50}[global_batch]
    if memory in (0, 10**12):
        assert plan.batch_size == (largest if memory else 1)
    assert plan.batch_size == 1 or plan.batch_size * plan.activation_bytes_per_clip < memory


@pytest.mark.parametrize("memory", [0, 10**8, 10**9, 10**12])
@pytest.mark.parametrize(("global_batch", "clips", "largest"), [(12, 3, 12), (96, 2, 48), (100, 4, 20), (144, 72, 72)])
def test_an_automatic_batch_holds_whole_videos(monkeypatch, memory, global_batch, clips, largest):
    monkeypatch.setattr("fastjepa.plan._memory", lambda device: float(memory))
    plan, _ = planned(small(global_batch=global_batch, clips=clips, group=1))
    assert plan.batch_size * plan.accumulation == global_batch
    assert plan.batch_size % clips == 0
    if memory in (0, 10**12):
        assert plan.batch_size == (largest if memory else clips)
    assert plan.batch_size == clips or plan.batch_size * plan.activation_bytes_per_clip < memory


def test_the_batch_that_a_run_began_with_is_kept_if_it_holds_whole_videos():
    settings = small(global_batch=24, clips=4, group=1)
    jepa, masks = build_jepa(settings), build_masks(settings)
    assert make_plan(settings, jepa, masks, CPU, before=8).batch_size == 8
    assert make_plan(settings, jepa, masks, CPU, before=6).batch_size % 4 == 0


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


def test_a_given_batch_is_taken():
    plan, _ = planned(small(batch_size=4))
    assert (plan.batch_size, plan.accumulation) == (4, 4)


def test_state_counts_weights_gradients_and_moments_once_and_the_target_encoder_as_weights():
    plan, jepa = planned(small())
    frozen = sum(p.nbytes for p in jepa.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in jepa.parameters() if p.requires_grad)
    assert plan.state_bytes == 4 * trained + frozen


@pytest.mark.parametrize(("group", "line"), [(24, "group of 16 (the whole batch)"), (8, "group of 8")])
def test_the_description_says_when_a_group_is_the_whole_batch(group, line):
    settings = small(group=group, batch_size=8)
    plan, jepa = planned(settings)
    lines = describe(settings, plan, jepa)
    tokens = next(text for text in lines if text.startswith("tokens"))
    assert tokens.endswith(f"truncation group, {line}")
    assert any("16 clips a step = 8 x 2 accumulated" in text for text in lines)
    assert any("lr 0.00019 -> 0.001 -> 1e-06" in text for text in lines)


def test_mfu_has_no_peak_on_a_cpu():
    assert peak_flops(CPU) is None
