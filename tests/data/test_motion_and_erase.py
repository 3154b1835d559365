"""The moving crop, random erasing, and how augmentations come together from settings to clips and runs."""

import json
from math import log

import numpy as np
import pytest
import torch

from fastjepa import configfile
from fastjepa.build import build_dataset, build_jepa, build_masks
from fastjepa.data.augment import Op, augment
from fastjepa.data.loader import make_loader, running
from fastjepa.data.sampling import Augmentation, Box, ClipDraw, ClipPlan, Erase, random_box, random_erase, shifted_boxes
from fastjepa.data.source import open_videos
from fastjepa.data.transforms import cut, transform
from fastjepa.exits import Exit
from fastjepa.pixels import STD, as_floats
from fastjepa.streams import Purpose, stream
from tests.published_transform import grey_levels, published

NUMBERS = np.arange(4)
ALL = Augmentation(motion_shift=True, erase=0.5, auto_augment=True, crop=24)


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (4, 36, 48, 3), dtype=np.uint8)


def plan(augmentation=None, seed=1):
    more = () if augmentation is None else (augmentation,)
    return ClipPlan(seed, np.arange(7), 4, 2, (0.3, 1.0), (0.75, 1.35), True, *more)


# -- off --------------------------------------------------------------------------------------------------------------


def test_without_augmentation_a_slot_keeps_the_clip_it_always_had():
    """Draws of earlier versions: a run that goes on must not see other clips."""
    old = {
        0: ([65, 67, 70, 72], Box(1, 82, 235, 180), True),
        5: ([27, 29, 32, 34], Box(0, 45, 240, 207), False),
        123456: ([57, 59, 62, 64], Box(3, 27, 226, 256), True),
    }
    for augmentation in (None, Augmentation(), ALL):
        for slot, (numbers, box, flip) in old.items():
            draw = plan(augmentation).clip(slot, 100, 240, 320)
            assert (draw.frames.tolist(), draw.box, draw.flip) == (numbers, box, flip)
    draw = plan().clip(0, 100, 240, 320)
    assert (draw.end_box, draw.erase, draw.augment) == (None, None, None)


@pytest.mark.parametrize("box", [Box(3, 5, 20, 24), Box(3, 5, 24, 24)], ids=["resized", "as it is"])
def test_without_augmentation_the_transform_is_the_plain_cut(frames, box):
    for flip in (False, True):
        draw = ClipDraw(NUMBERS, box, flip)
        clip = transform(frames, draw, 24)
        assert clip.dtype == torch.uint8
        assert torch.equal(clip, grey_levels(frames, [box] * 4, flip, 24))
        floats = transform(frames, draw, 24, floats=True)
        assert torch.equal(floats, cut(frames, box, flip, 24))
        assert torch.equal(floats, published(frames, [box] * 4, flip, 24))


def test_bytes_lie_within_half_a_grey_level_of_the_published_clip(frames):
    draw = ClipDraw(NUMBERS, Box(3, 5, 20, 17), True)
    levels, floats = transform(frames, draw, 24), transform(frames, draw, 24, floats=True)
    std = torch.tensor(STD).view(3, 1, 1, 1)
    away = (as_floats(levels) - floats).abs() * std * 255
    assert 0.49 < away.max() <= 0.5 + 1e-4


@pytest.mark.parametrize("name", ["end_box", "erase", "augment"])
def test_none_moves_the_draws_of_another(name):
    alone = Augmentation(name == "end_box", 0.5 * (name == "erase"), name == "augment", 24)
    for slot in range(12):
        together, single = plan(ALL).clip(slot, 100, 48, 64), plan(alone).clip(slot, 100, 48, 64)
        assert {n for n in ("end_box", "erase", "augment") if getattr(single, n) is not None} <= {name}
        assert _plain(getattr(single, name)) == _plain(getattr(together, name))


def test_box_and_noise_come_from_streams_of_their_own():
    for slot in range(12):
        draw = plan(ALL).clip(slot, 100, 48, 64)
        assert draw.end_box == random_box(48, 64, (0.3, 1.0), (0.75, 1.35), stream(1, Purpose.MOTION, slot))
        assert _plain(draw.erase) == _plain(random_erase(0.5, 24, 4, stream(1, Purpose.ERASE, slot)))


