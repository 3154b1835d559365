"""From the probabilities of a classifier to accuracies. Every video counts once, whatever batch it came in.

M videos, V views, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 5


@dataclass(frozen=True)
class Outcome:
    """What the classifier that validation chose says of the test videos: float [M, K]; `choice` is which it was."""

    probabilities: Tensor
    choice: dict[str, float]


@dataclass(frozen=True)
class Score:
    """Shares of 1. `top5` is None where there are no more than five classes; `class_mean` is over classes in test."""

    top1: float
    top5: float | None
    class_mean: float


def over_views(probabilities: Tensor, rows: Tensor) -> Tensor:
    """The published prediction: the mean of the probabilities of a video's views.

    `probabilities` [..., R, K] of all rows, `rows` int64 [M, V] or [M]: [..., M, K].
    """
    rows = rows.view(len(rows), -1)
    return probabilities[..., rows.flatten(), :].unflatten(-2, rows.shape).mean(dim=-2)


def accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The share of the videos that are right: [..., M, K] and int64 [M] -> float64 [...]."""
    return (probabilities.argmax(dim=-1) == labels).double().mean(dim=-1)


def labels_of(labels: Tensor, rows: Tensor) -> Tensor:
    """Labels of rows, int64 [R], as those of the videos [M]."""
    return labels[rows.view(len(rows), -1)[:, 0]]


def score(probabilities: Tensor, labels: Tensor) -> Score:
    """Of [M, K] and int64 [M]."""
    classes = probabilities.shape[1]
    top5 = None
    if classes > TOP:
        first = probabilities.topk(TOP, dim=1).indices
        top5 = (first == labels[:, None]).any(dim=1).double().mean().item()
    table = confusion(probabilities, labels)
    counts = table.sum(dim=1)
    right = table.diagonal()[counts > 0].double() / counts[counts > 0]
    return Score(accuracy(probabilities, labels).item(), top5, right.mean().item())


def confusion(probabilities: Tensor, labels: Tensor) -> Tensor:
    """How many videos of a class (row) were said to be of which (column): int64 [K, K]."""
    classes = probabilities.shape[1]
    pairs = labels * classes + probabilities.argmax(dim=1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)
