"""Is the run alive? Figures that the loss alone does not show, computed on the device at log steps.

B clips, N tokens, E width. A collapsing run has a falling loss; what tells is the loss against the best predictor that
knows only the position, what is left in the target features once their mean at each position is taken away, and how
many directions they use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ROWS = 8192


@dataclass
class Health:
    """0-dim float32 on the device. All are of normalised target features: a healthy run's have a deviation near 1.

    `trivial_loss`: the loss of the best prediction that knows only the position. `content`: the mean distance of a
    feature from the mean over clips at its position, 0 where only the position is in it, 0.8 (of a normal variable)
    where nothing of the position is. A single clip says nothing about either, nor about what compares clips: its
    trivial loss is 0, the others are NaN.

    `rank`: effective rank of the features of all tokens, at most E; `pooled_rank` of those that are averaged over the
    tokens of a clip, at most B - 1. `feature_std`: how far the features of tokens and clips lie apart, the mean over
    channels of their standard deviation; 0 where all are the same: the rank of what is left then, mere rounding, may be
    high. `pooled_cosine`: mean cosine between the averaged features of two clips, 1 where clips cannot be told apart.

    `norm_ratio`: mean length of predictions over that of targets.
    """

    trivial_loss: Tensor
    content: Tensor
    feature_std: Tensor
    rank: Tensor
    pooled_rank: Tensor
    pooled_cosine: Tensor
    norm_ratio: Tensor


def unknown(device: torch.device) -> Health:
    """Where there is nothing to measure."""
    nan = torch.full((), torch.nan, device=device)
    return Health(torch.zeros((), device=device), nan, nan, nan, nan, nan, nan)


@torch.no_grad()
def measure(targets: Tensor, predictions: Sequence[Tensor], exponent: float, levels: int = 1) -> Health:
    """Health of normalised target features float32 [B, N, E], and of predictions, [..., E] each.

    Of several `levels` beside each other, [B, N, levels * E] and [..., levels * E], the trivial loss and the lengths
    are those of all, as the loss is; all other figures are of the last level, whose features are what a run is for.
    """
    spread = (targets - targets.mean(dim=0)).abs()
    # The mean of B clips lies nearer to each of them than the mean of all clips does: variances shrink by (B - 1) / B.
    clips = len(targets)
    correction = clips / max(1, clips - 1)
    powers = spread if exponent == 1 else spread**exponent
    trivial = correction ** (exponent / 2) * powers.mean() / exponent
    length = torch.linalg.vector_norm(targets, dim=-1).mean()
    width = targets.shape[-1] // levels
    spread, targets = spread[..., -width:], targets[..., -width:]
    rows, pooled = targets.flatten(0, 1), targets.mean(dim=1)
    nan = torch.full((), torch.nan, device=targets.device)
    lengths = [torch.linalg.vector_norm(p, dim=-1, dtype=torch.float32).mean() for p in predictions]
    return Health(
        trivial,
        correction**0.5 * spread.mean() if clips > 1 else nan,
        # Not by std, which takes ten times as long over the first dimension.
        (rows - rows.mean(dim=0)).square().mean(dim=0).sqrt().mean(),
        effective_rank(rows),
        effective_rank(pooled) if clips > 1 else nan,
        pairwise_cosine(pooled) if clips > 1 else nan,
        torch.stack(lengths).mean() / length,
    )


@torch.no_grad()
def effective_rank(rows: Tensor) -> Tensor:
    """exp(entropy) of the normalised singular values of centred rows [M, E]: 1 to E, NaN where rows are not finite.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007. At most 8192 rows, evenly spread, are used.
    """
    rows = rows[:: max(1, -(-len(rows) // MOST_ROWS))].float()
    rows = rows - rows.mean(dim=0)
    # Both products have the same eigenvalues but for zeros: the smaller one is solved faster.
    gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    # Features that are not finite have no rank, and the solver refuses them: it gets a harmless matrix instead.
    finite = torch.isfinite(gram).all()
    energy = torch.linalg.eigvalsh(torch.where(finite, gram, torch.eye(len(gram), device=gram.device))).clamp_min(0.0)
    share = energy.sqrt() / energy.sqrt().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(finite, torch.exp(torch.special.entr(share).sum()), torch.nan)


@torch.no_grad()
def pairwise_cosine(rows: Tensor) -> Tensor:
    """Mean cosine over all pairs of different rows [M, E], M at least 2, from the sum of their unit vectors."""
    count = len(rows)
    units = torch.nn.functional.normalize(rows.float(), dim=-1)
    # |sum|^2 counts each pair twice, and each row with itself, whose cosine is its length: 0 for a row of zeros.
    return (units.sum(dim=0).square().sum() - units.square().sum()) / (count * (count - 1))
