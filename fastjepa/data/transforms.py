"""From decoded frames to the clip that the network sees."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.data.augment import augment
from fastjepa.data.sampling import Box, ClipDraw, shifted_boxes

# ImageNet statistics on the 0..1 scale, as published.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(clip: Tensor, white: float = 255.0) -> Tensor:
    """float32 [C, T, H, W] in 0..white -> zero mean and unit variance over natural images."""
    mean = torch.tensor(MEAN).view(-1, 1, 1, 1) * white
    std = torch.tensor(STD).view(-1, 1, 1, 1) * white
    return (clip - mean) / std


def transform(frames: np.ndarray, draw: ClipDraw, size: int) -> Tensor:
    """uint8 [T, H, W, 3] -> float32 [3, T, size, size]: augment, crop and resize, mirror, normalise, erase.

    The published order. Augmented clips are resized and normalised on the 0..1 scale instead of 0..255, as published;
    the two differ by rounding.
    """
    white = 255.0
    if draw.augment is not None:
        frames, white = augment(frames, draw.augment), 1.0
    clip = cut(frames, draw.box, draw.flip, size, draw.end_box, white)
    if draw.erase is not None:
        box = draw.erase.box
        window = clip[:, :, box.top : box.top + box.height, box.left : box.left + box.width]
        window.copy_(torch.from_numpy(draw.erase.noise))
    return clip


def cut(
    frames: np.ndarray, box: Box, flip: bool, size: int, end_box: Box | None = None, white: float = 255.0
) -> Tensor:
    """uint8 [T, H, W, 3] -> normalised float32 [3, T, size, size]: crop, resize, mirror.

    Bilinear without antialiasing on half-pixel centres, the same box in every frame (the published transform) or one
    that moves linearly to `end_box`. `white` is the value of a white pixel while resizing.
    """
    if end_box is None:
        clip = _resized(frames, box, size, white)
    else:
        boxes = shifted_boxes(box, end_box, len(frames))
        clip = torch.cat([_resized(frames[i : i + 1], moved, size, white) for i, moved in enumerate(boxes)])
    if flip:
        clip = clip.flip(-1)
    return normalise(clip.permute(1, 0, 2, 3).contiguous(), white)


def _resized(frames: np.ndarray, box: Box, size: int, white: float) -> Tensor:
    """float32 [T, 3, size, size] in 0..white."""
    window = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    clip = torch.from_numpy(np.ascontiguousarray(window)).permute(0, 3, 1, 2).float()
    if white != 255.0:
        clip = clip / 255.0 * white
    if (box.height, box.width) != (size, size):
        clip = F.interpolate(clip, size=(size, size), mode="bilinear", align_corners=False)
    return clip
