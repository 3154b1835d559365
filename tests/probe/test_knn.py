"""Nearest neighbours against a loop over videos, and the accuracies that all probes share."""

from math import exp

import pytest
import torch

from fastjepa.probe import knn
from fastjepa.probe.scores import accuracy, confusion, over_views, score

CLASSES = 7


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive(query: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, k: int) -> list[float]:
    """Shares of the vote, by the definition."""
    similar = [
        (float(query @ key / (query.norm() * key.norm())), int(label)) for key, label in zip(keys, labels, strict=True)
    ]
    shares = [0.0] * CLASSES
    for value, label in sorted(similar, reverse=True)[:k]:
        shares[label] += exp(value / 0.07)
    return [share / sum(shares) for share in shares]


def test_votes_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr(knn, "BATCH", 8)  # the last batch is a short one
    keys, queries = (
        torch.randn(number, 5, generator=rng(number)) * torch.logspace(-3, 3, number)[:, None] + 0.3
        for number in (40, 21)
    )
    labels = torch.randint(CLASSES, (40,), generator=rng(0))
    counts = [1, 5, 20]
    have = knn.votes(queries, keys, labels, CLASSES, counts)
    want = torch.tensor([[naive(query, keys, labels, k) for query in queries] for k in counts])
    assert have.shape == (3, 21, CLASSES)
    assert torch.allclose(have, want, atol=1e-4)


def test_features_that_are_alike_to_the_last_bit_overflow_nothing():
    votes = knn.votes(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 0, 0, 1]), 2, [4])
    assert torch.allclose(votes, torch.tensor([0.75, 0.25]).expand(1, 2, 2))


def test_the_number_of_neighbours_is_chosen_on_validation_and_reported_on_test(monkeypatch):
    """Each k is right on a given number of the ten validation and twenty test videos."""
    right = {1: (3, 20), 5: (8, 4), 10: (6, 9), 20: (8, 7)}
    splits = dict(zip(("train", "validation", "test"), torch.arange(60).split([30, 10, 20])))

    def fixed(queries, keys, labels, classes, counts):
        assert counts == list(right)
        assert torch.equal(keys[:, 0], torch.arange(30.0))
        part = {10: 0, 20: 1}[len(queries)]
        said = torch.stack([torch.arange(len(queries)) < right[k][part] for k in counts]).float()
        return torch.stack([1 - said, said], dim=-1)

    monkeypatch.setattr(knn, "votes", fixed)
    found = knn.classify(torch.arange(60.0)[:, None], torch.ones(60, dtype=torch.int64), splits, 2)
    assert found.choice == {"k": 5, "validation": 0.8}
    assert accuracy(found.probabilities, torch.ones(20, dtype=torch.int64)) == 4 / 20


def test_more_neighbours_than_there_are_are_not_asked():
    splits = dict(zip(("train", "validation", "test"), torch.arange(9).split([6, 1, 2])))
    x = torch.eye(3).repeat(3, 1)
    found = knn.classify(x, torch.arange(9) % 3, splits, 3)
    assert found.choice == {"k": 1, "validation": 1.0}


# What all probes share


def test_every_video_counts_once_whatever_its_views_say_singly():
    """Two views of each of three videos; the mean of their probabilities decides."""
    rows = torch.tensor([[4, 0], [1, 2], [3, 5]])
    said = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [1.0, 0.0], [0.2, 0.8], [0.4, 0.6]])
    have = over_views(said, rows)
    assert torch.allclose(have, torch.tensor([[0.55, 0.45], [0.45, 0.55], [0.7, 0.3]]))
    assert accuracy(have, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)


def test_accuracies_weigh_videos_and_the_class_mean_weighs_classes():
    """Eight videos of class 0, all right; two of class 1, one of them said to be of class 6; none of the others."""
    labels = torch.tensor([0] * 8 + [1] * 2)
    said = torch.nn.functional.one_hot(torch.tensor([0] * 8 + [1, 6]), 7).float()
    said[9, 1] = 0.5  # right in the first five
    found = score(said, labels)
    assert found.top1 == pytest.approx(0.9)
    assert found.top5 == 1.0
    assert found.class_mean == pytest.approx(0.75)
    table = confusion(said, labels)
    assert table.sum() == 10
    assert (table[0, 0], table[1, 1], table[1, 6]) == (8, 1, 1)


def test_five_classes_have_no_top_5():
    assert score(torch.eye(5), torch.arange(5)).top5 is None
    assert score(torch.eye(6), torch.arange(6)).top5 == 1.0
