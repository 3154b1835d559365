"""A linear classifier on features averaged over the tokens: softmax regression with a chosen penalty."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.probe.scores import Outcome, accuracy, labels_of, over_views

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
MOST_STEPS = 1000


def classify(x: Tensor, labels: Tensor, splits: dict[str, Tensor], classes: int) -> Outcome:
    """Softmax regression on standardised features `x`, float64 [R, E]; the penalty is chosen on validation.

    `labels` int64 [R] of all rows; `splits` are the rows of train, validation and test, [M, V] or [M]. Means and
    deviations are those of train.
    """
    train = splits["train"].flatten()
    seen = x[train]
    x = (x - seen.mean(dim=0)) / seen.std(dim=0).clamp_min(1e-8)
    axes = principal_axes(x[train])
    wanted = labels_of(labels, splits["validation"])
    best, result = -1.0, None
    for penalty in PENALTIES:
        weight, bias = softmax_regression(x[train], labels[train], classes, penalty, axes)
        probabilities = (x @ weight + bias).softmax(dim=1)
        right = accuracy(over_views(probabilities, splits["validation"]), wanted).item()
        if right > best:
            best = right
            result = Outcome(over_views(probabilities, splits["test"]), {"penalty": penalty, "validation": right})
    assert result is not None, "an accuracy is above -1"
    return result


def linear_accuracy(x: Tensor, labels: Tensor, splits: dict[str, Tensor], classes: int) -> float:
    """The test accuracy of `classify`."""
    found = classify(x, labels, splits, classes)
    return accuracy(found.probabilities, labels_of(labels, splits["test"])).item()


def principal_axes(x: Tensor) -> Tensor:
    """Orthonormal axes [D, min(M, D)] of rows [M, D], along which they vary independently."""
    if x.shape[1] <= x.shape[0]:
        return torch.linalg.eigh(x.T @ x).eigenvectors
    values, vectors = torch.linalg.eigh(x @ x.T)
    return torch.linalg.qr(x.T @ vectors[:, values > values[-1] * 1e-12]).Q


def softmax_regression(
    x: Tensor, y: Tensor, classes: int, penalty: float, axes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(weight [D, classes], bias [classes]) that minimise cross-entropy + penalty * |weight|^2, by L-BFGS.

    Weights are sought along `axes`, those of the rows where they are not given, each scaled by the curvature along it:
    features of an encoder are so alike that plain L-BFGS takes thousands of steps, and these take some dozens.
    """
    axes = principal_axes(x) if axes is None else axes
    z = x @ axes
    # The penalty's curvature, and about that of the loss: a tenth of the variance.
    scale = (0.1 * z.square().mean(dim=0) + 2 * penalty).rsqrt()
    z = z * scale
    weight = torch.zeros(z.shape[1], classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MOST_STEPS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        square = (scale[:, None] * weight).square().sum()
        loss = F.cross_entropy(z @ weight + bias, y) + penalty * square
        loss.backward()
        return loss

    solver.step(closure)
    return axes @ (scale[:, None] * weight.detach()), bias.detach()
