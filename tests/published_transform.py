"""The published transform of a clip by definition, frame by frame, for tests that compare with it."""

import numpy as np
import torch
import torch.nn.functional as F

from fastjepa.pixels import MEAN, STD


def picture(frames, boxes, flip, size, white=255.0):
    """Crop, mean of neighbours, mirror: float32 [3, T, size, size], whose pixels reach to `white`."""
    done = []
    for frame, box in zip(frames, boxes, strict=True):
        window = frame[box.top : box.top + box.height, box.left : box.left + box.width].astype(np.float32)
        window = torch.from_numpy(window.transpose(2, 0, 1) / np.float32(255 / white))[None]
        done.append(F.interpolate(window, size=(size, size), mode="bilinear", align_corners=False))
    clip = torch.cat(done).transpose(0, 1)
    return clip.flip(-1) if flip else clip


def published(frames, boxes, flip, size, white=255.0):
    """The picture normalised."""
    mean, std = (torch.tensor(value).view(3, 1, 1, 1) * white for value in (MEAN, STD))
    return (picture(frames, boxes, flip, size, white) - mean) / std


def grey_levels(frames, boxes, flip, size, white=255.0):
    """The picture in whole grey levels, the nearest: uint8."""
    levels = torch.round(picture(frames, boxes, flip, size, white) * (255.0 / white))
    assert levels.min() >= 0
    assert levels.max() <= 255
    return levels.to(torch.uint8)
