"""Gather and scatter of tokens in plain PyTorch. B clips, M masks, N tokens, K kept tokens, D width."""

import torch
from torch import Tensor


def gather(x: Tensor, index: Tensor, unique: bool = True) -> Tensor:
    """x [B, N, D], index [M, B, K] -> [M * B, K, D], mask after mask. `unique` is for the backward pass alone."""
    masks, clips, kept = index.shape
    expanded = index.long().unsqueeze(-1).expand(-1, -1, -1, x.shape[2])
    return torch.gather(x.expand(masks, *x.shape), 2, expanded).reshape(masks * clips, kept, x.shape[2])


def gather_backward(gradient: Tensor, index: Tensor, tokens: int, unique: bool) -> Tensor:
    """Gradient [M * B, K, D] of the kept tokens -> [B, N, D]; summed in float32 at least, rounded once.

    `unique` says that no mask names a token twice, which a plain sum does not need to know.
    """
    masks, clips, kept = index.shape
    wide = torch.promote_types(gradient.dtype, torch.float32)
    total = torch.zeros(clips, tokens, gradient.shape[-1], dtype=wide, device=gradient.device)
    for rows, where in zip(gradient.view(masks, clips, kept, gradient.shape[2]), index.long()):
        total.scatter_add_(1, where.unsqueeze(-1).expand(-1, -1, rows.shape[-1]), rows.to(wide))
    return total.to(gradient.dtype)


def scatter(x: Tensor, index: Tensor, tokens: int, fill: Tensor | None) -> Tensor:
    """x [B, K, D], index [B, K] -> [B, N, D] with `fill` [D] or zeros where no token is put."""
    clips, _, width = x.shape
    row = x.new_zeros(width) if fill is None else fill.to(x.dtype)
    out = row.expand(clips, tokens, width).contiguous()
    return out.scatter_(1, index.long().unsqueeze(-1).expand(-1, -1, width), x)
