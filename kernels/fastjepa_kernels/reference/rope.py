"""Rotary positions on three axes in plain PyTorch: angles of float32 at least, from token numbers."""

import torch
from torch import Tensor


def rope3d(
    q: Tensor,
    k: Tensor | None,
    ids: Tensor,
    height: int,
    width: int,
    theta: float,
    compat: bool,
    back: bool,
) -> tuple[Tensor, Tensor]:
    """q and k [B, K, H, d] turned by the token numbers ids [B, K]; without k, [0] stands for it.

    `back` is the transposed map, which gives gradients: the inverse rotation, unless `compat` makes it none.
    """
    segment = 2 * (q.shape[-1] // 3 // 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    place = torch.stack([ids // (height * width), ids // width % height, ids % width], dim=-1).to(wide)
    pace = theta ** (-torch.arange(segment // 2, device=q.device, dtype=wide) / (segment // 2))
    angle = place.unsqueeze(-1) * pace
    # Two channels of a pair have one angle; in the released weights the list of angles is repeated as a whole.
    angle = torch.cat([angle, angle], -1) if compat else angle.repeat_interleave(2, -1)
    angle = angle.flatten(-2).unsqueeze(-2)
    sine, cosine = angle.sin(), angle.cos()

    def turn(x: Tensor) -> Tensor:
        turned, rest = x.contiguous().to(wide).split([3 * segment, x.shape[-1] - 3 * segment], dim=-1)
        swapped = -_swap(turned * sine) if back else _swap(turned) * sine
        return torch.cat([turned * cosine + swapped, rest], -1).to(x.dtype)

    return turn(q), q.new_empty(0) if k is None else turn(k)


def _swap(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for neighbouring channels."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-second, first], -1).flatten(-2)
