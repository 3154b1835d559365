"""From bytes to the numbers that a network reads: normalised pixels, [..., C, T, H, W].

Pixels travel as uint8 as long as they can, a quarter of the bytes of float32. Rounding to a grey level costs at most
half of one, 1/510 of the range from black to white.
"""

import torch
from torch import Tensor

# ImageNet statistics on the 0..1 scale, as published.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(clip: Tensor, white: float = 255.0) -> Tensor:
    """float32 [C, T, H, W] in 0..white -> zero mean and unit variance over natural images."""
    mean = torch.tensor(MEAN).view(-1, 1, 1, 1) * white
    std = torch.tensor(STD).view(-1, 1, 1, 1) * white
    return (clip - mean) / std


def as_floats(pixels: Tensor, dtype: torch.dtype = torch.float32, *, channel: int = -4) -> Tensor:
    """uint8 [..., C, T, H, W] -> the same pixels normalised, in `dtype`; floats are returned as they are.

    `channel` is the dimension of the channels. Computed in float32 at least and rounded once; equal to `normalise` to
    rounding. Errors: ValueError for other integers, or for bytes of other than three channels.
    """
    if pixels.is_floating_point():
        return pixels
    if pixels.dtype != torch.uint8:
        raise ValueError(f"clips: expected uint8 or normalised floats, given {pixels.dtype}")
    if pixels.shape[channel] != len(MEAN):
        raise ValueError(f"clips: expected uint8 of {len(MEAN)} channels, given {list(pixels.shape)}")
    wide = torch.promote_types(dtype, torch.float32)
    behind = [1] * (pixels.ndim - 1 - channel % pixels.ndim)
    scale, offset = (
        _on_device(values, wide, pixels.device).view(-1, *behind)
        for values in ([1 / (255 * std) for std in STD], [-mean / std for mean, std in zip(MEAN, STD)])
    )
    if pixels.device.type == "cpu":  # which widens bytes far faster by themselves
        return pixels.to(wide).mul_(scale).add_(offset).to(dtype)
    # One pass that reads bytes and writes `dtype`: a GPU makes no float copy in between.
    return torch.addcmul(offset, pixels, scale, out=torch.empty(pixels.shape, dtype=dtype, device=pixels.device))


def _on_device(values: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)]. By fills, not by a copy: the host waits for nothing."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
