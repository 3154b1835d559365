"""Evaluation views against a plain statement of what they are."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch

from fastjepa.data.views import resize, resize_shorter_side, views
from fastjepa.pixels import MEAN, STD


def film(height, width, frames=2):
    return np.random.default_rng(height * width).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def normalised(window):
    clip = (window / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(clip.transpose(3, 0, 1, 2).astype(np.float32))


def taps(old, new, number):
    """The two old pixels of one new pixel, and how much of the second, as a fraction."""
    place = min(max(Fraction(2 * number + 1, 2) * Fraction(old, new) - Fraction(1, 2), 0), old - 1)
    first = floor(place)
    return first, min(first + 1, old - 1), place - first


@pytest.mark.parametrize(
    ("old", "new"), [((13, 17), (7, 9)), ((9, 8), (16, 21)), ((1, 5), (4, 2)), ((12, 20), (6, 10))]
)
def test_a_resized_pixel_is_the_weighted_mean_of_its_four_neighbours(old, new):
    """Whole grey levels with fixed-point weights of 11 bits: the exact mean lies less than one and a bit away."""
    source = film(*old, frames=1)
    result = resize(source, *new)
    assert result.dtype == np.uint8
    assert result.shape == (1, *new, 3)
    errors = []
    for row in range(new[0]):
        top, bottom, down = taps(old[0], new[0], row)
        for column in range(new[1]):
            left, right, across = taps(old[1], new[1], column)
            for channel in range(3):
                at = [[int(source[0, y, x, channel]) for x in (left, right)] for y in (top, bottom)]
                upper, lower = ((1 - across) * a + across * b for a, b in at)
                errors.append(float(int(result[0, row, column, channel]) - ((1 - down) * upper + down * lower)))
    assert max(map(abs, errors)) < 0.8
    assert abs(np.mean(errors)) < 0.25  # rounded, not cut off


def test_halving_is_the_rounded_mean_of_four():
    source = film(8, 12).astype(int)
    four = source[:, ::2, ::2] + source[:, 1::2, ::2] + source[:, ::2, 1::2] + source[:, 1::2, 1::2]
    assert np.array_equal(resize(source.astype(np.uint8), 4, 6), (four + 2) // 4)


def test_a_plain_picture_stays_plain_and_the_same_size_changes_nothing():
    for value in (0, 1, 127, 254, 255):
        assert (resize(np.full((1, 11, 13, 3), value, np.uint8), 7, 29) == value).all()
    source = film(9, 14)
    assert np.array_equal(resize(source, 9, 14), source)
    assert resize_shorter_side(source, 9) is source


@pytest.mark.parametrize(
    ("old", "side", "new"),
    [((45, 60), 32, (32, 42)), ((60, 45), 32, (42, 32)), ((30, 30), 7, (7, 7)), ((20, 31), 33, (33, 51))],
)
def test_the_shorter_side_is_asked_for_and_the_longer_one_follows_rounded_down(old, side, new):
    assert resize_shorter_side(film(*old), side).shape == (2, *new, 3)


@pytest.mark.parametrize(
    ("shape", "top", "left"), [((32, 41), 2, 6), ((32, 43), 2, 8), ((41, 32), 6, 2), ((32, 32), 2, 2)]
)
def test_one_view_is_the_centre_with_half_pixels_to_the_even_side(shape, top, left):
    source = film(*shape)
    (view,) = views(source, 28)
    assert view.dtype == torch.float32
    assert view.is_contiguous()
    torch.testing.assert_close(view, normalised(source[:, top : top + 28, left : left + 28]))


@pytest.mark.parametrize(("size", "short"), [(224, 256), (384, 438), (32, 36), (7, 8)])
def test_one_view_leaves_a_seventh_around_the_crop(size, short):
    source = film(short, short, frames=1)
    offset = round((short - size) / 2)
    (view,) = views(source, size)
    torch.testing.assert_close(view, normalised(source[:, offset : offset + size, offset : offset + size]))


@pytest.mark.parametrize(("length", "k", "starts"), [(49, 3, [0, 10, 20]), (28, 3, [0, 0, 0]), (50, 2, [0, 22])])
def test_several_views_lie_evenly_along_the_longer_side(length, k, starts):
    wide = film(28, length)
    tall = np.ascontiguousarray(wide.transpose(0, 2, 1, 3))
    for number, (start, across, down) in enumerate(zip(starts, views(wide, 28, k), views(tall, 28, k), strict=True)):
        wanted = normalised(wide[:, :, start : start + 28])
        torch.testing.assert_close(across, wanted)
        assert torch.equal(down, across.transpose(2, 3)), number


def test_several_views_are_cut_after_the_shorter_side_was_resized():
    source = film(20, 60)
    resized = resize(source, 10, 30)
    found = views(source, 10, 2)
    torch.testing.assert_close(found[0], normalised(resized[:, :, :10]))
    torch.testing.assert_close(found[1], normalised(resized[:, :, 20:]))


def test_turned_frames_are_taken_and_left_as_they_are():
    source = np.rot90(film(30, 44), axes=(1, 2))
    before = source.copy()
    for k in (1, 2):
        for view, wanted in zip(views(source, 16, k), views(before, 16, k), strict=True):
            assert torch.equal(view, wanted)
    assert np.array_equal(source, before)


@pytest.mark.parametrize(("size", "k"), [(0, 1), (16, 0), (-1, 3)])
def test_senseless_sizes_and_numbers_are_refused(size, k):
    with pytest.raises(ValueError, match=f"at least 1, given {size} and {k}"):
        views(film(20, 20), size, k)
