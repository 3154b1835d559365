"""From decoded frames to the clip that the network sees."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.data.sampling import Box

# ImageNet statistics on the 0..1 scale, as published.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(clip: Tensor) -> Tensor:
    """float32 [C, T, H, W] in 0..255 -> zero mean and unit variance over natural images."""
    mean = torch.tensor(MEAN).view(-1, 1, 1, 1) * 255.0
    std = torch.tensor(STD).view(-1, 1, 1, 1) * 255.0
    return (clip - mean) / std


def cut(frames: np.ndarray, box: Box, flip: bool, size: int) -> Tensor:
    """uint8 [T, H, W, 3] -> normalised float32 [3, T, size, size]: crop, resize, mirror.

    Bilinear without antialiasing on half-pixel centres, the same box in every frame (the published transform).
    """
    window = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    clip = torch.from_numpy(np.ascontiguousarray(window)).permute(0, 3, 1, 2).float()
    if (box.height, box.width) != (size, size):
        clip = F.interpolate(clip, size=(size, size), mode="bilinear", align_corners=False)
    if flip:
        clip = clip.flip(-1)
    return normalise(clip.permute(1, 0, 2, 3).contiguous())
