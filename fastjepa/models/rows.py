"""How the rows of the packed pass fall into clips, and where they lie.

R rows of D channels, clips one after another; H heads of d channels.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjepa.masks.tokens import Ragged, TokenSet, split_runs
from fastjepa.models.layers import Attention
from fastjepa.models.rotary import Places, RopeStyle, Turn, turn_of, turned


class Stretch(NamedTuple):
    """Neighbouring clips that keep equally many rows."""

    clips: int
    length: int


class Rotary(NamedTuple):
    """What rotary attention needs to know of rows: where they lie, and how heads of so many channels are turned."""

    places: Places
    head_dim: int
    style: RopeStyle
    dtype: torch.dtype


class Layout(NamedTuple):
    """How rows fall into clips, and what turns the queries and keys of each row, [R, d]."""

    stretches: list[Stretch]
    turn: Turn | None = None


class Dropped(NamedTuple):
    """Stochastic depth of a block: 0 or 1 / (1 - rate) for each row, [R] in float32 at least, of both its halves."""

    attention: Tensor
    feed_forward: Tensor


class Wanted(NamedTuple):
    """Rows that a last block has to finish: their places among all rows, int64 [R], and how they fall into clips."""

    place: Tensor
    layout: Any


def split(rows: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """[R, D] as one [clips, length, D] for each stretch. One split: its gradient is one concatenation, no zeros."""
    return [
        part.unflatten(0, (clips, length))
        for part, (clips, length) in zip(rows.split([clips * length for clips, length in shapes]), shapes)
    ]


def joined(parts: list[Tensor]) -> Tensor:
    """[R, D] each as one; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def beside(parts: list[Tensor]) -> Tensor:
    """[R, D] each as one [R, parts * D]; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def stretches_of(token_set: TokenSet) -> list[Stretch]:
    """How the rows of a mask set fall into clips."""
    if isinstance(token_set, Ragged):
        return [Stretch(*index.shape) for _, index in token_set.runs()]
    return [Stretch(*token_set.shape)]


def run_shapes(context: TokenSet, target: TokenSet) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(clips, context rows) and (clips, target rows) of every run of clips with equally many of both."""
    return [(c_index.shape, t_index.shape) for _, (c_index, t_index) in split_runs([context, target])]


def turn_of_rows(rotary: Rotary | None) -> Turn | None:
    """What turns the heads of every row, [R, 1, d]: made once, for all layers of a pass."""
    if rotary is None:
        return None
    turn = turn_of(rotary.places, rotary.head_dim, rotary.style, rotary.dtype)
    return Turn(turn.cosine.unsqueeze(-2), turn.sine.unsqueeze(-2))


def self_heads(attention: Attention, packed: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [R, H, d] each, of the packed projection [R, 3 D]."""
    heads = packed.unflatten(-1, (3, attention.num_heads, attention.head_dim))
    if turn is None:
        return heads.unbind(1)
    # One split: its gradient is one concatenation. Queries and keys turn together.
    both, value = heads.split([2, 1], dim=1)
    query, key = turned(both, Turn(turn.cosine.unsqueeze(1), turn.sine.unsqueeze(1))).unbind(1)
    return query, key, value.squeeze(1)


def cross_heads(
    attention: Attention, query: Tensor, key_value: Tensor, turn: Turn | None, kv_turn: Turn | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [Rq, H, d] of [Rq, D], keys and values [R, H, d] of the packed [R, 2 D]."""
    size = (attention.num_heads, attention.head_dim)
    q, (k, v) = query.unflatten(-1, size), key_value.unflatten(-1, (2, *size)).unbind(1)
    if turn is None or kv_turn is None:
        return q, k, v
    return turned(q, turn), turned(k, kv_turn), v


def self_parts(attention: Attention, packed: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each stretch, [b, N, H, d] each, of the packed projection [R, 3 D]."""
    if layout.turn is None:
        size = (3, attention.num_heads, attention.head_dim)
        for part in split(packed, layout.stretches):
            yield part.unflatten(-1, size).unbind(2)
    else:
        yield from zip(*(split(one, layout.stretches) for one in self_heads(attention, packed, layout.turn)))


def cross_parts(
    attention: Attention, query: Tensor, key_value: Tensor, layout: Layout, kv_layout: Layout
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same of [Rq, D] queries and the packed [R, 2 D] of keys and values."""
    q, k, v = cross_heads(attention, query, key_value, layout.turn, kv_layout.turn)
    yield from zip(split(q, layout.stretches), split(k, kv_layout.stretches), split(v, kv_layout.stretches))
