"""From decoded frames to the clip that the network sees."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.data.augment import augment
from fastjepa.data.sampling import Box, ClipDraw, shifted_boxes
from fastjepa.pixels import normalise


def transform(
    frames: np.ndarray, draw: ClipDraw, size: int, *, floats: bool = False, antialias: bool = False
) -> Tensor:
    """uint8 [T, H, W, 3] -> uint8 [3, T, size, size]: augment, crop and resize, mirror; the published order.

    Resized values are rounded to the nearest grey level, which costs at most half of one against the published clip;
    networks normalise them. `floats` gives the published clip itself, normalised float32, and erases: the noise of
    erasing is drawn in that space. Augmented clips are resized on the 0..1 scale instead of 0..255, as published; the
    two differ by rounding. `antialias`: a triangle filter as wide as a new pixel where the box shrinks, which the
    published transform does not have. Errors: ValueError for an erased clip without `floats`.
    """
    if draw.erase is not None and not floats:
        raise ValueError("transform: expected floats=True for a clip with erasing, whose noise has no grey levels")
    white = 255.0
    if draw.augment is not None:
        frames, white = augment(frames, draw.augment), 1.0
    clip = _picture(frames, draw.box, draw.flip, size, draw.end_box, white, antialias)
    if not floats:
        return clip.mul_(255.0 / white).round_().clamp_(0, 255).to(torch.uint8)
    clip = normalise(clip, white)
    if draw.erase is not None:
        box = draw.erase.box
        window = clip[:, :, box.top : box.top + box.height, box.left : box.left + box.width]
        window.copy_(torch.from_numpy(draw.erase.noise))
    return clip


def cut(frames: np.ndarray, box: Box, flip: bool, size: int) -> Tensor:
    """uint8 [T, H, W, 3] -> normalised float32 [3, T, size, size]: crop, resize, mirror, without rounding.

    Bilinear without antialiasing on half-pixel centres, the same box in every frame: the published transform.
    """
    return normalise(_picture(frames, box, flip, size, None, 255.0))


def _picture(
    frames: np.ndarray, box: Box, flip: bool, size: int, end_box: Box | None, white: float, antialias: bool = False
) -> Tensor:
    """float32 [3, T, size, size] in 0..white: cropped, resized and mirrored, in memory of its own.

    The box is the same in every frame, or moves linearly to `end_box`.
    """
    boxes = [box] * len(frames) if end_box is None else shifted_boxes(box, end_box, len(frames))
    # A frame at a time: the float copy of all frames' boxes would leave the processor's caches.
    clip = torch.cat([_resized(frames[i : i + 1], one, size, white, antialias) for i, one in enumerate(boxes)])
    if flip:
        clip = clip.flip(-1)
    return clip.permute(1, 0, 2, 3).contiguous()


def _resized(frames: np.ndarray, box: Box, size: int, white: float, antialias: bool) -> Tensor:
    """float32 [T, 3, size, size] in 0..white."""
    window = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    clip = torch.from_numpy(np.ascontiguousarray(window)).permute(0, 3, 1, 2).float()
    if white != 255.0:
        clip = clip / 255.0 * white
    if (box.height, box.width) != (size, size):
        clip = F.interpolate(clip, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias)
    return clip
