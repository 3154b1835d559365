"""Features as colours and as likeness: the numbers behind the pictures, and where they are put."""

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image

from fastjepa import viz
from fastjepa.pixels import normalise
from fastjepa.viz import similarity

CLIPS, GRID, WIDTH, PATCH, TUBELET = 3, (2, 3, 4), 6, 8, 2
TOKENS = 24


@pytest.fixture
def tokens():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(CLIPS, TOKENS, WIDTH, generator=rng) * torch.tensor([5.0, 4.0, 3.0, 0.3, 0.2, 0.1])


@pytest.fixture
def clips():
    shape = (CLIPS, 3, GRID[0] * TUBELET, GRID[1] * PATCH, GRID[2] * PATCH)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def test_content_is_what_differs_from_the_mean_at_the_same_position(tokens):
    position = torch.randn(TOKENS, WIDTH)
    assert torch.allclose(viz.content(tokens + position), viz.content(tokens), atol=1e-5)
    assert torch.allclose(viz.content(tokens).mean(dim=0), torch.zeros(TOKENS, WIDTH), atol=1e-6)
    assert torch.equal(viz.content(tokens[:1]), tokens[:1])


def test_colours_are_the_first_three_components_of_an_svd_up_to_sign(tokens):
    colours = viz.fit(tokens).colours(tokens).flatten(0, 1).numpy()
    rows = tokens.flatten(0, 1).double().numpy()
    rows = rows - rows.mean(axis=0)
    _, values, axes = np.linalg.svd(rows, full_matrices=False)
    for axis, colour in zip(axes[:3], colours.T):
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        values_on = rows @ axis
        inside = (colour > 0) & (colour < 1)
        assert inside.sum() >= 0.9 * len(rows)  # the tails alone are cut off
        slope, offset = np.polyfit(values_on[inside], colour[inside], 1)
        assert slope > 0
        assert np.allclose(slope * values_on[inside] + offset, colour[inside], atol=1e-5)
    shares = (values**2 / (values**2).sum())[:3]
    assert np.allclose(viz.fit(tokens).shares.numpy(), shares)


def test_the_same_features_have_the_same_colours_whatever_the_order(tokens):
    first = viz.fit(tokens).colours(tokens)
    assert torch.allclose(viz.fit(tokens.flip(0)).colours(tokens), first, atol=1e-5)
    assert torch.allclose(viz.fit(tokens).colours(tokens[1]), first[1])


def test_features_that_are_all_the_same_have_a_colour_and_those_that_are_not_finite_are_refused(tokens):
    same = torch.ones(2, 5, 4)
    assert viz.fit(same).colours(same).isfinite().all()
    tokens[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        viz.fit(tokens)


def test_the_picture_has_every_clip_above_its_colours(tokens, clips, drawn, tmp_path):
    colours = viz.fit(tokens).colours(tokens).view(CLIPS, *GRID, 3).numpy()
    viz.pca_picture(
        [normalise(clip * 255) for clip in clips], list(colours), ["a", "$b_{$", "c"], TUBELET, tmp_path / "p.png"
    )
    slots = GRID[0]
    assert len(drawn) == 2 * CLIPS * slots
    for place, image in enumerate(drawn):
        clip, slot, features = place // (2 * slots), place % (2 * slots) // 2, place % 2
        frame = clips[clip, :, slot * TUBELET].permute(1, 2, 0).numpy()
        assert np.allclose(image, colours[clip, slot] if features else frame, atol=1e-5)


def test_likeness_is_the_cosine_and_one_with_itself(tokens):
    found = viz.similarities(tokens, 1, 7)
    assert found.shape == (CLIPS, TOKENS)
    assert found[1, 7] == pytest.approx(1)
    a, b = tokens[1, 7].numpy(), tokens[2, 3].numpy()
    assert found[2, 3].item() == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    tokens[0, 5] *= 50
    assert viz.most_salient(tokens[0]) == 5


def test_the_chosen_patch_is_framed_in_the_clip_and_in_the_map(tokens, clips, drawn, tmp_path, monkeypatch):
    marks = []
    monkeypatch.setattr(
        similarity,
        "Rectangle",
        lambda corner, *size, **style: marks.append((corner, size)) or Rectangle(corner, *size, **style),
    )
    chosen = (1, 2, 3)
    token = int(np.ravel_multi_index(chosen, GRID))
    maps = viz.similarities(tokens, 0, token).view(CLIPS, *GRID).numpy()
    viz.similarity_picture(list(clips), list(maps), chosen, ["a", "b", "c"], TUBELET, PATCH, tmp_path / "s.png")
    assert maps[0][chosen] == pytest.approx(1)
    assert marks == [((3 * PATCH - 0.5, 2 * PATCH - 0.5), (PATCH, PATCH)), ((2.5, 1.5), (1, 1))]
    slots = GRID[0]
    for place, image in enumerate(drawn):
        if place % 2:
            assert np.array_equal(image, maps[place // (2 * slots)][place % (2 * slots) // 2])
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width > 200


@pytest.mark.parametrize("side", [16, 120])
def test_the_animation_has_a_frame_a_slot_with_clips_above_their_maps(side, tmp_path):
    slots = 4
    clips = torch.linspace(0.1, 0.9, slots * TUBELET).view(1, -1, 1, 1).expand(2, 3, slots * TUBELET, side, side)
    maps = np.linspace(0, 1, 2 * slots * 2 * 2 * 3).reshape(2, slots, 2, 2, 3)
    path = tmp_path / "viz" / "a.webp"
    slower = viz.animation([(clip * 255).to(torch.uint8) for clip in clips.unbind()], list(maps), TUBELET, 0.1, path)
    assert slower == 4  # 0.4 s are too short to follow
    with Image.open(path) as moving:
        assert moving.n_frames == slots
        assert moving.size == (2 * 160 + 4, 2 * 160 + 4)
        for slot in range(slots):
            moving.seek(slot)
            sheet = np.asarray(moving.convert("RGBA")).astype(int)
            assert moving.info["duration"] == 400
            for clip, left in ((0, 0), (1, 164)):
                frame = clips[clip, 0, slot * TUBELET, 0, 0].item() * 255
                assert np.abs(sheet[20:140, left + 20 : left + 140, :3] - frame).max() <= 3
                cell = maps[clip, slot, 1, 0] * 255
                assert np.abs(sheet[164 + 100, left + 40, :3] - cell).max() <= (1 if side == 16 else 12)
            assert sheet[100, 162, 3] == 0


@pytest.mark.parametrize(("seconds", "slower"), [(None, 2), (0.5, 1), (2.0, 1)])
def test_an_animation_is_slowed_down_only_where_it_is_too_short(seconds, slower, tmp_path):
    clips, maps = [torch.zeros(3, 8, 8, 8)], [np.zeros((4, 2, 2, 3))]
    assert viz.animation(clips, maps, 2, seconds, tmp_path / "a.webp") == slower
