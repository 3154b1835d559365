"""The dense predictive loss: what its context tokens weigh.

B clips of N = t*h*w tokens in the order time, row, column; R context tokens. Source: V-JEPA 2.1 (arXiv 2603.14482).
"""

from math import prod

import torch
from torch import Tensor

from fastjepa.masks.tokens import TokenSet, flat_rows, gather_tokens, number_of_clips


def distance_to_targets(target: TokenSet, grid: tuple[int, ...]) -> Tensor:
    """Euclidean distance of every token to the nearest target of its clip, in grid units: float32 [B, N].

    It is infinite in a clip without targets. Squared distances are minimised axis by axis, which is exact, needs the
    sum of the grid's sides a token instead of a distance for every pair, and takes ragged sets as they are.
    """
    clips, tokens = number_of_clips(target), prod(grid)
    rows = flat_rows(target, tokens)
    squared = torch.full((clips * tokens,), torch.inf, device=rows.device).index_fill_(0, rows, 0.0)
    squared = squared.view(clips, *grid)
    for axis, side in enumerate(grid, start=1):
        place = torch.arange(side, dtype=squared.dtype, device=rows.device)
        apart = (place.unsqueeze(1) - place).square()
        squared = (squared.movedim(axis, -1).unsqueeze(-2) + apart).amin(dim=-1).movedim(-1, axis)
    return squared.flatten(1).sqrt()


def context_token_weights(context: TokenSet, target: TokenSet, grid: tuple[int, ...]) -> Tensor:
    """Weight 1 / sqrt(d) of each context token, d its distance to the nearest target: float32 [B, K], or [R] if ragged.

    A token that is a target itself counts as its neighbours, d = 1. Where a clip has no targets the weight is 0.
    """
    distance = gather_tokens(distance_to_targets(target, grid).unsqueeze(-1), context).squeeze(-1)
    return distance.clamp(min=1.0).rsqrt()


def context_loss_weight(step: int, value: float, start: int = 0, full: int = 0) -> float:
    """Weight of the context loss at a step: 0 up to `start`, linear to `value` at `full`, then constant.

    With `full` 0 it is `value` from the first step on; published are 0.5, 15000 and 30000. Errors: ValueError unless
    0 <= start <= full.
    """
    if not 0 <= start <= full:
        raise ValueError(f"the context loss grows from one step to a later one, got start={start} and full={full}")
    if step >= full:
        return value
    return 0.0 if step <= start else value * (step - start) / (full - start)