def _plain(value):
    return (value.box, value.noise.tolist()) if isinstance(value, Erase) else value


# -- the moving crop --------------------------------------------------------------------------------------------------


def test_the_box_moves_linearly_from_the_first_to_the_second_rounded_down():
    boxes = shifted_boxes(Box(0, 10, 20, 30), Box(9, 3, 27, 30), 4)
    assert boxes == [Box(0, 10, 20, 30), Box(3, 7, 22, 30), Box(6, 5, 24, 30), Box(9, 3, 27, 30)]
    assert shifted_boxes(Box(0, 0, 5, 5), Box(9, 9, 7, 7), 1) == [Box(0, 0, 5, 5)]
    same = Box(4, 5, 6, 7)
    assert shifted_boxes(same, same, 16) == [same] * 16


def test_moving_boxes_stay_inside_and_pass_every_frame_at_its_exact_share():
    for slot in range(50):
        draw = plan(ALL).clip(slot, 100, 48, 64)
        boxes = shifted_boxes(draw.box, draw.end_box, 16)
        assert (boxes[0], boxes[-1]) == (draw.box, draw.end_box)
        for step, box in enumerate(boxes):
            assert box.top + box.height <= 48
            assert box.left + box.width <= 64
            for side in ("top", "left", "height", "width"):
                exact = getattr(draw.box, side) * (15 - step) + getattr(draw.end_box, side) * step  # fifteenths
                assert 15 * getattr(box, side) <= exact < 15 * getattr(box, side) + 15


def test_the_second_box_is_drawn_like_the_first_and_apart_from_it():
    draws = [plan(ALL).clip(slot, 100, 48, 64) for slot in range(800)]
    first, second = (np.array([[b.height * b.width, b.top, b.left] for b in boxes], float) for boxes in
                     ([d.box for d in draws], [d.end_box for d in draws]))  # fmt: skip
    error = ((first.var(0) + second.var(0)) / 800) ** 0.5
    assert (np.abs(first.mean(0) - second.mean(0)) < 4 * error).all()
    for column in range(3):
        assert abs(np.corrcoef(first[:, column], second[:, column])[0, 1]) < 4 / 800**0.5


@pytest.mark.parametrize("flip", [False, True])
def test_every_frame_is_cut_out_of_its_own_box(frames, flip):
    start, end = Box(0, 3, 24, 24), Box(12, 20, 15, 28)
    draw = ClipDraw(NUMBERS, start, flip, end_box=end)
    levels, clip = transform(frames, draw, 24), transform(frames, draw, 24, floats=True)
    assert torch.equal(levels, grey_levels(frames, shifted_boxes(start, end, 4), flip, 24))
    assert torch.equal(clip, published(frames, shifted_boxes(start, end, 4), flip, 24))
    assert levels.is_contiguous()
    assert clip.is_contiguous()
    assert torch.equal(clip[:, :1], cut(frames[:1], start, flip, 24))
    assert torch.equal(clip[:, 3:], cut(frames[3:], end, flip, 24))


# -- erasing ----------------------------------------------------------------------------------------------------------


