"""The tokens that are a target of some mask set: all that the target encoder's last block has to finish."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa.masks.tokens import Ragged, TokenSet, flat_rows, number_of_clips


@dataclass(frozen=True)
class TargetUnion:
    """`index` int64 [B, U] names U tokens of every clip; `places` are the target sets again, as places in `index`.

    A clip with fewer targets than U is filled up with tokens that nobody reads.
    """

    index: Tensor
    places: list[TokenSet]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TargetUnion":
        """The same on another device."""
        moved = [token_set.to(device, non_blocking=non_blocking) for token_set in self.places]
        return TargetUnion(self.index.to(device, non_blocking=non_blocking), moved)

    def pin_memory(self) -> "TargetUnion":
        """The same in page-locked memory (DataLoader calls this by name)."""
        return TargetUnion(self.index.pin_memory(), [token_set.pin_memory() for token_set in self.places])


def target_union(sets: Sequence[TokenSet], tokens: int) -> TargetUnion:
    """The union of target sets, clip by clip, of clips with so many tokens.

    Its size depends on the sets, so on a GPU the host would wait for it: it is made where masks are drawn.
    """
    rows = [flat_rows(token_set, tokens) for token_set in sets]
    named = torch.zeros(number_of_clips(sets[0]) * tokens, dtype=torch.bool, device=rows[0].device)
    named[torch.cat(rows)] = True
    named = named.view(-1, tokens)
    most = int(named.sum(dim=1).max())
    # Stable: tokens that are targets come first, in their order.
    index = named.byte().argsort(dim=1, descending=True, stable=True)[:, :most].contiguous()
    place = (named.cumsum(dim=1) - 1).flatten()
    return TargetUnion(index, [_at(token_set, place[of]) for token_set, of in zip(sets, rows)])


def _at(token_set: TokenSet, places: Tensor) -> TokenSet:
    if isinstance(token_set, Ragged):
        return Ragged(places, token_set.lengths)
    return places.view(token_set.shape)
