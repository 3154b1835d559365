"""Attention of the packed pass through the dispatcher of `fastjepa_kernels`: whichever library fits, by name or not.

Clips of a truncation group keep equally many rows, and a dense call takes each group. Where every clip has a length of
its own the rows stay as they are, and one ragged call takes all.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjepa_kernels as kernels
from fastjepa.models.layers import Attention
from fastjepa.models.operations import Operations
from fastjepa.models.rotary import THETA, Turn
from fastjepa.models.rows import (
    Layout,
    Rotary,
    Stretch,
    Wanted,
    cross_heads,
    cross_parts,
    joined,
    self_heads,
    self_parts,
    split,
    turn_of_rows,
)
from fastjepa_kernels.indexed import HEAD_SIZES

# Backends that take either form alone; the others take both.
DENSE = ("sdpa", "cudnn", "flash", "efficient", "math")
RAGGED = ("varlen", "padded")
NAMES = ("auto", *DENSE, *RAGGED, "xformers", "indexed")


class Flat(NamedTuple):
    """Rows of clips in a row: `starts` int32 [clips + 1] on the device, rows of the longest clip, and the stretches.

    With rotary positions either `turn` as in `Layout`, or the token numbers [R] of the rows and what turns them.
    """

    starts: Tensor
    longest: int
    stretches: list[Stretch]
    turn: Turn | None = None
    ids: Tensor | None = None
    rope: kernels.Rope | None = None


class Dispatched(Operations):
    """Self-attention by a backend of `fastjepa_kernels.attention`. Rotary positions turn rows by a table, made once.

    `flat` takes one ragged call where a backend has both forms, for clips whose lengths all differ. `group` cuts dense
    calls to so many clips, so that there are equally many in every step, also where neighbouring groups happen to be
    of one length: compiled code is then the same.
    """

    def __init__(
        self, backend: str = "auto", *, deterministic: bool = False, flat: bool = False, group: int | None = None
    ) -> None:
        self.backend, self.deterministic, self.group = backend, deterministic, group
        self.flat = backend in RAGGED or (flat and backend not in DENSE)

    def check(self, network: nn.Module) -> None:
        """Errors: ValueError for attention with dropout, or without the fused form."""
        for name, module in network.named_modules():
            if isinstance(module, Attention) and (module.attn_drop.p > 0 or not module.use_sdpa):
                raise ValueError(
                    f"attention: expected no dropout and use_sdpa=True in {name}: leave this piece to the library"
                )

    def layout(self, stretches: list[Stretch], device: torch.device, rotary: Rotary | None = None) -> Layout | Flat:
        """Stretches for dense calls, or where clips begin for a ragged one."""
        turn = turn_of_rows(rotary)
        return flat_layout(stretches, device, turn) if self.flat else Layout(self._cut(stretches), turn)

    def _cut(self, stretches: list[Stretch]) -> list[Stretch]:
        if self.group is None:
            return stretches
        return [
            Stretch(min(self.group, clips - first), length)
            for clips, length in stretches
            for first in range(0, clips, self.group)
        ]

    def attend(self, attention: Attention, x: Tensor, layout: Any) -> Tensor:
        """One ragged call, or one for each stretch."""
        packed = attention.qkv(x)
        if isinstance(layout, Flat):
            return self._ragged(attention, *self_heads(attention, packed, layout.turn), layout, layout)
        return joined([self._dense(attention, *part) for part in self_parts(attention, packed, layout)])

    def cross(self, attention: Attention, query: Tensor, key_value: Tensor, layout: Any, kv_layout: Any) -> Tensor:
        """The same for fewer queries than keys."""
        if isinstance(layout, Flat):
            return self._ragged(
                attention, *self._heads(attention, query, key_value, layout, kv_layout), layout, kv_layout
            )
        parts = cross_parts(attention, query, key_value, layout, kv_layout)
        return joined([self._dense(attention, *part) for part in parts])

    def _heads(
        self, attention: Attention, query: Tensor, key_value: Tensor, layout: Flat, kv_layout: Flat
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries and keys, and values, of flat rows: [Rq, H, d] and [R, H, d]."""
        return cross_heads(attention, query, key_value, layout.turn, kv_layout.turn)

    def _dense(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = kernels.attention(
            q, k, v, scale=attention.sdpa_scale, backend=self.backend, deterministic=self.deterministic
        )
        return mixed.flatten(2).flatten(0, 1)

    def _ragged(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, asking: Flat, asked: Flat) -> Tensor:
        more: dict[str, Any] = {}
        # The mask of xformers is built from numbers of the host, which compiled code would be made for.
        if self.backend == "xformers":
            more["lengths"] = _lengths(asking.stretches)
        backend = self.backend
        if asked is not asking:
            if backend == "indexed":  # its ragged form takes as many queries as keys
                backend = "auto"
            more |= {"kv_cu_seqlens": asked.starts, "kv_max_length": asked.longest}
            if "lengths" in more:
                more["kv_lengths"] = _lengths(asked.stretches)
        return kernels.attention(
            q, k, v, scale=attention.sdpa_scale, cu_seqlens=asking.starts, max_length=asking.longest,
            backend=backend, deterministic=self.deterministic, **more,
        ).flatten(1)  # fmt: skip

    def explain(self, heads: int, head_dim: int, like: Tensor) -> str:
        """The backend that will run, and why. Errors: ValueError where the one that was asked for cannot run here."""
        q = like.new_empty((256, heads, head_dim) if self.flat else (2, 128, heads, head_dim)).requires_grad_()
        more: dict[str, Any] = {}
        if self.flat:
            starts = torch.arange(0, 257, 128, dtype=torch.int32, device=like.device)
            more = {"cu_seqlens": starts, "max_length": 128, "lengths": (128, 128)}
        told = kernels.explain_attention(q, q, q, backend=self.backend, deterministic=self.deterministic, **more)
        return told.splitlines()[1].removeprefix("chosen: ")


class Indexed(Dispatched):
    """`fastjepa_kernels.indexed_attention`: all clips in one launch, straight from the packed projection.

    Its flat form takes as many queries as keys: where a last block asks with fewer there is a call for each stretch, or
    with `flat` a ragged one of the library. Rotary positions are turned on the way, from token numbers: no table.
    """

    def __init__(
        self, impl: kernels.Impl, *, flat: bool = False, group: int | None = None, why: str = "asked for"
    ) -> None:
        super().__init__(flat=flat, group=group)
        self.impl: kernels.Impl = impl
        self.why = why

    def check(self, network: nn.Module) -> None:
        """Errors: ValueError as `Dispatched`, and for heads that the kernels do not take."""
        super().check(network)
        for name, module in network.named_modules():
            if isinstance(module, Attention) and module.head_dim not in HEAD_SIZES:
                raise ValueError(
                    f"fastjepa_kernels: expected heads of 16 to 128 channels in steps of 8 in {name}, given "
                    f"{module.head_dim}: use another runtime.attention or runtime.kernels"
                )

    def layout(self, stretches: list[Stretch], device: torch.device, rotary: Rotary | None = None) -> Flat:
        """Where clips begin, the longest, and the token numbers of the rows where attention reads them."""
        layout = flat_layout(self._cut(stretches), device)
        if rotary is None:
            return layout
        places = rotary.places
        rope = kernels.Rope((1, places.height, places.width), THETA, compat=rotary.style == "v2")
        return layout._replace(ids=places.token, rope=rope)

    def attend(self, attention: Attention, x: Tensor, layout: Any) -> Tensor:
        """One launch for all clips, straight from the packed projection and into its gradient.

        The projection runs without its bias, which is added where its rows are read and gets its gradient there.
        """
        heads, bias = (3, attention.num_heads, attention.head_dim), attention.qkv.bias
        packed = F.linear(x, attention.qkv.weight).unflatten(-1, heads)
        return kernels.indexed_attention(
            packed, cu_seqlens=layout.starts, max_length=layout.longest, scale=attention.sdpa_scale, impl=self.impl,
            qkv_bias=None if bias is None else bias.unflatten(0, heads), rope=layout.rope, ids=layout.ids,
        ).flatten(1)  # fmt: skip

    def attend_wanted(self, attention: Attention, normed: Tensor, layout: Any, wanted: Wanted) -> Tensor:
        """With gradients all rows ask: one launch, and no copies where gradients of queries and keys meet.

        The few rows more, a fifth of those of one block, cost less than the copies. Without gradients the wanted alone.
        """
        if torch.is_grad_enabled():
            return self.take(self.attend(attention, normed, layout), wanted.place)
        return super().attend_wanted(attention, normed, layout, wanted)

    def take(self, rows: Tensor, place: Tensor) -> Tensor:
        """The gradient is written once, zeros and all."""
        return kernels.gather_tokens(rows.unsqueeze(0), place.unsqueeze(0), impl=self.impl).squeeze(0)

    def cross(self, attention: Attention, query: Tensor, key_value: Tensor, layout: Any, kv_layout: Any) -> Tensor:
        """The library's ragged attention, or a launch for each stretch."""
        if self.flat:
            return super().cross(attention, query, key_value, layout, kv_layout)
        rows = cross_heads(attention, query, key_value, None, None)
        sides = (layout.stretches, kv_layout.stretches, kv_layout.stretches)
        parts = zip(*(split(one, stretches) for one, stretches in zip(rows, sides)))
        pairs: Iterable[tuple[Tensor, Tensor] | None] = [None] * len(layout.stretches)
        if layout.ids is not None:
            pairs = zip(split(layout.ids, layout.stretches), split(kv_layout.ids, kv_layout.stretches))
        mixed = [
            kernels.indexed_attention(
                *part, scale=attention.sdpa_scale, rope=layout.rope, ids=ids, impl=self.impl
            ).flatten(2)
            for part, ids in zip(parts, pairs)
        ]
        return joined([one.flatten(0, 1) for one in mixed])

    def _heads(
        self, attention: Attention, query: Tensor, key_value: Tensor, layout: Flat, kv_layout: Flat
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For the library, which turns nothing."""
        q, k, v = cross_heads(attention, query, key_value, None, None)
        turned = [
            x if one.rope is None or one.ids is None
            else kernels.rope3d(x.unsqueeze(0), one.ids.unsqueeze(0), one.rope, impl=self.impl).squeeze(0)
            for x, one in ((q, layout), (k, kv_layout))
        ]  # fmt: skip
        return turned[0], turned[1], v


def flat_layout(stretches: Sequence[Stretch], device: torch.device, turn: Turn | None = None) -> Flat:
    """Where each clip's rows begin, counted up on the device: a launch for each stretch."""
    parts, start = [], 0
    for number, (clips, length) in enumerate(stretches, 1):
        end = start + clips * length
        count = clips + (number == len(stretches))
        if length:
            parts.append(torch.arange(start, start + count * length, length, dtype=torch.int32, device=device))
        else:
            parts.append(torch.full((count,), start, dtype=torch.int32, device=device))
        start = end
    starts = torch.cat(parts) if len(parts) > 1 else parts[0]
    return Flat(starts, max(length for _, length in stretches), list(stretches), turn)


def _lengths(stretches: list[Stretch]) -> tuple[int, ...]:
    return tuple(length for clips, length in stretches for _ in range(clips))
