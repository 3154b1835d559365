"""Health figures on features whose answer is known."""

import math

import pytest
import torch

from fastjepa.health import MOST_ROWS, effective_rank, measure, pairwise_cosine


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measured(targets, exponent):
    return measure(targets, [targets], exponent)


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


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_the_deviation_is_that_over_tokens_and_clips_of_each_channel(spread):
    targets = 3.0 + spread * normal(16, 50, 12)
    targets[..., 4] = 7.0
    assert measured(targets, 1.0).feature_std.item() == pytest.approx(spread * 11 / 12, rel=0.02)
    by_place = normal(1, 50, 12).expand(16, 50, 12)  # it does not tell clips from places: the trivial loss does
    assert measured(by_place, 1.0).feature_std.item() == pytest.approx(1, rel=0.1)


def test_targets_that_depend_on_the_position_only_are_predicted_trivially():
    targets = normal(1, 20, 16).expand(6, 20, 16)
    health = measured(targets, 1.0)
    assert health.trivial_loss.item() == pytest.approx(0, abs=1e-6)
    assert health.rank.item() > 5


def test_the_trivial_loss_of_a_single_clip_says_nothing():
    assert measured(normal(1, 20, 16), 1.0).trivial_loss.item() == 0


@pytest.mark.parametrize(("exponent", "value"), [(1.0, 0.798), (2.0, 0.5)])
def test_the_trivial_loss_of_unrelated_clips_is_that_of_normal_features(exponent, value):
    assert measured(normal(64, 40, 32), exponent).trivial_loss.item() == pytest.approx(value, rel=0.02)


def test_a_loss_ratio_of_one_is_the_best_prediction_that_knows_the_position_only():
    targets = normal(1, 30, 24) + 0.3 * normal(32, 30, 24, seed=1)
    trivial = measured(targets, 2.0).trivial_loss
    position_only = ((targets.mean(dim=0) - targets).square().mean() / 2).item()
    assert position_only / trivial.item() == pytest.approx(31 / 32, rel=1e-5)  # of the infinite batch
    blind = ((targets.mean(dim=(0, 1)) - targets).square().mean() / 2).item()
    assert blind / trivial.item() > 5
    informed = ((targets + 0.1 * normal(32, 30, 24, seed=2) - targets).square().mean() / 2).item()
    assert informed / trivial.item() < 0.2


def test_content_is_what_the_mean_at_each_position_does_not_tell():
    place, clip = normal(1, 30, 24), normal(64, 30, 24, seed=1)
    assert measured(place.expand(8, 30, 24), 1.0).content.item() == pytest.approx(0, abs=1e-6)
    assert measured(clip, 1.0).content.item() == pytest.approx(0.798, rel=0.02)
    assert measured(clip, 2.0).content.item() == pytest.approx(0.798, rel=0.02), "whatever the loss is"
    assert measured(place + 0.1 * clip, 1.0).content.item() == pytest.approx(0.0798, rel=0.02)
    few = torch.stack([measured(normal(4, 30, 24, seed=s), 1.0).content for s in range(2, 30)]).mean()
    assert few.item() == pytest.approx(0.798, rel=0.02), "of a few clips as of many"


def test_the_cosine_of_pairs_is_that_of_all_pairs():
    rows = normal(7, 12) + 0.5
    units = rows / rows.norm(dim=1, keepdim=True)
    pairs = [units[i] @ units[j] for i in range(7) for j in range(i)]
    assert pairwise_cosine(rows).item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    assert pairwise_cosine(torch.ones(5, 8)).item() == pytest.approx(1)


def test_pooled_figures_are_of_the_mean_over_the_tokens_of_a_clip():
    clips = normal(6, 1, 16).expand(6, 20, 16)
    targets = clips + normal(6, 20, 16, seed=1) - normal(6, 20, 16, seed=1).mean(dim=1, keepdim=True)
    health = measured(targets, 1.0)
    assert health.pooled_cosine.item() == pytest.approx(pairwise_cosine(clips[:, 0]).item(), rel=1e-4)
    assert health.pooled_rank.item() == pytest.approx(effective_rank(clips[:, 0]).item(), rel=1e-3)
    assert health.pooled_rank.item() < 5 < health.rank.item()


def test_fewer_rows_than_channels_have_the_rank_of_their_singular_values():
    rows = normal(9, 40)
    values = torch.linalg.svdvals(rows - rows.mean(dim=0))
    share = values / values.sum()
    want = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
    assert effective_rank(rows).item() == pytest.approx(want.item(), rel=1e-3)


def test_the_norm_ratio_is_that_of_mean_lengths():
    targets = normal(4, 10, 16)
    found = measure(targets, [0.5 * targets[:, :5], 0.25 * targets.flatten(0, 1)], 1.0).norm_ratio
    assert found.item() == pytest.approx(0.375, rel=0.05)
    assert measured(targets, 1.0).norm_ratio.item() == pytest.approx(1, rel=1e-5)


def test_figures_of_levels_are_those_of_the_last_but_for_the_trivial_loss_and_the_lengths():
    targets = normal(4, 6, 16)
    targets[..., :8] *= 3
    guess = targets * torch.tensor([0.5] * 8 + [1.0] * 8)
    both = measure(targets, [guess], 1.0, 2)
    first, last = (measured(part, 1.0) for part in targets.split(8, dim=-1))
    for name in ("content", "feature_std", "rank", "pooled_rank", "pooled_cosine"):
        assert getattr(both, name).item() == pytest.approx(getattr(last, name).item(), rel=1e-6), name
    assert both.trivial_loss.item() == pytest.approx((first.trivial_loss + last.trivial_loss).item() / 2, rel=1e-6)
    assert both.norm_ratio.item() == pytest.approx((guess.norm(dim=-1).mean() / targets.norm(dim=-1).mean()).item())


def test_a_single_clip_has_no_figures_that_compare_clips():
    health = measured(normal(1, 20, 16), 1.0)
    for name in ("content", "pooled_rank", "pooled_cosine"):
        assert math.isnan(getattr(health, name).item()), name
    assert health.rank.item() > 5
