"""Several clips of one video, clips of a duration, and videos that are too short: from slots to batches."""

import json
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastjepa.data import dataset as dataset_module
from fastjepa.data.dataset import ClipDataset, Reader
from fastjepa.data.decode import VideoError, probe, read_frames
from fastjepa.data.loader import make_loader, running
from fastjepa.data.replaced import ReplacedFiles, TooManyBadFiles
from fastjepa.data.sampling import ClipPlan
from fastjepa.masks import MaskCollator, Ragged
from tests.published_transform import grey_levels

FRAMES, STRIDE, CROP, STEP = 4, 2, 16, 8


@pytest.fixture(scope="module")
def good(film, tmp_path_factory):
    """Five videos of 20 to 40 frames, at 24 frames/s."""
    folder = tmp_path_factory.mktemp("good")
    return [str(film.video(folder / f"{n}.mp4", frames=20 + 5 * n)) for n in range(5)]


@pytest.fixture(scope="module")
def paths(good, tmp_path_factory):
    """The same with a file of no use among them."""
    bad = tmp_path_factory.mktemp("bad") / "empty.mp4"
    bad.touch()
    return [*good, str(bad)]


def make_dataset(paths, clips=2, filter_short=False, duration=None, stride=STRIDE, cache_bytes=0):
    plan = ClipPlan(
        0,
        np.arange(len(paths)),
        FRAMES,
        stride,
        (0.3, 1.0),
        (0.75, 1.35),
        True,
        clips_per_video=clips,
        duration=duration,
    )
    reader = Reader(list(paths), 2, cache_bytes, needs_rate="data.duration" if duration else "")
    return ClipDataset(reader, plan, CROP, filter_short=filter_short)


SETS = [
    {"num_blocks": count, "spatial_scale": (0.3, 0.3), "temporal_scale": (0.5, 0.5), "aspect_ratio": (0.75, 1.5)}
    for count in (1, 2)
]


def make_masks(truncation="random", group=2):
    return MaskCollator(SETS, CROP, FRAMES, 4, 2, seed=0, truncation=truncation, group=group)


def load(paths, truncation="random", group=2, first=0, last=3, batch_size=STEP, workers=0, **settings):
    """All batches of the steps from `first` to below `last`, 8 clips each."""
    loader = make_loader(
        make_dataset(paths, **settings),
        make_masks(truncation, group),
        first_step=first,
        last_step=last,
        global_batch=STEP,
        batch_size=batch_size,
        workers=workers,
        pin_memory=False,
        tokens=32,
    )
    with running(loader) as batches:
        return list(batches)


def tokens(token_set):
    """The kept tokens of each clip."""
    if isinstance(token_set, Ragged):
        return [part.tolist() for part in token_set.index.split(list(token_set.lengths))]
    return token_set.tolist()


def by_slot(batches):
    """slot -> (clip, its tokens of each set)."""
    found = {}
    for batch in batches:
        masks = [tokens(s) for s in (*batch.masks_context, *batch.masks_target)]
        assert all(len(clips) == len(batch.clips) == len(batch.slots) for clips in masks)
        found |= {slot: (batch.clips[row], [clip[row] for clip in masks]) for row, slot in enumerate(batch.slots)}
    return found


def assert_same(got, want):
    assert list(got) == list(want)
    for slot, (clip, masks) in want.items():
        assert torch.equal(got[slot][0], clip), slot
        assert got[slot][1] == masks, slot


# -- several clips of one video ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clips", [2, 4])
def test_the_clips_of_a_video_come_from_its_segments_with_boxes_of_their_own(good, clips):
    dataset, plan = make_dataset(good, clips), make_dataset(good, clips).plan
    for video_slot in range(8):
        sample = dataset[video_slot]
        info = probe(good[plan.order.video(video_slot)])
        room = info.frames // clips
        assert (sample.slot, sample.bad, sample.short, len(sample.clips)) == (video_slot, [], [], clips)
        boxes = set()
        for number, clip in enumerate(sample.clips):
            draw = plan.clip(video_slot * clips + number, info.frames, info.height, info.width)
            assert number * room <= draw.frames.min()
            assert draw.frames.max() < (number + 1) * room
            assert torch.equal(clip, grey_levels(read_frames(info, draw.frames), [draw.box] * FRAMES, draw.flip, CROP))
            boxes.add(draw.box)
        assert len(boxes) == clips


