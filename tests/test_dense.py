"""Weights of the context loss against sums over all pairs of tokens."""

from itertools import product
from math import dist, inf

import pytest
import torch

from fastjepa.dense import context_loss_weight, context_token_weights, distance_to_targets
from fastjepa.masks.tokens import Ragged

GRID = (3, 4, 5)
PLACES = list(product(*map(range, GRID)))


def _nearest(token: int, targets: list[int]) -> float:
    return min((dist(PLACES[token], PLACES[other]) for other in targets), default=inf)


@pytest.mark.parametrize("clips", [1, 3])
def test_distances_are_those_to_the_nearest_of_all_targets(clips: int) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.stack([torch.randperm(60, generator=generator)[:4] for _ in range(clips)])
    expected = torch.tensor([[_nearest(token, clip) for token in range(60)] for clip in target.tolist()])
    torch.testing.assert_close(distance_to_targets(target, GRID), expected)


def test_ragged_sets_weigh_each_clip_by_its_own_targets() -> None:
    context, target = [[0, 7, 59], [3], [8, 9]], [[30, 31], [59, 20, 44], []]
    weights = context_token_weights(_ragged(context), _ragged(target), GRID)
    expected = [_nearest(token, goals) ** -0.5 for kept, goals in zip(context, target) for token in kept]
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert weights[-1] == 0


def test_a_dense_set_keeps_its_shape_and_a_target_counts_as_a_neighbour() -> None:
    weights = context_token_weights(torch.tensor([[5, 6], [0, 59]]), torch.tensor([[5], [10]]), GRID)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.0], [2**-0.5, _nearest(59, [10]) ** -0.5]]))


def test_images_have_a_grid_of_rows_and_columns() -> None:
    torch.testing.assert_close(distance_to_targets(torch.tensor([[0]]), (4, 5))[0, 19], torch.tensor(5.0))


def test_the_loss_weight_grows_between_two_steps_and_stays() -> None:
    steps = [0, 15000, 15001, 22500, 30000, 99999]
    assert [context_loss_weight(step, 0.5, 15000, 30000) for step in steps] == [0, 0, 0.5 / 15000, 0.25, 0.5, 0.5]
    assert context_loss_weight(0, 0.5) == 0.5
    assert context_loss_weight(9, 0.5, 10, 10) == 0
    assert context_loss_weight(10, 0.5, 10, 10) == 0.5
    with pytest.raises(ValueError, match="start=2 and full=1"):
        context_loss_weight(0, 0.5, 2, 1)


def _ragged(tokens: list[list[int]]) -> Ragged:
    index = torch.tensor([token for clip in tokens for token in clip])
    return Ragged(index, tuple(map(len, tokens)))
