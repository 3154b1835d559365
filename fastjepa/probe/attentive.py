"""An attentive classifier on the single tokens: a learned query decides which of them to read.

First-generation protocol (V-JEPA, arXiv 2404.08471, appendix): one cross-attention block with the encoder's number of
heads, AdamW, cosine learning rate without warm-up, gradients clipped to norm 1, biases and norms without decay; the
segments of a video are one sequence, the prediction is the mean of the probabilities of its views. As in the second
generation a grid of learning rates and weight decays is trained at once; here validation chooses, and test is reported.
Differs: the clips of a video are the same in every epoch, so that their tokens are computed once.
"""

from collections.abc import Callable
from itertools import product
from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.models import AttentiveClassifier
from fastjepa.models.clip_aggregation import mean_probabilities
from fastjepa.probe.features import ProbeStopped
from fastjepa.probe.heads import Heads
from fastjepa.probe.scores import Outcome, accuracy, labels_of
from fastjepa.probe.tokens import TokenFile
from fastjepa.streams import Purpose, stream, torch_seed

EPOCHS = 20
BATCH = 32
CLIP_GRAD = 1.0
# 2,000 videos are some 800 steps, so the rates reach above the published ones; the decays span the published range.
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
WEIGHT_DECAYS = (0.01, 0.4)
GRID = tuple(product(LEARNING_RATES, WEIGHT_DECAYS))


def classify(
    tokens: TokenFile,
    labels: Tensor,
    rows: dict[str, Tensor],
    classes: int,
    heads: int,
    key: tuple[int, int],
    device: torch.device,
    stopped: Callable[[], bool],
) -> Outcome:
    """Of the grid's classifiers the best on validation, the first among equals.

    `labels` int64 [R] for the R rows of `tokens`; `rows` are those of train, validation and test, [M, V] or [M]; `key`
    is (seed, number of the task). A pure function of its arguments: no global random state is read or moved. Errors:
    ProbeStopped.
    """
    network = train_heads(tokens, labels, rows["train"].flatten(), classes, heads, key, device, stopped)
    said = probabilities(network, tokens, rows["validation"], device, stopped)
    validation = accuracy(said, labels_of(labels, rows["validation"]))
    best = int(validation.argmax())
    lr, weight_decay = GRID[best]
    test = probabilities(network, tokens, rows["test"], device, stopped)
    return Outcome(test[best], {"lr": lr, "weight_decay": weight_decay, "validation": validation[best].item()})


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
def probabilities(
    network: nn.Module, tokens: TokenFile, rows: Tensor, device: torch.device, stopped: Callable[[], bool]
) -> Tensor:
    """What each classifier says of the videos of these rows, int64 [M, V] or [M], over their views: [G, M, K]."""
    rows = rows.view(len(rows), -1)
    found = []
    for batch in rows.split(max(1, BATCH // rows.shape[1])):
        if stopped():
            raise ProbeStopped
        logits = network(tokens.read(batch.flatten(), device)).unflatten(1, batch.shape)
        found.append(mean_probabilities(list(logits.unbind(dim=2))).cpu())
    return torch.cat(found, dim=1)
