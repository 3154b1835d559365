"""RandAugment: every operation against a plain statement in numpy, and how operations are drawn."""

from math import comb, cos, radians, sin

import numpy as np
import pytest

from fastjepa.data.augment import OPS, Op, augment, draw_ops, level
from fastjepa.data.sampling import Augmentation, ClipPlan
from fastjepa.streams import Purpose, stream

HEIGHT, WIDTH = 40, 56


@pytest.fixture(scope="module")
def noise():
    """Every grey level occurs in each channel, in unequal numbers, and no two frames are alike."""
    rng = np.random.default_rng(0)
    frames = (rng.integers(0, 256, (3, HEIGHT, WIDTH, 3)) * [1.0, 0.8, 0.6] + [0, 20, 90]).astype(np.uint8)
    frames[:, :4, :, 0] = 17
    return frames


def smooth(x, y):
    """A picture as a function of place in pixels; pixel (0, 0) is the square whose centre is (0.5, 0.5)."""
    return np.stack([128 + 90 * np.sin(x / 18 + k) * np.cos(y / 22 - k) for k in range(3)], -1)


def centres():
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return x, y


def one(frames, name, value=0.0):
    result = augment(frames, (Op(name, value),))
    assert result.dtype == np.uint8
    assert result.shape == frames.shape
    return result.astype(int)


# -- pixels -----------------------------------------------------------------------------------------------------------


def test_invert(noise):
    assert np.array_equal(one(noise, "invert"), 255 - noise.astype(int))


