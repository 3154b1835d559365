"""The inputs of indexed attention, and every shape that follows from them: for operators, reference and launchers."""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """As the operator takes them. B clips, N rows, K rows that take part, H heads of d channels, R rows in flat form.

    q is packed [B, N, 3, H, d] without k and v, or [B, N, H, d] beside them; with `starts` [B + 1], the flat form, q is
    [R, 3, H, d] or [R, H, d] and no clip has more than `longest` rows. An empty grid is no rotary positions; `q_ids`
    and `kv_ids` are token numbers of all rows of q and of k, in place of their places.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    q_index: Tensor | None
    kv_index: Tensor | None
    q_lengths: Tensor | None
    kv_lengths: Tensor | None
    starts: Tensor | None
    bias: Tensor | None
    q_ids: Tensor | None
    kv_ids: Tensor | None
    longest: int
    scale: float
    grid: list[int]
    theta: float
    compat: bool

    @property
    def packed(self) -> bool:
        """Whether q holds keys and values too."""
        return self.k is None

    @property
    def clips(self) -> int:
        """B."""
        return self.q.shape[0] if self.starts is None else self.starts.shape[0] - 1

    @property
    def heads(self) -> int:
        """H."""
        return self.q.shape[-2]

    @property
    def head(self) -> int:
        """d."""
        return self.q.shape[-1]

    @property
    def queries(self) -> int:
        """Kq, the most queries of a clip."""
        if self.starts is not None:
            return self.longest
        return self.q.shape[1] if self.q_index is None else self.q_index.shape[1]

    @property
    def keys(self) -> int:
        """Kk, the most keys of a clip."""
        if self.starts is not None:
            return self.longest
        if self.kv_index is not None:
            return self.kv_index.shape[1]
        return self.q.shape[1] if self.k is None else self.k.shape[1]

    @property
    def segment(self) -> int:
        """Channels that one axis of the rotary positions turns."""
        return 2 * ((self.head // 3) // 2)

    def views(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, N, H, d] each, or [1, R, H, d] of the flat form."""
        parts = self.q.unbind(-3) if self.k is None or self.v is None else (self.q, self.k, self.v)
        q, k, v = (x if self.starts is None else x.unsqueeze(0) for x in parts)
        return q, k, v

    def out_shape(self) -> tuple[int, ...]:
        """Of the result: [B, Kq, H, d], or [R, H, d]."""
        rows = (self.q.shape[0],) if self.starts is not None else (self.clips, self.queries)
        return *rows, self.heads, self.head

    def lse_shape(self) -> tuple[int, ...]:
        """Of the log2 of the sum of exp of every query's scores: [B, H, Kq], or [H, R]."""
        if self.starts is not None:
            return self.heads, self.q.shape[0]
        return self.clips, self.heads, self.queries

    def empty_gradients(self, fill: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers for the gradients of q, k and v, the last two [0] where packed; zeros or not yet written."""
        given = (self.q, self.k, self.v)
        dq, dk, dv = (
            self.q.new_empty(0)
            if x is None
            else torch.zeros_like(x, memory_format=torch.contiguous_format)
            if fill
            else x.new_empty(x.shape)
            for x in given
        )
        return dq, dk, dv
