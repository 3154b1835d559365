"""Mask sets: which tokens of each clip are kept.

A mask set is a [B, K] int64 tensor of kept token numbers where every clip keeps K, or a `Ragged` where lengths differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Kept token numbers of clips that keep different counts, clip after clip.

    `index` is int64 [R] with R = sum(lengths); `lengths` are host integers, so that nothing has to wait for a device.
    """

    index: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.index.ndim != 1 or self.index.numel() != sum(self.lengths):
            raise ValueError(f"a ragged mask set of lengths {self.lengths} does not fit an index {self.index.shape}")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Ragged":
        """The same set on another device."""
        return Ragged(self.index.to(device, non_blocking=non_blocking), self.lengths)

    def pin_memory(self) -> "Ragged":
        """The same set in page-locked memory (DataLoader calls this by name)."""
        return Ragged(self.index.pin_memory(), self.lengths)

    def weights(self) -> Tensor:
        """Weight of every row in the mean over clips of each clip's own mean: float64 [R], summing to 1."""
        # By fills on the device: a copy of host numbers out of pageable memory may wait for what is queued there.
        shares = [(index.numel(), 1.0 / (len(self.lengths) * max(1, index.shape[1]))) for _, index in self.runs()]
        device = self.index.device
        return torch.cat([torch.full((rows,), share, dtype=torch.float64, device=device) for rows, share in shares])

    def runs(self) -> Iterator[tuple[slice, Tensor]]:
        """Neighbouring clips of equal length: (rows of the batch, their [b, K] token numbers)."""
        return ((rows, dense) for rows, (dense,) in split_runs([self]))


TokenSet = Tensor | Ragged


def number_of_clips(token_set: TokenSet) -> int:
    """How many clips a mask set describes."""
    return len(token_set.lengths if isinstance(token_set, Ragged) else token_set)


def split_runs(sets: Sequence[TokenSet]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Cut a batch where the length of any of the sets changes: (rows, one dense [b, K] tensor a set).

    With cutting to a group minimum a run is a truncation group; without cutting it is mostly a single clip.
    """
    batch = {number_of_clips(s) for s in sets}
    if len(batch) != 1:
        raise ValueError(f"mask sets of one step describe different numbers of clips: {sorted(batch)}")
    size = batch.pop()
    lengths = [s.lengths if isinstance(s, Ragged) else (s.shape[1],) * size for s in sets]
    keys = list(zip(*lengths))
    starts = [row for row in range(size) if row == 0 or keys[row] != keys[row - 1]]
    for start, stop in zip(starts, [*starts[1:], size]):
        yield slice(start, stop), [_dense(s, start, stop) for s in sets]


def _dense(token_set: TokenSet, start: int, stop: int) -> Tensor:
    if isinstance(token_set, Tensor):
        return token_set[start:stop]
    first = sum(token_set.lengths[:start])
    length = token_set.lengths[start]
    return token_set.index[first : first + (stop - start) * length].view(stop - start, length)


@overload
def apply_masks(x: Tensor, masks: Tensor | Sequence[Tensor], concat: Literal[True] = True) -> Tensor: ...
@overload
def apply_masks(x: Tensor, masks: Tensor | Sequence[Tensor], concat: Literal[False]) -> list[Tensor]: ...
def apply_masks(x: Tensor, masks: Tensor | Sequence[Tensor], concat: bool = True) -> Tensor | list[Tensor]:
    """Keep the named tokens: x [B, N, D] and masks [B, K] -> [B, K, D].

    A list of masks with equal K gives [len(masks) * B, K, D], set after set; `concat=False` gives a list instead and
    allows unequal K. Errors: ValueError for unequal K under `concat`.
    """
    if isinstance(masks, Tensor):
        masks = [masks]
    kept = [_gather(x, mask) for mask in masks]
    if not concat:
        return kept
    if len({k.shape[1] for k in kept}) > 1:
        raise ValueError(f"masks keep different numbers of tokens {[k.shape[1] for k in kept]}: use forward_sets")
    return torch.cat(kept)


def repeat_clips(token_set: TokenSet, times: int) -> TokenSet:
    """The same tokens for `times` neighbouring clips each: [B, K] -> [B * times, K], ragged sets alike."""
    if times == 1:
        return token_set
    if isinstance(token_set, Tensor):
        return token_set.repeat_interleave(times, dim=0)
    lengths = torch.tensor(token_set.lengths)
    first = (lengths.cumsum(0) - lengths).repeat_interleave(times)
    lengths = lengths.repeat_interleave(times)
    # The place of every row within its own clip, moved to where that clip begins in the old index.
    shift = first - (lengths.cumsum(0) - lengths)
    rows = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
    return Ragged(token_set.index[rows.to(token_set.index.device)], tuple(lengths.tolist()))


def flat_tokens(token_set: TokenSet) -> Tensor:
    """Kept token numbers, clip after clip: int64 [R]."""
    return token_set.index if isinstance(token_set, Ragged) else token_set.flatten()


def flat_rows(token_set: TokenSet, tokens: int) -> Tensor:
    """Row numbers of the kept tokens in a [B * tokens, ...] matrix: int64 [R]."""
    if isinstance(token_set, Ragged):
        return torch.cat([_rows(index, clips.start, tokens) for clips, index in token_set.runs()])
    return _rows(token_set, 0, tokens)


def _rows(index: Tensor, start: int, tokens: int) -> Tensor:
    """Row numbers of dense [b, K] token numbers of clips from `start` on; made on their device, without a copy."""
    clip = torch.arange(start, start + len(index), device=index.device)
    return (index + clip.unsqueeze(1) * tokens).flatten()


def gather_tokens(x: Tensor, token_set: TokenSet) -> Tensor:
    """The kept tokens of x [B, N, D]: [B, K, D], or [R, D] rows where lengths differ."""
    if isinstance(token_set, Tensor):
        return _gather(x, token_set)
    return x.flatten(0, 1).index_select(0, flat_rows(token_set, x.shape[1]))


def _gather(x: Tensor, mask: Tensor) -> Tensor:
    return torch.gather(x, 1, mask.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
