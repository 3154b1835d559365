"""Philox-4x32-10 and the normal numbers made of its words, in plain PyTorch: integers of 32 bits held in int64.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and its published vectors.
"""

import math

import torch
from torch import Tensor

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of x * factor. In halves of x: the whole product would pass the sign of int64."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four words of counter and two of key, each an int64 tensor of numbers below 2 ** 32 -> four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + STEPS[0]) & LOW, (k1 + STEPS[1]) & LOW
    return c0, c1, c2, c3


def philox_words(row_key: Tensor, width: int, seed: Tensor) -> Tensor:
    """row_key int64 [...], seed int64 of no dims -> int64 [..., groups, 4], words below 2 ** 32.

    A group is four channels, the last one may be used in part. Counter: number of the group, 0, low and high word of
    the row key; key: low and high word of the seed.
    """
    group = torch.arange((width + 3) // 4, device=row_key.device)
    row = row_key.unsqueeze(-1)
    counter = torch.broadcast_tensors(group, torch.zeros_like(group), row & LOW, (row >> 32) & LOW)
    return torch.stack(philox(counter, (seed & LOW, (seed >> 32) & LOW)), dim=-1)


def normals(words: Tensor) -> Tensor:
    """Words [..., 4] -> float64 [..., 4], standard normal: Box-Muller on each of the two pairs.

    The first word of a pair is a uniform number of float32 by definition, (word + 1/2) / 2 ** 32, which keeps all 32
    bits where it is small: never 0, down to 2 ** -33, hence a radius of up to 6.76. The second is an angle, a signed
    part of a turn, so that the numbers are as often negative. All else is float64, so that every device agrees.
    """
    pairs = words.unflatten(-1, (2, 2))
    uniform = (pairs[..., 0].float() + 0.5) * 2.0**-32
    radius = (-2.0 * uniform.double().log()).sqrt()
    signed = pairs[..., 1] - ((pairs[..., 1] >> 31) << 32)
    angle = (signed.double() + 0.5) * (math.pi * 2.0**-31)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)


def noise(row_key: Tensor, width: int, seed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """row_key [...] -> standard normal [..., width], rounded once to `dtype`."""
    return normals(philox_words(row_key, width, seed)).flatten(-2)[..., :width].to(dtype).contiguous()
