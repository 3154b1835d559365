"""Rotary positions on three axes: queries and keys are turned by the place of their token in the grid.

B clips, N tokens, R rows, H heads of d channels. Each axis turns s = 2 * ((d // 3) // 2) neighbouring channels of a
head, time first, then rows, then columns; the rest stays as it is. Source: V-JEPA 2 (arXiv 2506.09985, section 2.1).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

RopeStyle = Literal["v2", "interleaved"]
STYLES: tuple[RopeStyle, ...] = ("v2", "interleaved")
THETA = 10000.0


@dataclass(frozen=True)
class Places:
    """Which tokens rows are: numbers int64 [R], or [B, N] (or [N], the same in all clips), in frames of height x width.

    Token n lies at time n // (height * width), row n // width % height, column n % width: a shorter clip has the same
    numbers as the beginning of a longer one.
    """

    token: Tensor
    height: int
    width: int

    def axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """(time, row, column) of every row."""
        plane = self.height * self.width
        return self.token // plane, self.token // self.width % self.height, self.token % self.width


class Turn(NamedTuple):
    """The cosines and sines of every channel of a head, [..., d] each; channels that stay have 1 and 0."""

    cosine: Tensor
    sine: Tensor


def axis_channels(head_dim: int) -> int:
    """Channels of a head that an axis turns."""
    return 2 * (head_dim // 3 // 2)


def axis_angles(position: Tensor, channels: int, style: RopeStyle, dtype: torch.dtype) -> Tensor:
    """Angles of the channels of one axis at these positions [...]: [..., channels].

    Frequency j of s / 2 is 10000 ** (-2 j / s). Both channels of a pair turn by one angle with `interleaved`; the
    released weights were trained with `v2`, where the list of angles is repeated as a whole, which is no rotation.
    """
    half = channels // 2
    pace = THETA ** (-torch.arange(half, device=position.device, dtype=dtype) / half)
    angle = position.to(dtype).unsqueeze(-1) * pace
    return torch.cat([angle, angle], -1) if style == "v2" else angle.repeat_interleave(2, -1)


def turn_of(places: Places, head_dim: int, style: RopeStyle, dtype: torch.dtype = torch.float32) -> Turn:
    """What `turned` needs for rows at these places, made once for all heads and layers."""
    channels = axis_channels(head_dim)
    angle = torch.cat([axis_angles(axis, channels, style, dtype) for axis in places.axes()], -1)
    rest = (*angle.shape[:-1], head_dim - 3 * channels)
    return Turn(torch.cat([angle.cos(), angle.new_ones(rest)], -1), torch.cat([angle.sin(), angle.new_zeros(rest)], -1))


def turned(x: Tensor, turn: Turn) -> Tensor:
    """Channels turned in the precision of the angles, rounded once: x [..., d], `turn` of a shape that broadcasts."""
    return (x * turn.cosine + _swapped(x) * turn.sine).to(x.dtype)


def rotated(x: Tensor, places: Places, style: RopeStyle) -> Tensor:
    """Queries or keys x [B, H, N, d], turned axis by axis by angles that are made here, as the public code does."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels = axis_channels(x.shape[-1])
    parts = list(x.split([channels] * 3 + [x.shape[-1] - 3 * channels], dim=-1))
    for axis, position in enumerate(places.axes()):
        angle = axis_angles(position, channels, style, dtype)
        if angle.ndim == 3:  # numbers of each clip: the same for all its heads
            angle = angle.unsqueeze(1)
        parts[axis] = turned(parts[axis], Turn(angle.cos(), angle.sin()))
    return torch.cat(parts, dim=-1)


def _swapped(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for neighbouring channels."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-second, first], -1).flatten(-2)
