"""Counter-based random streams: a draw is a pure function of what it is for.

Nothing is carried from one draw to the next, so any number of workers and processes, any prefetch depth and any resume
see the same numbers, and there is no generator state to save.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is used for. Two purposes never share numbers; the values are part of a run's identity."""

    PERMUTATION = 1
    CLIP = 2
    REPLACEMENT = 3
    MASK = 4
    MASK_CUT = 5
    NOISE = 6
    PROBE = 7
    MOTION = 8
    AUGMENT = 9
    ERASE = 10
    MIXTURE = 11
    DRAW = 12
    DROP_PATH = 13


def stream(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """A fresh generator for (seed, purpose, counters), at most three counters. Source: Philox 4x64 (Random123)."""
    if len(counters) > 3:
        raise ValueError(f"a stream takes at most three counters, got {counters}")
    words = [0, *counters, *([0] * (3 - len(counters)))]
    return np.random.Generator(np.random.Philox(key=[seed, int(purpose)], counter=words))


def torch_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """A 63-bit seed for a torch generator, from the same streams."""
    return int(stream(seed, purpose, *counters).integers(0, 2**63 - 1))