def erased(count, share=1.0, size=60, frames=1):
    return [random_erase(share, size, frames, stream(5, Purpose.ERASE, slot)) for slot in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_erased_clips_is_as_asked(share):
    count = sum(found is not None for found in erased(2000, share, size=16))
    assert abs(count - 2000 * share) <= 4 * (2000 * share * (1 - share)) ** 0.5


def test_areas_and_shapes_are_those_of_boxes_drawn_until_one_fits():
    """Against many boxes drawn at once, of which those that fit are kept: that is what trying again comes to."""
    size, count = 60, 2000
    rng = np.random.default_rng(1)
    area, ratio = size**2 * rng.uniform(0.02, 0.333, 50000), np.exp(rng.uniform(log(0.3), log(3.33), 50000))
    tall, wide = np.rint((area * ratio) ** 0.5), np.rint((area / ratio) ** 0.5)
    fits = (tall < size) & (wide < size)
    wanted = np.stack([tall * wide / size**2, np.log(tall / wide)])[:, fits]
    boxes = [found.box for found in erased(count)]
    got = np.array([[b.height * b.width / size**2, log(b.height / b.width)] for b in boxes]).T
    for mine, theirs in zip(got, wanted):
        error = (mine.var() / count + theirs.var() / fits.sum()) ** 0.5
        assert abs(mine.mean() - theirs.mean()) < 4 * error
        assert abs(mine.std() / theirs.std() - 1) < 4 / count**0.5
    assert 0.017 < got[0].min() < 0.03
    assert 0.32 < got[0].max() < 0.35
    assert np.abs(got[1]).max() > 1.1
    places = np.array([[b.top / (size - b.height), b.left / (size - b.width)] for b in boxes])
    assert (np.abs(places.mean(0) - 0.5) < 4 * (1 / 12 / count) ** 0.5).all()
    assert places.min(0).tolist() == [0, 0]
    assert places.max(0).tolist() == [1, 1]


def test_where_no_box_fits_a_hundred_are_tried_and_nothing_is_erased():
    class Never:
        tries = 0

        def random(self):
            return 0.0

        def uniform(self, low, high):
            Never.tries += 1
            return high

    assert random_erase(1.0, 60, 4, Never()) is None  # a third of the area at 1 : 3.33 is taller than the clip
    assert Never.tries == 2 * 100


def test_noise_is_normal_and_independent_between_frames_pixels_channels_and_clips():
    found = erased(60, size=48, frames=4)
    assert all(e.noise.shape == (3, 4, e.box.height, e.box.width) and e.noise.dtype == np.float32 for e in found)
    every = np.concatenate([e.noise.ravel() for e in found])
    assert abs(every.mean()) < 4 / len(every) ** 0.5
    assert abs(every.var() - 1) < 4 * (2 / len(every)) ** 0.5
    assert abs((every**4).mean() - 3) < 4 * (96 / len(every)) ** 0.5
    flat = [np.concatenate([e.noise[c, f].ravel() for e in found]) for c in range(3) for f in range(4)]
    assert np.abs(np.corrcoef(flat) - np.eye(12)).max() < 4 / len(flat[0]) ** 0.5
    assert len({e.noise.ravel()[0] for e in found}) == 60


@pytest.mark.parametrize("flip", [False, True])
def test_erasing_comes_last_and_puts_the_noise_into_the_same_box_of_every_frame(frames, flip):
    box = Box(2, 3, 10, 7)
    noise = np.random.default_rng(2).standard_normal((3, 4, 10, 7), dtype=np.float32)
    draw = ClipDraw(NUMBERS, Box(3, 5, 20, 24), flip)
    plain = transform(frames, draw, 24, floats=True)
    erased_draw = ClipDraw(draw.frames, draw.box, flip, erase=Erase(box, noise))
    clip = transform(frames, erased_draw, 24, floats=True)
    with pytest.raises(ValueError, match="expected floats=True for a clip with erasing"):
        transform(frames, erased_draw, 24)
    assert torch.equal(clip[:, :, 2:12, 3:10], torch.from_numpy(noise))
    changed = (clip != plain).any(0)
    wanted = torch.zeros(4, 24, 24, dtype=torch.bool)
    wanted[:, 2:12, 3:10] = True
    assert torch.equal(changed, wanted)


# -- together ---------------------------------------------------------------------------------------------------------


def test_augmented_clips_are_computed_on_the_scale_of_one_also_without_an_operation(frames):
    box = Box(3, 5, 20, 28)
    for ops in ((), (Op("invert"), Op("shear_x", 0.2))):
        draw = ClipDraw(NUMBERS, box, True, augment=ops)
        clip = transform(frames, draw, 24, floats=True)
        assert torch.equal(clip, published(augment(frames, ops), [box] * 4, True, 24, 1.0))
        assert torch.equal(transform(frames, draw, 24), grey_levels(augment(frames, ops), [box] * 4, True, 24, 1.0))
    plain, scaled = (
        transform(frames, ClipDraw(NUMBERS, box, True, augment=ops), 24, floats=True) for ops in (None, ())
    )
    assert not torch.equal(plain, scaled)
    torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=2e-5)


