"""Every kernel and setting that is launched, in one list."""

from collections.abc import Iterator

from fastjepa_kernels._triton import gather, norms, target_loss, updates
from fastjepa_kernels._triton.launch import Shipped


def shipped() -> Iterator[Shipped]:
    """All of them, module by module."""
    yield from gather.shipped()
    yield from norms.shipped()
    yield from target_loss.shipped()
    yield from updates.shipped()
