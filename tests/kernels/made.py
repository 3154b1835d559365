"""Rows and indices that the tests of attention share."""

import torch
from torch import Tensor


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def chosen(clips: int, kept: int, rows: int, seed: int = 0) -> Tensor:
    """Of so many rows of each clip some, in any order: int64 [clips, kept]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(rows, generator=generator)[:kept] for _ in range(clips)])
