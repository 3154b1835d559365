"""The pictures show the masks that were drawn, and clips as the network sees them."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa.masks import Ragged
from fastjepa.pixels import normalise
from fastjepa.viz import clip_picture, mask_picture
from fastjepa.viz.masks import token_grid

SLOTS, HEIGHT, WIDTH, PATCH, TUBELET = 2, 3, 4, 8, 2
GRID = (SLOTS, HEIGHT, WIDTH)


def token_sets(kind: str) -> tuple[list, list]:
    """Context and target of two sets over two clips; only the first clip is drawn."""
    tokens = torch.randperm(SLOTS * HEIGHT * WIDTH, generator=torch.Generator().manual_seed(0))
    if kind == "dense":
        return [tokens[:10].view(2, 5), tokens[4:20].view(2, 8)], [tokens[12:24].view(2, 6), tokens[:2].view(2, 1)]
    context = [Ragged(tokens[:9], (3, 6)), Ragged(tokens[4:20], (8, 8))]
    return context, [Ragged(tokens[12:], (7, 5)), Ragged(tokens[:4], (1, 3))]


def first_clip(token_set) -> list[int]:
    if isinstance(token_set, Ragged):
        return token_set.index[: token_set.lengths[0]].tolist()
    return token_set[0].tolist()


@pytest.mark.parametrize("kind", ["dense", "ragged"])
def test_the_grid_marks_the_tokens_of_the_first_clip(kind):
    context, target = token_sets(kind)
    for token_set in context + target:
        grid = token_grid(token_set, GRID)
        assert grid.shape == GRID
        assert {t * HEIGHT * WIDTH + h * WIDTH + w for t, h, w in np.argwhere(grid).tolist()} == set(
            first_clip(token_set)
        )


def as_bytes(pixels):
    """Pixels in 0..1 as the nearest grey levels."""
    return (pixels * 255).round().to(torch.uint8)


@pytest.mark.parametrize("given", ["floats", "bytes"])
@pytest.mark.parametrize("kind", ["dense", "ragged"])
def test_the_picture_shows_kept_tokens_and_darkens_the_others(kind, given, tmp_path, drawn):
    pixels = torch.rand(3, SLOTS * TUBELET, HEIGHT * PATCH, WIDTH * PATCH, generator=torch.Generator().manual_seed(0))
    pixels = pixels / 2 + 0.5  # brighter than anything darkened
    context, target = token_sets(kind)
    path = tmp_path / "viz" / "masks.png"
    if given == "bytes":
        clip, pixels = as_bytes(pixels), as_bytes(pixels) / 255
    else:
        clip = normalise(pixels * 255)
    mask_picture(clip, context, target, TUBELET, PATCH, path)

    everything = list(range(SLOTS * HEIGHT * WIDTH))
    order = [everything] + [first_clip(s) for pair in zip(context, target) for s in pair]
    assert len(drawn) == len(order) * SLOTS
    for row, tokens in enumerate(order):
        for slot in range(SLOTS):
            image, frame = drawn[row * SLOTS + slot], pixels[:, slot * TUBELET].permute(1, 2, 0).numpy()
            for cell in range(HEIGHT * WIDTH):
                h, w = cell // WIDTH * PATCH, cell % WIDTH * PATCH
                have, want = (x[h : h + PATCH, w : w + PATCH] for x in (image, frame))
                if slot * HEIGHT * WIDTH + cell in tokens:
                    assert np.allclose(have, want, atol=1e-5)
                else:
                    assert have.max() < 0.4
                    assert np.ptp(have, axis=(0, 1)).max() == 0
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert 200 < picture.width < 2000
        assert 400 < picture.height < 2000


@pytest.mark.parametrize("given", ["floats", "bytes"])
def test_the_clip_picture_shows_frames_with_the_normalisation_undone(given, tmp_path, drawn):
    pixels = torch.rand(3, 3, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "viz" / "clips.png"
    if given == "bytes":
        shown, pixels = as_bytes(pixels), as_bytes(pixels) / 255
    else:
        shown = [normalise(clip * 255) for clip in pixels]
    clip_picture(list(shown), ["a", "b", "c"], 2, path)
    assert len(drawn) == 3 * 3
    for place, image in enumerate(drawn):
        want = pixels[place // 3][:, 2 * (place % 3)].permute(1, 2, 0).numpy()
        assert np.allclose(image, want, atol=1e-5)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
