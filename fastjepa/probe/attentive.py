"""An attentive classifier on the single tokens: a learned query decides which of them to read.

First-generation protocol (V-JEPA, arXiv 2404.08471, appendix): one cross-attention block with the encoder's number of
heads, AdamW, cosine learning rate without warm-up, gradients clipped to norm 1, biases and norms without decay. As in
the second generation a grid of learning rates and weight decays is trained at once; here validation chooses, and test
is reported. Differs: one clip a video, the same in every epoch, so that its tokens are computed once.
"""

from collections.abc import Callable
from itertools import product
from math import cos, pi
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.data.dataset import Reader
from fastjepa.data.source import Videos
from fastjepa.models import AttentiveClassifier
from fastjepa.probe import features, linear
from fastjepa.probe.features import ProbeStopped
from fastjepa.probe.heads import Heads
from fastjepa.probe.report import Accuracy, AttentiveAccuracy, Choice
from fastjepa.probe.tokens import TokenFile
from fastjepa.streams import Purpose, stream, torch_seed

EPOCHS = 20
BATCH = 32
CLIP_GRAD = 1.0
# 2,000 videos are some 800 steps, so the rates reach above the published ones; the decays span the published range.
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
WEIGHT_DECAYS = (0.01, 0.4)
GRID = tuple(product(LEARNING_RATES, WEIGHT_DECAYS))


def attentive_probe(
    trained: nn.Module,
    untrained: nn.Module,
    videos: Videos,
    reader: Reader,
    cut_out: features.Cut,
    stopped: Callable[[], bool],
    *,
    heads: int,
    seed: int,
    folder: Path,
    most: int = features.MOST_VIDEOS,
) -> list[Accuracy]:
    """Attentive accuracy of both encoders on every task of `videos`; pixels are classified by the linear probe.

    Encoders take [B, C, T, H, W] and give [B, N, E] with E a multiple of `heads`, on one device. Their tokens lie in
    nameless files in `folder` meanwhile. At most `most` videos are used, unreadable ones are left out; `stopped` is
    asked between batches, also of the training. Empty where too few can be read to learn from two, to choose on one and
    to test on one. A pure function of its arguments: no global random state is read or moved. Errors: ProbeStopped;
    OSError where the disk is full.
    """
    device = next(trained.parameters()).device
    members = features.members_of(videos, min(most, features.MOST_VIDEOS))
    numbers: list[int] = []
    coarse: list[Tensor] = []
    with TokenFile(folder) as first, TokenFile(folder) as second:
        for batch, clips in features.read_clips(members, reader, cut_out, stopped):
            numbers += batch
            coarse.append(features.coarse_pixels(clips))
            for encoder, file in ((trained, first), (untrained, second)):
                with torch.no_grad():
                    file.append(encoder(clips.to(device)))
        rows = features.rows_of(members, numbers)
        if not rows:
            return []
        results: list[Accuracy] = []
        pixels = torch.cat(coarse).double()
        for number, (name, task) in enumerate(videos.tasks.items()):
            labels, classes = torch.from_numpy(task.labels)[torch.tensor(numbers)], len(task.classes)
            (best, choice), (other, other_choice) = (
                attentive_accuracy(file, labels, rows, classes, heads, (seed, number), device, stopped)
                for file in (first, second)
            )
            on_pixels = linear.linear_accuracy(pixels, labels, rows, classes)
            chance = features.majority_accuracy(labels, rows)
            tested = len(rows["test"])
            results.append(AttentiveAccuracy(name, best, other, on_pixels, chance, tested, choice, other_choice))
    return results


def attentive_accuracy(
    tokens: TokenFile,
    labels: Tensor,
    rows: dict[str, Tensor],
    classes: int,
    heads: int,
    key: tuple[int, int],
    device: torch.device,
    stopped: Callable[[], bool],
) -> tuple[float, Choice]:
    """(test accuracy, choice): of the grid's classifiers the best on validation, the first among equals.

    `labels` int64 [M] for the M rows of `tokens`; `rows` are those of train, validation and test; `key` is (seed,
    number of the task). Errors: ProbeStopped.
    """
    network = train_heads(tokens, labels, rows["train"], classes, heads, key, device, stopped)
    validation = accuracies(network, tokens, labels, rows["validation"], device, stopped)
    test = accuracies(network, tokens, labels, rows["test"], device, stopped)
    best = int(validation.argmax())
    return test[best].item(), Choice(*GRID[best], validation[best].item())


def train_heads(
    tokens: TokenFile,
    labels: Tensor,
    train: Tensor,
    classes: int,
    heads: int,
    key: tuple[int, int],
    device: torch.device,
    stopped: Callable[[], bool],
) -> Heads:
    """A classifier for each entry of the grid, all from the same first weights and over the same batches."""
    seed, task = key
    # Only the CPU generator is seeded and put back: torch.manual_seed would move those of all devices.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch_seed(seed, Purpose.PROBE, task, 0, 1))
        first = AttentiveClassifier(tokens.row_shape[1], heads, num_classes=classes)
    network = Heads(first, len(GRID), heads).to(device)
    optimizer = torch.optim.AdamW(
        [
            {"params": [leaf], "lr": lr, "peak": lr, "weight_decay": decay}
            for leaves, decays in ((network.decayed, True), (network.plain, False))
            for leaf, (lr, weight_decay) in zip(leaves, GRID)
            for decay in [weight_decay if decays else 0.0]
        ],
        fused=True,
    )
    steps = EPOCHS * -(-len(train) // BATCH)
    step = 0
    for epoch in range(EPOCHS):
        order = torch.from_numpy(stream(seed, Purpose.PROBE, task, epoch, 2).permutation(len(train)))
        for batch in train[order].split(BATCH):
            if stopped():
                raise ProbeStopped
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * 0.5 * (1.0 + cos(pi * step / steps))
            logits = network(tokens.read(batch, device))
            wanted = labels[batch].to(device).expand(len(GRID), -1)
            # A sum over the classifiers: none of them sees the others' gradients.
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / len(batch)
            optimizer.zero_grad()
            loss.backward()
            for own in zip(network.decayed, network.plain):
                nn.utils.clip_grad_norm_(own, CLIP_GRAD)
            optimizer.step()
            step += 1
    return network


@torch.no_grad()
def accuracies(
    network: nn.Module,
    tokens: TokenFile,
    labels: Tensor,
    rows: Tensor,
    device: torch.device,
    stopped: Callable[[], bool],
) -> Tensor:
    """The share of these rows that each classifier gets right, float64 [G]."""
    right = []
    for batch in rows.split(BATCH):
        if stopped():
            raise ProbeStopped
        right.append(network(tokens.read(batch, device)).argmax(dim=-1).cpu() == labels[batch])
    return torch.cat(right, dim=1).double().mean(dim=1)