@pytest.mark.parametrize("bits", [0, 1, 2, 4])
def test_posterize_keeps_the_upper_bits(noise, bits):
    step = 2 ** (8 - bits)
    assert np.array_equal(one(noise, "posterize", bits), noise.astype(int) // step * step)


@pytest.mark.parametrize("threshold", [0, 77, 256])
def test_solarize_inverts_from_the_threshold_on(noise, threshold):
    x = noise.astype(int)
    assert np.array_equal(one(noise, "solarize", threshold), np.where(x < threshold, x, 255 - x))


@pytest.mark.parametrize("addition", [0, 77, 110])
def test_solarize_add_brightens_the_darker_half(noise, addition):
    x = noise.astype(int)
    assert np.array_equal(one(noise, "solarize_add", addition), np.where(x < 128, x + addition, x))


def test_auto_contrast_stretches_each_channel_of_each_frame_over_all_levels(noise):
    x = noise.astype(float)
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    assert ((low > 0) | (high < 255)).any()
    assert np.abs(one(noise, "auto_contrast") - (x - low) / (high - low) * 255).max() <= 1


def test_equalize_makes_levels_equally_frequent(noise):
    """The new level is the share of pixels that are darker, of all but the brightest level."""
    result = one(noise, "equalize")
    for frame in range(3):
        for channel in range(3):
            x = noise[frame, :, :, channel].ravel().astype(int)
            top = x.max()
            step = (x < top).sum() // 255
            wanted = np.array([min(255, (step // 2 + (x < value).sum()) // step) for value in range(256)])
            assert np.array_equal(result[frame, :, :, channel].ravel(), wanted[x])


def grey(x):
    return np.rint(x @ np.array([0.299, 0.587, 0.114]))[..., None]


def blurred(x):
    """The mean of nine pixels of which the middle one counts five times; the border stays."""
    wide = sum(x[:, 1 + i : x.shape[1] - 1 + i, 1 + j : x.shape[2] - 1 + j] for i in (-1, 0, 1) for j in (-1, 0, 1))
    result = x.copy()
    result[:, 1:-1, 1:-1] = (wide + 4 * x[:, 1:-1, 1:-1]) / 13
    return result


DULL = {
    "color": grey,
    "contrast": lambda x: np.rint(grey(x).mean((1, 2), keepdims=True)) + 0 * x,
    "brightness": lambda x: 0 * x,
    "sharpness": blurred,
}


@pytest.mark.parametrize("factor", [0.1, 0.37, 1.0, 1.63, 1.9])
@pytest.mark.parametrize("name", DULL)
def test_enhancements_move_from_a_dull_picture_through_the_given_one_and_beyond(noise, name, factor):
    x = noise.astype(float)
    dull = DULL[name](x)
    wanted = np.clip(dull + factor * (x - dull), 0, 255)
    assert np.abs(one(noise, name, factor) - wanted).max() <= 1 + abs(1 - factor)  # cut off; the dull one is rounded


def shown(name, value):
    """Where the pixel at each place comes from."""
    x, y = centres()
    match name:
        case "shear_x":
            return x + value * y, y
        case "shear_y":
            return x, y + value * x
        case "translate_x":
            return x + value * WIDTH, y
        case "translate_y":
            return x, y + value * HEIGHT
    turn, dx, dy = radians(value), x - WIDTH / 2, y - HEIGHT / 2
    return WIDTH / 2 + dx * cos(turn) - dy * sin(turn), HEIGHT / 2 + dx * sin(turn) + dy * cos(turn)


@pytest.mark.parametrize(
    ("name", "values"),
    [("shear_x", 0.3), ("shear_y", 0.21), ("translate_x", 0.315), ("translate_y", 0.45), ("rotate", 21.0)],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_geometry_shows_what_was_elsewhere_and_grey_where_nothing_was(name, values, sign):
    picture = np.rint(smooth(*centres()))[None].astype(np.uint8)
    result = one(picture, name, sign * values)[0]
    x, y = shown(name, sign * values)
    inside = (x > 2) & (x < WIDTH - 2) & (y > 2) & (y < HEIGHT - 2)
    outside = (x < -0.01) | (x > WIDTH + 0.01) | (y < -0.01) | (y > HEIGHT + 0.01)
    assert inside.mean() > 0.3
    assert outside.sum() > 30
    assert (result[outside] == 128).all()
    assert np.abs(result - smooth(x, y))[inside].max() < 2


@pytest.mark.parametrize("name", ["translate_x", "rotate"])
def test_geometry_is_bicubic(name):
    """Only a cubic overshoots at an edge."""
    edge = np.full((1, HEIGHT, WIDTH, 3), 60, np.uint8)
    edge[:, :, WIDTH // 2 :] = 200
    result = one(edge, name, {"translate_x": 0.5 / WIDTH, "rotate": 21.0}[name])
    assert result.min() < 50
    assert result.max() > 210


def test_a_positive_rotation_turns_left(noise):
    square = noise[:, :HEIGHT, :HEIGHT]
    assert np.array_equal(one(square, "rotate", 90.0), np.rot90(square, axes=(1, 2)))


@pytest.mark.parametrize("name", OPS)
def test_an_operation_does_the_same_to_every_frame_and_leaves_the_frames(noise, name):
    op = Op(name, level(name, 7.0, -1))
    before = noise.copy()
    result = augment(noise, (op,))
    assert np.array_equal(noise, before)
    assert not np.array_equal(result, noise)
    for number in range(3):
        assert np.array_equal(result[number], augment(noise[number : number + 1], (op,))[0])


def test_operations_follow_one_another_in_order(noise):
    first, second = Op("translate_x", 0.3), Op("solarize", 90)
    wanted = augment(augment(noise, (first,)), (second,))
    assert np.array_equal(augment(noise, (first, second)), wanted)
    assert not np.array_equal(augment(noise, (second, first)), wanted)
    assert augment(noise, ()) is noise


def test_turned_frames_are_taken(noise):
    turned = np.rot90(noise, axes=(1, 2))
    assert np.array_equal(augment(turned, (Op("equalize"),)), augment(turned.copy(), (Op("equalize"),)))


# -- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least", "seven", "most"),
    [
        ("rotate", 0, 21, 30), ("color", 1, 1.63, 1.9), ("contrast", 1, 1.63, 1.9), ("brightness", 1, 1.63, 1.9),
        ("sharpness", 1, 1.63, 1.9), ("shear_x", 0, 0.21, 0.3), ("shear_y", 0, 0.21, 0.3),
        ("translate_x", 0, 0.315, 0.45), ("translate_y", 0, 0.315, 0.45), ("posterize", 4, 2, 0),
        ("solarize", 256, 77, 0), ("solarize_add", 0, 77, 110), ("auto_contrast", 0, 0, 0), ("equalize", 0, 0, 0),
        ("invert", 0, 0, 0),
    ],
)  # fmt: skip
def test_levels_are_the_published_ones(name, least, seven, most):
    for magnitude, wanted in ((0.0, least), (7.0, seven), (10.0, most)):
        assert level(name, magnitude, 1) == pytest.approx(wanted)
    mirrored = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    factor = name in ("color", "contrast", "brightness", "sharpness")
    assert level(name, 7.0, -1) == pytest.approx(-seven if mirrored else 2 - seven if factor else seven)


@pytest.fixture(scope="module")
def drawn():
    return [draw_ops(stream(3, Purpose.AUGMENT, slot)) for slot in range(6000)]


def assert_share(count, total, share):
    assert abs(count - total * share) < 4 * (total * share * (1 - share)) ** 0.5


def test_there_are_fifteen_operations_drawn_equally_often(drawn):
    assert len(OPS) == len(set(OPS)) == 15
    names = [op.name for ops in drawn for op in ops]
    for name in OPS:
        assert_share(names.count(name), 4 * len(drawn), 0.5 / 15)


def test_each_of_four_is_kept_half_of_the_time(drawn):
    for number in range(5):
        assert_share(sum(len(ops) == number for ops in drawn), len(drawn), comb(4, number) / 16)


def test_the_same_operation_may_come_twice(drawn):
    pairs = [ops for ops in drawn if len(ops) == 2]
    assert_share(sum(a.name == b.name for a, b in pairs), len(pairs), 1 / 15)


def test_magnitudes_are_normal_around_seven_with_either_sign(drawn):
    for name, unit in (("rotate", 3.0), ("shear_y", 0.03), ("translate_x", 0.045)):
        levels = np.array([op.level for ops in drawn for op in ops if op.name == name]) / unit
        assert_share((levels < 0).sum(), len(levels), 0.5)
        assert abs(np.abs(levels).mean() - 7) < 4 * 0.5 / len(levels) ** 0.5
        assert abs(np.abs(levels).std() - 0.5) < 4 * 0.5 / (2 * len(levels)) ** 0.5


def test_each_operation_has_a_magnitude_and_a_sign_of_its_own(drawn):
    twice = [
        (a.level, b.level) for ops in drawn for a in ops for b in ops if a is not b and a.name == b.name == "rotate"
    ]
    assert len(twice) > 40
    assert all(abs(a) != abs(b) for a, b in twice)
    assert {a * b > 0 for a, b in twice} == {True, False}


def test_a_magnitude_never_leaves_the_scale():
    class Extreme:
        def __init__(self, value):
            self.value = value

        def integers(self, high, size):
            return np.full(size, OPS.index("rotate"))

        def random(self, size):
            return np.full(size, 0.25)

        def normal(self, mean, std, size):
            return np.full(size, self.value)

    assert [op.level for op in draw_ops(Extreme(12.0))] == [-30.0] * 4
    assert [op.level for op in draw_ops(Extreme(-1.0))] == [0.0] * 4


def test_a_plan_draws_operations_from_a_stream_of_their_own():
    plan = ClipPlan(3, np.arange(5), 4, 2, (0.3, 1.0), (0.75, 1.35), True, Augmentation(auto_augment=True))
    for slot in range(20):
        assert plan.clip(slot, 90, 48, 64).augment == draw_ops(stream(3, Purpose.AUGMENT, slot))
    assert len({plan.clip(slot, 90, 48, 64).augment for slot in range(20)}) > 10
