"""What the matrix products share: the order of their tiles, and how many programs walk through them."""

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def tile_of(number, down, across, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP tiles down, then one across, so that neighbours in time share their inputs."""
    group = number // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = number % (GROUP * across)
    return group * GROUP + within % height, within // height


@cache
def processors(device: torch.device) -> int:
    """Programs that run at once: one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
