"""What the matrix products share: the order of their tiles."""

import triton
import triton.language as tl


@triton.jit
def tile_of(number, down, across, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP tiles down, then one across, so that neighbours in time share their inputs."""
    group = number // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = number % (GROUP * across)
    return group * GROUP + within % height, within // height
