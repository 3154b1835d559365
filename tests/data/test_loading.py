"""From slots to batches: the same clips on any number of workers and from any step, and what becomes of bad files."""

import gc
import json
import multiprocessing
import weakref

import numpy as np
import pytest
import torch

from fastjepa.data import dataset as dataset_module
from fastjepa.data.dataset import ClipDataset, Reader
from fastjepa.data.decode import VideoError, probe, read_frames
from fastjepa.data.loader import SlotBatches, make_loader, running
from fastjepa.data.replaced import ReplacedFiles, TooManyBadFiles
from fastjepa.data.sampling import ClipPlan
from fastjepa.masks import MaskCollator, Ragged
from tests.published_transform import grey_levels

FRAMES, STRIDE, CROP = 4, 2, 16
NOT_A_VIDEO = "it is not a video file, or its header is damaged"


@pytest.fixture(scope="module")
def good(film, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return [str(film.video(folder / f"{n}.mp4", frames=6 + 2 * n)) for n in range(5)]


@pytest.fixture(scope="module")
def bad(film, tmp_path_factory):
    """Four files of no use, and why."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("hello " * 300)
    film.video(folder / "one.mp4", frames=1)
    return {
        str(folder / "empty.mp4"): "the file is empty",
        str(folder / "text.mp4"): NOT_A_VIDEO,
        str(folder / "one.mp4"): "it has 1 frame, fewer than one tubelet of 2",
        str(folder / "missing.mp4"): "the file does not exist",
    }


def make_dataset(paths, seed=0, cache_bytes=0, frames=FRAMES, flip=True):
    plan = ClipPlan(seed, np.arange(len(paths)), frames, STRIDE, (0.3, 1.0), (0.75, 1.35), flip)
    return ClipDataset(Reader(list(paths), 2, cache_bytes), plan, CROP)


def load(paths, first=0, last=3, batch_size=8, workers=0, group=8, rank=0, world=1, **settings):
    """All batches of the steps from `first` to below `last`, 8 clips each."""
    sets = [{"num_blocks": 2, "spatial_scale": (0.3, 0.3), "temporal_scale": (0.5, 0.5), "aspect_ratio": (0.75, 1.5)}]
    masks = MaskCollator(sets * 2, CROP, FRAMES, 4, 2, seed=0, truncation="random", group=group)
    loader = make_loader(
        make_dataset(paths, **settings),
        masks,
        first_step=first,
        last_step=last,
        global_batch=8,
        batch_size=batch_size,
        workers=workers,
        pin_memory=False,
        tokens=32,
        rank=rank,
        world=world,
    )
    with running(loader) as batches:
        return list(batches)


def tokens(token_set):
    """The kept tokens of each clip."""
    if isinstance(token_set, Ragged):
        return [part.tolist() for part in token_set.index.split(list(token_set.lengths))]
    return token_set.tolist()


def clips_by_slot(batches):
    """slot -> (clip, its tokens of each set)."""
    found = {}
    for batch in batches:
        masks = [tokens(s) for s in (*batch.masks_context, *batch.masks_target)]
        assert len(masks) == 4
        for row, slot in enumerate(batch.slots):
            assert slot not in found
            found[slot] = batch.clips[row], [clip[row] for clip in masks]
    return found


def assert_same(got, want):
    assert list(got) == list(want)
    for slot, (clip, masks) in want.items():
        assert torch.equal(got[slot][0], clip), slot
        assert got[slot][1] == masks, slot


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wanted(good, bad):
    """The batches of three steps on five good files and four bad ones, in this process."""
    return load([*good, *bad])


def test_batches_hold_the_slots_in_order_with_clips_and_masks(wanted, good, bad):
    again = make_dataset([*good, *bad])
    assert [batch.slots for batch in wanted] == [tuple(range(8 * step, 8 * step + 8)) for step in range(3)]
    for batch in wanted:
        assert batch.clips.shape == (8, 3, FRAMES, CROP, CROP)
        assert batch.clips.dtype == torch.uint8
        assert all(s.shape[0] == 8 for s in (*batch.masks_context, *batch.masks_target))
        assert batch.bad == [entry for slot in batch.slots for entry in again[slot].bad]
    assert {path for batch in wanted for path, _ in batch.bad} == set(bad)
    masks = {json.dumps(masks) for _, masks in clips_by_slot(wanted).values()}
    assert len(masks) > 20  # positions are drawn for each clip


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_deliver_the_same_batches(good, bad, wanted, workers):
    batches = load([*good, *bad], workers=workers)
    assert [batch.slots for batch in batches] == [batch.slots for batch in wanted]
    assert_same(clips_by_slot(batches), clips_by_slot(wanted))
    assert {entry for batch in batches for entry in batch.bad} == {entry for batch in wanted for entry in batch.bad}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [1, 2])
def test_a_loader_that_starts_later_delivers_the_rest(good, bad, wanted, first, workers):
    assert_same(clips_by_slot(load([*good, *bad], first=first, workers=workers)), clips_by_slot(wanted[first:]))


def test_a_step_that_is_divided_has_the_same_clips_and_masks(good, bad, wanted):
    halves = load([*good, *bad], batch_size=4)
    assert [batch.slots for batch in halves] == [tuple(range(n, n + 4)) for n in range(0, 24, 4)]
    assert_same(clips_by_slot(halves), clips_by_slot(wanted))
    small_groups = load([*good, *bad], group=4)
    assert_same(clips_by_slot(load([*good, *bad], batch_size=2, group=4)), clips_by_slot(small_groups))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_the_clips_and_masks_of_one(good, bad, wanted, world, workers):
    of_ranks = [load([*good, *bad], batch_size=2, workers=workers, rank=rank, world=world) for rank in range(world)]
    shared = {}
    for batches in of_ranks:
        own = clips_by_slot(batches)
        assert not own.keys() & shared.keys()
        shared |= own
    assert_same({slot: shared[slot] for slot in sorted(shared)}, clips_by_slot(wanted))


def test_clips_depend_on_the_seed(good, bad, wanted):
    other = clips_by_slot(load([*good, *bad], seed=1))
    assert not any(torch.equal(other[slot][0], clip) for slot, (clip, _) in clips_by_slot(wanted).items())


def test_the_sampler_counts_its_batches():
    batches = SlotBatches(2, 5, 8, 4)
    assert len(batches) == len(list(batches)) == 6
    assert next(iter(batches)) == [16, 17, 18, 19]
    assert list(SlotBatches(3, 3, 8, 4)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_leaves_all_global_random_states_alone(good, workers):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    load(good, last=1, workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_a_batch_goes_to_a_device_with_its_masks(wanted):
    batch = wanted[0].to(torch.device("meta"))
    tensors = [batch.clips, *batch.masks_context, *batch.masks_target]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (batch.slots, batch.bad) == (wanted[0].slots, wanted[0].bad)


# -- clips ------------------------------------------------------------------------------------------------------------


def test_a_clip_is_what_the_plan_says_of_the_video_it_names(good):
    dataset = make_dataset(good)
    for slot in range(10):
        info = probe(good[dataset.plan.order.video(slot)])
        draw = dataset.plan.clip(slot, info.frames, info.height, info.width)
        sample = dataset[slot]
        assert torch.equal(
            sample.clips[0], grey_levels(read_frames(info, draw.frames), [draw.box] * FRAMES, draw.flip, CROP)
        )
        assert (sample.slot, sample.bad) == (slot, [])


def test_a_video_shorter_than_the_clip_repeats_its_last_frame(film, tmp_path):
    path = str(film.video(tmp_path / "short.mp4", frames=6))
    clip = make_dataset([path], frames=16)[0].clips[0]
    assert clip.shape == (3, 16, CROP, CROP)
    assert all(torch.equal(clip[:, number], clip[:, 15]) for number in range(3, 16))
    assert not torch.equal(clip[:, 0], clip[:, 15])


def test_a_video_of_one_tubelet_is_good_enough(film, tmp_path):
    assert make_dataset([str(film.video(tmp_path / "two.mp4", frames=2))])[0].bad == []


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [10**9, 250_000, 1])
def test_the_cache_changes_no_clip_and_keeps_to_its_size(good, bad, wanted, cache_bytes):
    paths = [*good, *bad]
    assert_same(clips_by_slot(load(paths, cache_bytes=cache_bytes)), clips_by_slot(wanted))
    dataset = make_dataset(paths, cache_bytes=cache_bytes)
    for slot in range(24):
        _ = dataset[slot]
    kept = [decoded.nbytes for decoded in dataset.reader._decoded.values()]
    assert sum(kept) == dataset.reader._decoded_bytes <= cache_bytes
    assert len(kept) == {10**9: 5, 1: 0}.get(cache_bytes, len(kept))
    assert cache_bytes != 250_000 or 0 < len(kept) < 5


def test_a_cached_video_is_decoded_once_and_a_file_is_probed_once(good, bad, monkeypatch):
    decoded, probed = [], []
    monkeypatch.setattr(dataset_module, "probe", lambda path: probed.append(path) or probe(path))
    dataset = make_dataset([*good, *bad], cache_bytes=10**9)
    dataset.reader.read_frames = lambda info, n: decoded.append(info.path) or read_frames(info, n)
    for slot in range(60):
        _ = dataset[slot]
    assert sorted(decoded) == sorted(good)
    assert sorted(probed) == sorted([*good, *bad, *bad]), "a bad one has a second chance"


def test_what_is_known_of_files_is_bounded(good, monkeypatch):
    monkeypatch.setattr(dataset_module, "INFOS_KEPT", 2)
    dataset = make_dataset(good)
    clips = [dataset[slot].clips[0] for slot in range(10)]
    assert len(dataset.reader._infos) == 2
    monkeypatch.undo()
    fresh = make_dataset(good)
    assert all(torch.equal(clip, fresh[slot].clips[0]) for slot, clip in enumerate(clips))


# -- bad files --------------------------------------------------------------------------------------------------------


def test_a_bad_file_is_replaced_by_the_slot_alone_and_told_with_its_reason(good, bad):
    paths = [*good, *bad]
    dataset, again = make_dataset(paths), make_dataset(paths)
    asked = [paths[dataset.plan.order.video(slot)] for slot in range(len(paths))]
    samples = {slot: dataset[slot] for slot in range(len(paths))}
    for slot, sample in samples.items():
        assert [path for path, _ in sample.bad][:1] == ([asked[slot]] if asked[slot] in bad else [])
        assert all(reason == bad[path] for path, reason in sample.bad)
        tried = [asked[slot], *(paths[dataset.plan.order.replacement(slot, attempt)] for attempt in range(16))]
        taken = next(path for path in tried if path not in bad)
        told = [path for path, _ in sample.bad]
        assert told == list(dict.fromkeys(tried[: tried.index(taken)]))
        info = probe(taken)
        draw = dataset.plan.clip(slot, info.frames, info.height, info.width)
        assert torch.equal(
            sample.clips[0], grey_levels(read_frames(info, draw.frames), [draw.box] * FRAMES, draw.flip, CROP)
        )
    for slot in reversed(samples):
        assert torch.equal(again[slot].clips[0], samples[slot].clips[0])
        assert again[slot].bad == samples[slot].bad


def test_a_file_that_breaks_after_its_probe_is_replaced_too(film, good, tmp_path):
    path = film.video(tmp_path / "fragile.mp4", frames=8)
    dataset = make_dataset([str(path), good[0]])
    assert all(dataset[slot].bad == [] for slot in range(4))
    path.unlink()
    reports = [dataset[slot].bad for slot in range(4)]
    assert sorted(map(len, reports)) == [0, 0, 1, 1]
    assert all(report == [(str(path), "the file does not exist")] for report in reports if report)


def test_a_file_that_was_replaced_by_another_is_looked_at_anew(film, tmp_path):
    path = film.video(tmp_path / "changing.mp4", frames=30)
    reader = Reader([str(path)], 2)
    reader.info(0)
    path.write_text("no video any more")
    with pytest.raises(VideoError):
        reader.read(0, np.array([3]))
    film.video(path, frames=12)
    assert reader.info(0).frames == 12


def test_a_given_frame_rate_is_for_what_does_not_say_its_own(good):
    assert Reader(good, 2, frame_rate=7.0).info(0).rate == 24


def test_one_good_file_among_many_is_found(good, bad):
    paths = [*(f"{next(iter(bad))}.{n}" for n in range(300)), good[0]]
    sample = make_dataset(paths)[0]
    assert len(sample.bad) > 16
    assert len(set(sample.bad)) == len(sample.bad)


def test_an_error_that_is_raised_again_keeps_no_clip_in_memory(good, bad):
    dataset = make_dataset([good[0], *bad])
    read, alive = dataset.reader.read, []

    def watched(video, frames):
        images = read(video, frames)
        alive.append(weakref.ref(images))
        return images

    dataset.reader.read = watched
    for slot in range(20):
        assert dataset[slot].clips[0] is not None
    gc.collect()
    assert len(alive) == 20
    assert not [reference for reference in alive if reference() is not None]


@pytest.mark.parametrize("workers", [0, 2])
def test_without_any_good_file_the_loader_says_so_in_one_sentence(bad, workers):
    with pytest.raises(TooManyBadFiles) as caught:
        load(bad, workers=workers)
    text = str(caught.value)
    assert text.startswith("none of the 4 files can be read, ")
    assert any(path in text for path in bad)
    assert sum(f"1 times: {reason}" in text for reason in bad.values()) == 3
    assert "\n" not in text
    assert multiprocessing.active_children() == []


def test_other_errors_of_a_reader_are_not_taken_for_bad_files(good):
    def broken(info, numbers):
        raise MemoryError("out of memory")

    dataset = make_dataset(good)
    dataset.reader.read_frames = broken
    with pytest.raises(MemoryError):
        _ = dataset[0]


def test_the_reader_tells_why_a_file_is_bad_every_time(bad):
    reader = Reader(list(bad), 2)
    for _ in range(2):
        for number, (path, reason) in enumerate(bad.items()):
            with pytest.raises(VideoError) as caught:
                reader.info(number)
            assert (str(caught.value), caught.value.path) == (reason, path)


def test_a_file_of_fewer_frames_than_a_tubelet_is_bad(film, tmp_path):
    path = str(film.video(tmp_path / "three.mp4", frames=3))
    with pytest.raises(VideoError, match=r"^it has 3 frames, fewer than one tubelet of 4$"):
        Reader([path], 4).info(0)
    assert Reader([path], 3).info(0).frames == 3


# -- the list of bad files --------------------------------------------------------------------------------------------


def entries(count, start=0):
    return [(f"/videos/{number}.mp4", "the file is empty") for number in range(start, start + count)]


def test_each_bad_file_is_written_down_once(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    bad_files = ReplacedFiles(path, 1000, 0.01)
    assert not path.exists()
    assert bad_files.report(entries(2) + entries(1)) == entries(2)
    assert bad_files.report(entries(3)) == entries(1, start=2)
    assert bad_files.report([]) == []
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == [{"path": p, "reason": r} for p, r in entries(3)]
    again = ReplacedFiles(path, 1000, 0.01)
    assert again.reasons == dict(entries(3))
    assert again.report(entries(4)) == entries(1, start=3)
    assert len(path.read_text().splitlines()) == 4


def test_what_could_not_read_a_file_is_written_down_too(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    ReplacedFiles(path, 1000, 0.01, decoder="pyav").report(entries(1))
    assert json.loads(path.read_text()) == {"path": "/videos/0.mp4", "reason": "the file is empty", "decoder": "pyav"}
    assert ReplacedFiles(path, 1000, 0.01).reasons == dict(entries(1))


def test_strange_names_of_bad_files_survive(tmp_path):
    names = [("/videos/a\nb.mp4", 'with "quotes"'), ("/videos/\udcff.mp4", "ünïcode"), ("/videos/\u2028.mp4", "")]
    ReplacedFiles(tmp_path / "bad.jsonl", 100, 0).report(names)
    assert ReplacedFiles(tmp_path / "bad.jsonl", 100, 0).reasons == dict(names)


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    ReplacedFiles(path, 100, 0).report(entries(3))
    for cut_at in (-1, -20):
        path.write_text(path.read_text()[:cut_at])
        reopened = ReplacedFiles(path, 100, 0)
        assert reopened.reasons == dict(entries(2))
        assert reopened.report(entries(3)) == entries(1, start=2)
        assert ReplacedFiles(path, 100, 0).reasons == dict(entries(3))


@pytest.mark.parametrize(
    ("total", "fraction", "allowed"),
    [(5, 0.0, 10), (5, 1.0, 10), (999, 0.01, 10), (1100, 0.01, 11), (10_000, 0.0, 10), (40, 0.5, 20)],
)
def test_ten_bad_files_or_the_given_share_are_tolerated(tmp_path, total, fraction, allowed):
    bad_files = ReplacedFiles(tmp_path / "bad_files.jsonl", total, fraction)
    assert len(bad_files.report(entries(allowed))) == allowed
    with pytest.raises(TooManyBadFiles) as caught:
        bad_files.report(entries(1, start=allowed))
    assert str(caught.value) == (
        f"{allowed + 1} of {total} files cannot be read, more than the {allowed} that data.max_bad_fraction allows; "
        f"they are listed in {tmp_path}/bad_files.jsonl"
    )
    with pytest.raises(TooManyBadFiles):  # a resumed run does not get a new quota
        ReplacedFiles(tmp_path / "bad_files.jsonl", total, fraction).report([])
    assert len((tmp_path / "bad_files.jsonl").read_text().splitlines()) == allowed + 1


def test_a_list_of_bad_files_that_cannot_be_written_is_said_and_still_counted(tmp_path):
    said = []
    bad = ReplacedFiles(tmp_path / "gone" / "bad_files.jsonl", 100, 0.01, said.append)
    assert bad.report([("a.mp4", "why")]) == [("a.mp4", "why")]
    assert "cannot be written" in said[0]
    with pytest.raises(TooManyBadFiles):
        bad.report([(f"{i}.mp4", "why") for i in range(10)])
