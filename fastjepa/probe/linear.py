"""A linear classifier on features averaged over the tokens."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.data.dataset import Reader
from fastjepa.data.source import Videos
from fastjepa.probe import features
from fastjepa.probe.report import Accuracy

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def probe(
    trained: nn.Module,
    untrained: nn.Module,
    videos: Videos,
    reader: Reader,
    cut_out: features.Cut,
    stopped: Callable[[], bool],
) -> list[Accuracy]:
    """Linear accuracy on every task of `videos`. Encoders take [B, C, T, H, W] and give [B, N, E], on one device.

    At most 2,000 videos are used, unreadable ones are left out; `stopped` is asked between batches. Empty where too few
    can be read to learn from two, to choose on one and to test on one. Errors: ProbeStopped.
    """
    device = next(trained.parameters()).device
    members = features.members_of(videos)
    numbers: list[int] = []
    columns: tuple[list[Tensor], ...] = ([], [], [])
    for batch, clips in features.read_clips(members, reader, cut_out, stopped):
        numbers += batch
        seen = clips.to(device)
        columns[0].append(features.mean_tokens(trained, seen))
        columns[1].append(features.mean_tokens(untrained, seen))
        columns[2].append(features.coarse_pixels(clips))
    rows = features.rows_of(members, numbers)
    if not rows:
        return []
    inputs = [torch.cat(column).double() for column in columns]
    results = []
    for name, task in videos.tasks.items():
        labels = torch.from_numpy(task.labels)[torch.tensor(numbers)]
        trained_, untrained_, pixels = (linear_accuracy(x, labels, rows, len(task.classes)) for x in inputs)
        chance = features.majority_accuracy(labels, rows)
        results.append(Accuracy(name, trained_, untrained_, pixels, chance, len(rows["test"])))
    return results


def linear_accuracy(x: Tensor, labels: Tensor, splits: dict[str, Tensor], classes: int) -> float:
    """Test accuracy of softmax regression on standardised features `x`, float64 [M, D].

    `splits` are the rows of train, validation and test; the penalty is chosen on the validation split.
    """
    train = x[splits["train"]]
    x = (x - train.mean(dim=0)) / train.std(dim=0).clamp_min(1e-8)
    best, result = -1.0, 0.0
    for penalty in PENALTIES:
        weight, bias = softmax_regression(x[splits["train"]], labels[splits["train"]], classes, penalty)
        right = ((x @ weight + bias).argmax(dim=1) == labels).double()
        validation = right[splits["validation"]].mean().item()
        if validation > best:
            best, result = validation, right[splits["test"]].mean().item()
    return result


def softmax_regression(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """(weight [D, classes], bias [classes]) that minimise cross-entropy + penalty * |weight|^2, by L-BFGS."""
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach(), bias.detach()
