"""Autocast and operations with matrix products: the dtype it asks for, and a way to keep it out."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to `F.linear` on the device of `x`; None where it is off or leaves `x` alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def as_given(x: Tensor) -> AbstractContextManager[object]:
    """Library products in this block run in the dtypes of their inputs, under autocast as well."""
    return torch.autocast(x.device.type, enabled=False)
