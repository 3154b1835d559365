"""Evaluation views of a clip: what the published evaluation cuts out of decoded frames."""

import numpy as np
import torch
from torch import Tensor

from fastjepa.pixels import normalise

# OpenCV's bilinear weights are whole numbers of 1 / 2048.
WEIGHT_ONE = 1 << 11


def views(frames: np.ndarray, size: int, k: int = 1) -> list[Tensor]:
    """uint8 [T, H, W, 3] -> k normalised views, each float32 [3, T, size, size].

    One view: the shorter side becomes size * 256 / 224, and the centre is cut out. Several: the shorter side becomes
    `size`, and k squares are cut out evenly along the longer one, from its start on. Errors: ValueError for a size or
    number below 1. Source: the evaluation transform of V-JEPA (arXiv 2404.08471, appendix).
    """
    if size < 1 or k < 1:
        raise ValueError(f"views: expected a size and a number of at least 1, given {size} and {k}")
    frames = resize_shorter_side(frames, size * 256 // 224 if k == 1 else size)
    height, width = frames.shape[1:3]
    if k == 1:
        # Half a pixel goes to the even side: Python's `round`, as published.
        corners = [(round((height - size) / 2), round((width - size) / 2))]
    else:
        step = (max(height, width) - size) // (k - 1)
        corners = [(i * step, 0) if height > width else (0, i * step) for i in range(k)]
    return [_to_clip(frames[:, top : top + size, left : left + size]) for top, left in corners]


def _to_clip(window: np.ndarray) -> Tensor:
    clip = torch.from_numpy(np.ascontiguousarray(window)).permute(3, 0, 1, 2).float()
    return normalise(clip / 255, 1.0).contiguous()


def resize_shorter_side(frames: np.ndarray, side: int) -> np.ndarray:
    """uint8 [T, H, W, 3] -> uint8 with min(H, W) = side; the longer side in proportion, rounded down."""
    height, width = frames.shape[1:3]
    if min(height, width) == side:
        return frames
    if width < height:
        return resize(frames, side * height // width, side)
    return resize(frames, side, side * width // height)


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [T, H, W, 3] -> uint8 [T, height, width, 3]: bilinear on half-pixel centres, without antialiasing.

    The result is that of OpenCV's INTER_LINEAR on bytes, to the bit: rows first, with weights of 11 bits; then columns,
    where four low bits of the row sums and 16 of the products are dropped before the sum is rounded.
    """
    left, right, left_weight, right_weight = _taps(frames.shape[2], width)
    top, bottom, top_weight, bottom_weight = _taps(frames.shape[1], height)

    def weighted(lines: np.ndarray, weight: np.ndarray) -> np.ndarray:
        used = frames[:, lines]  # of a large picture less than half
        row = used.take(left, 2) * left_weight[:, None] + used.take(right, 2) * right_weight[:, None]
        return (row >> 4) * weight[:, None, None] >> 16

    return (weighted(top, top_weight) + weighted(bottom, bottom_weight) + 2 >> 2).astype(np.uint8)


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For every new pixel of a line: its two old pixels (int64 [new]) and their weights (int32 [new])."""
    place = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    place = np.clip(place, 0, old - 1)  # outside the centres of the first and last pixel the edge goes on
    first = np.floor(place).astype(np.int64)
    share = place - first.astype(np.float32)
    left, right = (np.rint(part * WEIGHT_ONE).astype(np.int32) for part in (1 - share, share))
    return first, np.minimum(first + 1, old - 1), left, right