def test_a_video_is_decoded_once_for_all_its_clips(paths):
    reads = []
    dataset = make_dataset(paths, clips=4)
    dataset.reader.read_frames = lambda info, n: reads.append(info.path) or read_frames(info, n)
    samples = [dataset[video_slot] for video_slot in range(6)]
    assert len(reads) == 6
    assert any(sample.bad for sample in samples)


@pytest.mark.parametrize("truncation", ["group", "random", "none"])
@pytest.mark.parametrize("clips", [1, 2, 4])
def test_clips_of_one_video_share_the_masks_of_its_slot_and_stand_side_by_side(paths, truncation, clips):
    batches = load(paths, truncation, clips=clips)
    masks = make_masks(truncation)
    for step, batch in enumerate(batches):
        assert batch.slots == tuple(range(STEP * step, STEP * (step + 1)))
        videos = range(STEP // clips * step, STEP // clips * (step + 1))
        for have, want in zip((batch.masks_context, batch.masks_target), masks.draw(step, videos)):
            assert [tokens(s) for s in have] == [[row for row in tokens(s) for _ in range(clips)] for s in want]
            # Truncation groups are runs of neighbours still: `group` videos with all their clips.
            if truncation != "none":
                lengths = [list(map(len, tokens(s))) for s in have]
                run = 2 * clips
                assert all(len(set(row[n : n + run])) == 1 for row in lengths for n in range(0, STEP, run))
    assert len({json.dumps(masks) for _, masks in by_slot(batches).values()}) > 3 * STEP // clips - 3


def test_a_batch_of_one_truncation_group_stays_dense(good):
    batch = load(good, "group", group=4, last=1)[0]
    assert [len(s) for s in (*batch.masks_context, *batch.masks_target)] == [STEP] * 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("truncation", ["group", "random", "none"])
def test_workers_the_batch_size_and_a_later_start_change_no_clip_and_no_mask(paths, truncation):
    wanted = by_slot(load(paths, truncation))
    assert len(wanted) == 3 * STEP
    assert_same(by_slot(load(paths, truncation, workers=2)), wanted)
    assert_same(by_slot(load(paths, truncation, batch_size=2)), wanted)
    assert_same(by_slot(load(paths, truncation, batch_size=4, cache_bytes=10**9)), wanted)
    later = by_slot(load(paths, truncation, first=2, workers=2))
    assert_same(later, {slot: found for slot, found in wanted.items() if slot >= 2 * STEP})


def test_videos_and_replacements_are_those_of_the_video_slot(paths):
    one, two = make_dataset(paths, clips=1), make_dataset(paths, clips=2)
    for video_slot in range(12):
        assert two.plan.order.video(video_slot) == one.plan.order.video(video_slot)
        assert two[video_slot].bad == one[video_slot].bad


# -- duration ---------------------------------------------------------------------------------------------------------


def test_a_clip_of_a_duration_is_one_of_the_stride_that_its_frame_rate_gives(good):
    # 24 frames/s: 0.7 s are 16.8 frames, 4 for each of the clip.
    by_time, by_stride = make_dataset(good, 1, duration=0.7), make_dataset(good, 1, stride=4)
    assert all(torch.equal(by_time[slot].clips[0], by_stride[slot].clips[0]) for slot in range(10))
    assert not torch.equal(by_time[1].clips[0], make_dataset(good, 1, duration=0.4)[1].clips[0])


def test_every_video_has_the_stride_of_its_own_frame_rate(good, monkeypatch):
    def faster(path):
        return replace(probe(path), rate=Fraction(48)) if path == good[4] else probe(path)

    monkeypatch.setattr(dataset_module, "probe", faster)
    dataset = make_dataset(good, 1, duration=0.3)
    wanted = {path: make_dataset(good, 1, stride=3 if path == good[4] else 1) for path in good}
    for slot in range(10):
        path = good[dataset.plan.order.video(slot)]
        assert torch.equal(dataset[slot].clips[0], wanted[path][slot].clips[0])


def test_a_video_without_a_frame_rate_is_bad_where_a_duration_needs_one(good, monkeypatch):
    def unknown(path):
        return replace(probe(path), rate=None) if path == good[0] else probe(path)

    monkeypatch.setattr(dataset_module, "probe", unknown)
    with pytest.raises(VideoError, match=r"^its frame rate is not known, and data\.duration needs it$"):
        make_dataset(good, duration=0.5).reader.info(0)
    samples = [make_dataset(good, duration=0.5)[slot] for slot in range(5)]
    assert sorted(path for sample in samples for path, _ in sample.bad) == [good[0]]
    assert not any(make_dataset(good)[slot].bad for slot in range(5))


# -- short videos -----------------------------------------------------------------------------------------------------


def test_videos_of_fewer_frames_than_the_window_are_replaced_and_told_apart_from_bad_ones(paths):
    # Of 20, 25, 30, 35 and 40 frames, the first two are shorter than 28.
    plain, dataset = make_dataset(paths, 1, stride=7), make_dataset(paths, 1, stride=7, filter_short=True)
    reason = "it has {} frames, fewer than the 28 that a clip spans"
    short = {paths[0]: reason.format(20), paths[1]: reason.format(25)}
    for slot in range(18):
        sample = dataset[slot]
        assert dict(sample.bad) in ({}, {paths[5]: "the file is empty"})
        assert dict(sample.short).items() <= short.items()
        asked = paths[dataset.plan.order.video(slot)]
        assert (asked in dict(sample.short)) == (asked in short)
        if asked not in short:
            assert sample.short == [] or sample.bad
            assert sample.bad or torch.equal(sample.clips[0], plain[slot].clips[0])
    batches = load(paths, clips=1, stride=7, filter_short=True)
    assert {entry for batch in batches for entry in batch.short} == set(short.items())
    assert {path for batch in batches for path, _ in batch.bad} == {paths[5]}
    assert not any(batch.short for batch in load(paths, clips=1, stride=7))


def test_a_video_of_exactly_one_window_is_long_enough_whatever_the_number_of_clips(good):
    for clips in (1, 2):
        samples = [make_dataset(good, clips, stride=5, filter_short=True)[slot] for slot in range(5)]
        assert not any(sample.short for sample in samples)
        samples = [make_dataset(good, clips, stride=6, filter_short=True)[slot] for slot in range(5)]
        assert {path for sample in samples for path, _ in sample.short} == {good[0]}


def test_the_window_is_that_of_the_duration(good):
    # 24 frames/s: 1 s are 24 frames.
    samples = [make_dataset(good, 1, duration=1.0, filter_short=True)[slot] for slot in range(5)]
    assert {path for sample in samples for path, _ in sample.short} == {good[0]}


@pytest.mark.parametrize("workers", [0, 2])
def test_without_any_long_enough_video_the_loader_says_so_in_one_sentence(paths, workers):
    with pytest.raises(TooManyBadFiles) as caught:
        load(paths, stride=11, filter_short=True, workers=workers)
    text = str(caught.value)
    assert text.startswith("none of the 6 files is long enough for data.filter_short: 5 are too short, ")
    assert "frames, fewer than the 44 that a clip spans); 1 cannot be read (1 times: the file is empty)" in text
    assert "\n" not in text


def test_a_list_without_a_quota_takes_any_number(tmp_path):
    listed = ReplacedFiles(tmp_path / "short_files.jsonl", 3, None)
    entries = [(f"{n}.mp4", "short") for n in range(50)]
    assert listed.report(entries) == entries
    assert listed.report(entries) == []
    assert len(ReplacedFiles(tmp_path / "short_files.jsonl", 3, None).reasons) == 50


class LengthsOnly:
    """A reader of videos of these lengths that decodes nothing."""

    def __init__(self, lengths):
        self.lengths, self.paths, self.read_videos = lengths, [f"{n}.mp4" for n in range(len(lengths))], []

    def info(self, video):
        return SimpleNamespace(still=False, frames=self.lengths[video], height=CROP, width=CROP, rate=None)

    def read(self, video, frames):
        self.read_videos.append(video)
        return np.zeros((len(frames), CROP, CROP, 3), dtype=np.uint8)


def test_where_most_videos_are_too_short_the_others_are_used_alike():
    """5 % of 400 videos are long enough: a slot mostly runs out of single replacements."""
    lengths = [100] * 20 + [5] * 380
    reader = LengthsOnly(lengths)
    plan = ClipPlan(0, np.arange(400), FRAMES, 2, (0.3, 1.0), (0.75, 1.35), True)
    dataset = ClipDataset(reader, plan, CROP, filter_short=True)
    for slot in range(800):
        dataset[slot]
    counts = np.bincount(reader.read_videos, minlength=400)
    assert counts[20:].sum() == 0
    assert abs(counts[:20] - 40).max() < 5 * (40 * 0.95) ** 0.5
