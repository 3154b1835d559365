"""The nearest neighbours of a video vote on its class: nothing is trained.

Source: the protocol of DINO (arXiv 2104.14294, section 4.1): cosine similarity, a vote weighs exp(similarity / 0.07).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.probe.scores import Outcome, accuracy, labels_of, over_views

NEIGHBOURS = (1, 5, 10, 20)
TEMPERATURE = 0.07
BATCH = 1024


def classify(x: Tensor, labels: Tensor, splits: dict[str, Tensor], classes: int) -> Outcome:
    """Number of neighbours chosen on validation, the first among equals.

    `x` float [R, E] on any device, `labels` int64 [R] of all rows; `splits` are the rows of train, validation and test,
    [M, V] or [M].
    """
    train = splits["train"].flatten()
    counts = [k for k in NEIGHBOURS if k <= len(train)]
    keys, wanted = x[train.to(x.device)], labels[train].to(x.device)
    found = {}
    for name in ("validation", "test"):
        rows = splits[name].view(len(splits[name]), -1)
        said = votes(x[rows.flatten().to(x.device)], keys, wanted, classes, counts).cpu()
        places = torch.arange(rows.numel()).view(rows.shape)
        found[name] = over_views(said, places)
    right = accuracy(found["validation"], labels_of(labels, splits["validation"]))
    best = int(right.argmax())
    return Outcome(found["test"][best], {"k": counts[best], "validation": right[best].item()})


def votes(
    queries: Tensor, keys: Tensor, labels: Tensor, classes: int, counts: list[int], temperature: float = TEMPERATURE
) -> Tensor:
    """Shares of the vote of the nearest k keys, for each k of `counts`: float32 [len(counts), Q, classes].

    `queries` [Q, E], `keys` [M, E] and their `labels` int64 [M] on one device.
    """
    keys = F.normalize(keys.float(), dim=1)
    parts = []
    for batch in queries.split(BATCH):
        near = (F.normalize(batch.float(), dim=1) @ keys.T).topk(max(counts), dim=1)
        weights = ((near.values - 1) / temperature).exp()  # a similarity of 1 counts 1: nothing overflows
        named = labels[near.indices]
        shares = []
        for k in counts:
            share = torch.zeros(len(batch), classes, device=keys.device)
            share.scatter_add_(1, named[:, :k], weights[:, :k])
            shares.append(share / share.sum(dim=1, keepdim=True).clamp_min(1e-30))
        parts.append(torch.stack(shares))
    return torch.cat(parts, dim=1)
