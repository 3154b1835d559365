"""The grid of tokens that a clip is cut into."""

from collections.abc import Sequence


def token_grid(
    crop_size: int | Sequence[int], num_frames: int, patch_size: int | Sequence[int], tubelet_size: int
) -> tuple[int, int, int]:
    """(time, rows, columns) in tokens of a clip; pixel sizes are one number or (height, width).

    Errors: ValueError for a clip that is smaller than one token.
    """
    crop, patch = _pair(crop_size), _pair(patch_size)
    grid = num_frames // tubelet_size, crop[0] // patch[0], crop[1] // patch[1]
    if min(grid) < 1:
        shown = "x".join(map(str, grid))
        raise ValueError(f"a {shown} grid has no token to mask: the clip is smaller than one patch or tubelet")
    return grid


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