def test_all_three_work_in_the_published_order(frames):
    start, end = Box(0, 3, 20, 24), Box(12, 20, 15, 28)
    ops = (Op("translate_y", 0.3), Op("posterize", 2))
    erase = random_erase(1.0, 24, 4, np.random.default_rng(0))
    wanted = published(augment(frames, ops), shifted_boxes(start, end, 4), True, 24, 1.0)
    box = erase.box
    wanted[:, :, box.top : box.top + box.height, box.left : box.left + box.width] = torch.from_numpy(erase.noise)
    before = frames.copy()
    assert torch.equal(transform(frames, ClipDraw(NUMBERS, start, True, end, erase, ops), 24, floats=True), wanted)
    assert np.array_equal(frames, before)


THREE = ("data.motion_shift=true", "data.erase=0.5", "data.auto_augment=true")


def clips(recipe, *overrides, workers=0, slots=8):
    settings = configfile.load(recipe, list(overrides))
    dataset = build_dataset(settings, open_videos(settings.data.path, settings.optim.seed))
    loader = make_loader(
        dataset, build_masks(settings), first_step=0, last_step=slots // 4, global_batch=4, batch_size=4,
        workers=workers, pin_memory=False, tokens=build_jepa(settings).encoder.num_patches,
    )  # fmt: skip
    with running(loader) as batches:
        return torch.cat([batch.clips for batch in batches]), dataset


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_augmented_clips_are_the_same_in_worker_processes(recipe):
    here, _ = clips(recipe, *THREE)
    assert torch.equal(clips(recipe, *THREE, workers=2)[0], here)
    plain, _ = clips(recipe)
    assert not any(torch.equal(a, b) for a, b in zip(here, plain))


def test_each_setting_reaches_the_clips(recipe):
    """What the dataset delivers is what the setting alone makes of the same frames, box and flip."""
    plain, _ = clips(recipe)
    for setting, field in zip(("data.motion_shift=true", "data.erase=1.0", "data.auto_augment=true"),
                              ("end_box", "erase", "augment"), strict=True):  # fmt: skip
        found, dataset = clips(recipe, setting)
        for slot, clip in enumerate(found):
            video = dataset.plan.order.video(slot)
            info = dataset.reader.info(video)
            draw = dataset.plan.clip(slot, info.frames, info.height, info.width)
            assert {f for f in ("end_box", "erase", "augment") if getattr(draw, f) is not None} == {field}
            floats = field == "erase"
            assert torch.equal(clip, transform(dataset.reader.read(video, draw.frames), draw, 32, floats=floats))
            assert clip.dtype == (torch.float32 if floats else torch.uint8)
        assert not torch.equal(found, plain)
    assert plain.dtype == torch.uint8
    # One dtype for the whole run, also of the clips in which nothing is erased.
    assert clips(recipe, "data.erase=0.01")[0].dtype == torch.float32
    assert torch.equal(clips(recipe, "data.motion_shift=false", "data.erase=0.0", "data.auto_augment=false")[0], plain)


def test_a_run_trains_with_all_three_and_is_not_the_plain_one(run):
    losses = {}
    for name, overrides in (("plain", ()), ("augmented", THREE)):
        code, folder = run(*overrides, "runtime.stop_at=3", folder=name)
        assert code == Exit.DONE
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = folder.name, [row["loss"] for row in rows]
        assert len(rows) == 3
        assert np.isfinite(losses[name][1]).all()
    assert losses["plain"][0] != losses["augmented"][0]
    assert not set(losses["plain"][1]) & set(losses["augmented"][1])


def test_erasing_needs_the_side_of_the_clip():
    with pytest.raises(ValueError, match="needs the side of the clip, got crop 0"):
        Augmentation(erase=0.5)
