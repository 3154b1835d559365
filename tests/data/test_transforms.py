import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastjepa.data.sampling import Box, ClipDraw
from fastjepa.data.transforms import cut, transform
from fastjepa.pixels import MEAN, STD, normalise


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (3, 20, 26, 3), dtype=np.uint8)


def test_clips_are_those_of_the_published_transform(recorded):
    info, tensors = recorded("10_transforms")
    frames = tensors["train.in"].numpy().astype(np.uint8)
    calls = [call for call in info["calls"] if call["prefix"] == "train."]
    assert len(calls) == 3
    assert {call["flip"] for call in calls} == {True, False}
    for call in calls:
        clip = cut(frames, Box(*call["box"]), call["flip"], call["crop_size"])
        assert clip.dtype == torch.float32
        torch.testing.assert_close(clip, tensors[call["output"]], **info["tolerance"]["default"])


def test_normalisation_is_the_published_one(recorded):
    info, tensors = recorded("10_transforms")
    torch.testing.assert_close(normalise(tensors["norm.in"]), tensors["norm.out"], **info["tolerance"]["default"])


def test_normalisation_takes_255_for_one():
    clip = torch.tensor(MEAN).view(3, 1, 1, 1) * 255
    assert normalise(clip).abs().max() < 1e-6
    clip = (torch.tensor(MEAN) + torch.tensor(STD)).view(3, 1, 1, 1) * 255
    torch.testing.assert_close(normalise(clip), torch.ones(3, 1, 1, 1))


def pixels(frames, box):
    window = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    return normalise(torch.from_numpy(window.astype(np.float32)).permute(3, 0, 1, 2))


def test_a_window_of_the_right_size_is_not_resampled(frames, monkeypatch):
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: pytest.fail("resampled"))
    box = Box(2, 5, 16, 16)
    assert torch.equal(cut(frames, box, False, 16), pixels(frames, box))


@pytest.mark.parametrize("box", [Box(2, 5, 16, 12), Box(2, 5, 12, 16), Box(0, 0, 20, 26), Box(3, 4, 1, 1)])
def test_any_other_window_becomes_a_square(frames, box):
    clip = cut(frames, box, False, 16)
    assert clip.shape == (3, 3, 16, 16)
    assert clip.is_contiguous()
    inside = pixels(frames, box)
    assert clip.min() >= inside.min() - 1e-5
    assert clip.max() <= inside.max() + 1e-5
    if box.height == 1:
        assert torch.allclose(clip, inside.expand(3, 3, 16, 16))


def test_every_frame_is_cut_at_the_same_place(frames):
    box = Box(1, 2, 11, 13)
    clip = cut(frames, box, True, 16)
    for number in range(3):
        torch.testing.assert_close(clip[:, number : number + 1], cut(frames[number : number + 1], box, True, 16))


@pytest.mark.parametrize("box", [Box(2, 5, 16, 16), Box(1, 2, 11, 13)])
def test_a_flip_mirrors_left_and_right(frames, box):
    assert torch.equal(cut(frames, box, True, 16), cut(frames, box, False, 16).flip(3))
    assert not torch.equal(cut(frames, box, True, 16), cut(frames, box, False, 16))


def test_the_frames_are_left_as_they_are(frames):
    before = frames.copy()
    cut(frames, Box(0, 0, 20, 26), True, 20)
    cut(frames, Box(0, 0, 20, 20), True, 20)
    assert np.array_equal(frames, before)


def test_clips_of_turned_frames_can_be_cut(frames):
    """The decoder turns frames by a view with negative strides, which torch does not take."""
    turned = np.rot90(frames, axes=(1, 2))
    box = Box(1, 2, 16, 16)
    assert torch.equal(cut(turned, box, False, 16), cut(np.ascontiguousarray(turned), box, False, 16))


@pytest.mark.parametrize("antialias", [False, True])
def test_crops_are_resized_with_a_filter_only_where_that_is_asked_for(antialias):
    frames = np.random.default_rng(0).integers(0, 256, (3, 60, 80, 3), dtype=np.uint8)
    draw = ClipDraw(np.arange(3), Box(5, 9, 48, 64), False)
    window = torch.from_numpy(frames[:, 5:53, 9:73]).permute(0, 3, 1, 2).float()
    wanted = F.interpolate(window, size=(12, 12), mode="bilinear", align_corners=False, antialias=antialias)
    clip = transform(frames, draw, 12, antialias=antialias)
    assert torch.equal(clip, wanted.round().to(torch.uint8).transpose(0, 1))
    assert (clip.float().std() < 40) == antialias, "noise is averaged"
