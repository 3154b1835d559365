"""Is the run alive? Figures that the loss alone does not show, computed on the device at log steps.

B clips, N tokens, E width. A collapsing run has a falling loss; what tells is the loss against the best predictor that
knows only the position, and how many directions the target features use.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ROWS = 8192


@dataclass
class Health:
    """0-dim float32 on the device. `trivial_loss` is 0 for a single clip, which says nothing about it.

    `feature_std`: how far the features of tokens and clips lie apart, the mean over channels of their standard
    deviation. It is near 1 for normalised features, and 0 where all are the same: the rank of what is left then, mere
    rounding, may be high.
    """

    trivial_loss: Tensor
    rank: Tensor
    feature_std: Tensor


@torch.no_grad()
def measure(targets: Tensor, exponent: float) -> Health:
    """Health of normalised target features float32 [B, N, E]."""
    spread = (targets - targets.mean(dim=0)).abs()
    # The mean of B clips lies nearer to each of them than the mean of all clips does: variances shrink by (B - 1) / B.
    clips = len(targets)
    correction = (clips / max(1, clips - 1)) ** (exponent / 2)
    rows = targets.flatten(0, 1)
    trivial = correction * (spread**exponent).mean() / exponent
    return Health(trivial, effective_rank(rows), rows.std(dim=0, correction=0).mean())


@torch.no_grad()
def effective_rank(rows: Tensor) -> Tensor:
    """exp(entropy) of the normalised singular values of centred rows [M, E]: 1 to E, NaN where rows are not finite.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007. At most 8192 rows, evenly spread, are used.
    """
    rows = rows[:: max(1, -(-len(rows) // MOST_ROWS))].float()
    rows = rows - rows.mean(dim=0)
    gram = rows.T @ rows
    # Features that are not finite have no rank, and the solver refuses them: it gets a harmless matrix instead.
    finite = torch.isfinite(gram).all()
    energy = torch.linalg.eigvalsh(torch.where(finite, gram, torch.eye(len(gram), device=gram.device))).clamp_min(0.0)
    share = energy.sqrt() / energy.sqrt().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(finite, torch.exp(torch.special.entr(share).sum()), torch.nan)
