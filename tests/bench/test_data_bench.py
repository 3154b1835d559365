"""The data bench: its videos, what it compares before it times, and what its timed blocks hold."""

import multiprocessing
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from types import ModuleType, SimpleNamespace

import av
import numpy as np
import pytest
import torch

from bench import test_data, test_scaling
from bench.data import batches, decoders, loading
from bench.data import videos as made
from fastjepa.data import decode
from fastjepa.data.decoders import dali
from fastjepa.data.loader import Batch
from fastjepa.data.sampling import ClipPlan
from tests.pedantic import Pedantic

CPU = torch.device("cpu")
SMALL = "160x128"
LENGTHS = sorted(set(made.SIZES.values()))  # before any test has others


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "SIZES", {SMALL: 80})
        yield made.Shelf(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(test_data, "ROUNDS", 1)
    monkeypatch.setattr(test_data, "READ_ROUNDS", 1)
    monkeypatch.setattr(test_data, "BESIDE_ROUNDS", 1)
    monkeypatch.setattr(loading, "LEAST_CLIPS", 8)
    return []


def test_videos_have_their_frames_key_frames_and_bits(shelf):
    infos = [decode.probe(shelf.path(SMALL, gop)) for gop in made.GOPS]
    assert [(info.frames, info.width, info.height, info.rate) for info in infos] == [(80, 160, 128, 30)] * 2
    assert infos[0].keys.tolist() == list(range(0, 80, 12))
    assert infos[1].keys.tolist() == [0]
    sizes = [shelf.path(SMALL, gop).stat().st_size for gop in made.GOPS]
    assert sizes[0] > sizes[1] > 0.1 / 8 * 80 * 160 * 128, "a tenth of a bit a pixel is little already"
    first, second = (decode.read_frames(info, range(80)).astype(int) for info in infos)
    assert np.abs(first - second).mean() < 10, "the same pictures in both"
    assert np.abs(np.diff(first, axis=0)).mean(axis=(1, 2, 3)).min() > 2 * decoders.SAME, "frames can be told apart"


def test_a_video_is_made_once(shelf, monkeypatch):
    path = shelf.path(SMALL, 12)
    monkeypatch.setattr(made, "write", lambda *_: pytest.fail("made again"))
    assert shelf.path(SMALL, 12) == path
    assert shelf.path(SMALL, 250) != path


@pytest.mark.parametrize("gop", made.GOPS)
def test_all_ways_read_the_same_frames(shelf, gop):
    info = decode.probe(shelf.path(SMALL, gop))
    clips = [draw.frames for draw in decoders.draws(info, 2)] + [np.array([5, 5, 79])]
    ways, _ = decoders.readers(info)
    assert list(ways)[:3] == ["fastjepa", "fastjepa, new video", decoders.PLAIN]
    right = decoders.differences(ways, clips)
    assert max(one.levels for one in right.values()) <= 1
    assert max(one.wrong for one in right.values()) == 0
    ways["late"] = lambda frames: ways["fastjepa"](np.minimum(frames + 1, 79))
    assert decoders.differences(ways, clips)["late"].wrong > 0.9, "of the last frame there is no later one"
    ways[decoders.NEW] = ways["late"]
    with pytest.raises(ValueError, match=r"fastjepa, new video: frames \[.*\] differ from PyAV from the start by "):
        decoders.differences(ways, clips)


def test_one_wrong_frame_of_a_clip_is_found(shelf):
    info = decode.probe(shelf.path(SMALL, 12))
    ways = {decoders.PLAIN: lambda frames: decode.read_frames(info, frames)}
    ways["slip"] = lambda frames: ways[decoders.PLAIN](np.where(frames == 40, 41, frames))
    found = decoders.differences(ways, [np.arange(0, 64, 4)])
    assert found["slip"] == decoders.Apart(0.0, 1 / 16)
    assert found[decoders.PLAIN] == decoders.Apart(0.0, 0.0)


@pytest.mark.parametrize("gop", made.GOPS)
def test_frames_decoded_are_counted_right(shelf, gop, monkeypatch):
    info, frames = decode.probe(shelf.path(SMALL, gop)), np.arange(15, 79, 4)
    real, seen = decode._Converter.__call__, []
    monkeypatch.setattr(decode._Converter, "__call__", lambda self, frame: seen.append(1) or real(self, frame))
    frames_of, decoded = decode._frames, []
    monkeypatch.setattr(decode, "_frames", lambda *a: (decoded.append(f) or f for f in frames_of(*a)))
    decode.read_frames(info, frames)
    assert decoders.frames_decoded(info, frames, "fastjepa") == len(decoded) == {12: 64, 250: 76}[gop]
    assert decoders.frames_decoded(info, frames, decoders.PLAIN) == 76


def fake_torchcodec(monkeypatch, decoder):
    module = ModuleType("torchcodec.decoders")
    module.VideoDecoder = decoder
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)


def test_torchcodec_is_read_in_both_modes(shelf, monkeypatch):
    opened = []

    class Decoder:
        def __init__(self, path, *, dimension_order, num_ffmpeg_threads, seek_mode):
            assert (dimension_order, num_ffmpeg_threads) == ("NHWC", 1)
            opened.append(seek_mode)
            self.path = path

        def get_frames_at(self, indices):
            assert all(type(i) is int for i in indices)
            return SimpleNamespace(data=torch.from_numpy(decoders.read_plainly(self.path, np.array(indices))))

    fake_torchcodec(monkeypatch, Decoder)
    monkeypatch.setattr(decoders, "why_not", lambda: "")
    monkeypatch.setattr(decoders, "read_with_torchcodec", decode.read_frames)
    info = decode.probe(shelf.path(SMALL, 12))
    ways, lacking = decoders.readers(info)
    assert lacking.keys() <= {"decord"}
    decoders.differences(ways, [np.array([3, 7])])
    assert opened == ["exact", "approximate"]


def test_libraries_that_cannot_run_are_skipped_with_their_reasons(shelf, monkeypatch, rows):
    monkeypatch.setattr(decoders, "why_not", lambda: "torchcodec is not installed")
    monkeypatch.setitem(sys.modules, "decord", None)
    ways, lacking = decoders.readers(decode.probe(shelf.path(SMALL, 12)))
    assert list(ways) == [decoders.OURS, decoders.NEW, decoders.PLAIN]
    assert lacking.keys() == {decoders.OURS_TORCHCODEC, *decoders.TORCHCODEC, decoders.DECORD}
    test_data.test_decode(Pedantic(), rows.extend, CPU, shelf, SMALL, 12)
    skipped = [(row["parameters"]["way"], row["skipped"]) for row in rows if "skipped" in row]
    assert skipped[0] == (decoders.OURS_TORCHCODEC, f"{decoders.OURS_TORCHCODEC}: torchcodec is not installed")
    assert skipped[-1][1].startswith("decord: decord does not load: import of decord halted")


def test_rates_of_decoders_are_of_the_clips_and_frames_they_read(shelf, rows, monkeypatch):
    read = []
    real = decoders.read_frames
    monkeypatch.setattr(decoders, "read_frames", lambda info, frames: read.append(len(frames)) or real(info, frames))
    monkeypatch.setattr(test_data, "processor_clock", lambda call: call() and 1000.0)
    test_data.test_decode(Pedantic(), rows.extend, CPU, shelf, SMALL, 250)
    found = {(row["name"], row["parameters"].get("way")): row for row in rows if "value" in row}
    for way in (decoders.OURS, decoders.PLAIN):
        assert found["decode", way]["value"] == test_data.READ
        assert found["processor time of a clip", way]["value"] == 1 / test_data.READ
        assert found["over PyAV from the start", way]["value"] == 1.0
        assert found["wrong frames", way]["value"] == 0
        assert {row["clock"] for (_, name), row in found.items() if name == way and row["unit"] in ("s", "x")} == {
            "processor"
        }, "no figure of a GPU beside it"
    info = decode.probe(shelf.path(SMALL, 250))
    last = sum(int(frames.max()) + 1 for frames in decoders.spaced(info, test_data.READ))
    assert found["source frames", decoders.OURS]["value"] == found["source frames", decoders.PLAIN]["value"] == last
    assert ("decode", decoders.NEW) in found
    assert set(read) == {decoders.FRAMES}


@pytest.fixture
def batched(shelf, monkeypatch):
    """Batches of a small video, by DALI's own decoders."""
    if reason := dali.why_not(CPU):
        pytest.skip(reason)
    monkeypatch.setattr(made, "CODED_SIZE", SMALL)
    monkeypatch.setattr(made, "CODED_FRAMES", 80)
    monkeypatch.setattr(test_data, "BATCH_ROUNDS", 1)
    monkeypatch.setitem(batches.SIZE, "cpu", 3)
    return shelf


def test_batches_have_a_row_for_each_way_and_number_of_threads(batched, rows):
    test_data.test_batches(Pedantic(), rows.extend, CPU, batched, "mjpeg", SMALL, 12)
    rates = [row for row in rows if row["name"] == "batches"]
    found = [tuple(row["parameters"][key] for key in ("way", "threads", "prefetch")) for row in rates]
    assert found == [("pyav", 1, 0), ("dali_cpu", 1, 2), *(("dali_cpu", 2, ahead) for ahead in (1, 2))]
    assert all(row["value"] > 0 and row["clock"] == "wall" for row in rates)
    assert len([row for row in rows if row["name"] == "processor time of a clip"]) == 4
    (bad,) = [row for row in rows if row["unit"] == "x"]
    assert bad["name"] == "a batch with a bad file over one without"


def test_codecs_that_dali_does_not_read_here_are_skipped_with_the_reason(batched, rows, monkeypatch):
    with pytest.raises(pytest.skip.Exception):
        test_data.test_batches(Pedantic(), rows.extend, CPU, batched, "h264", SMALL, 12)
    assert [row["skipped"] for row in rows] == ["DALI reads no h264 on a cpu"]
    monkeypatch.setattr(test_data.dali, "why_not", lambda device: "DALI is not installed")
    assert test_data.batches_lack("mjpeg", CPU) == "DALI is not installed"
    monkeypatch.setattr(test_data.dali, "why_not", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert test_data.batches_lack("av1", torch.device("cuda")) == "this GPU decodes no AV1"
    assert test_data.batches_lack("hevc", torch.device("cuda")) == ""


def test_batches_that_are_not_those_of_pyav_are_no_figure(batched):
    source = batches.Source(batched.coded("mjpeg"), CPU)
    pixels = next(batches.decoded(batches.decoder(CPU, 1, 1), source.batches[:1], 1))
    batches.check(source, pixels)
    with pytest.raises(ValueError, match="clips differ by"):
        batches.check(source, pixels.flip(0))
    broken = [replace(source.batches[0][0], encoded=batches.NOT_A_VIDEO)]
    with pytest.raises(ValueError, match="DALI"):
        list(batches.decoded(batches.decoder(CPU, 1, 1), [broken], 1))


def test_the_use_of_the_video_engines_is_read_while_a_block_runs(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nwhile true; do echo 37; echo '[N/A]'; sleep 0.01; done\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with batches.engines_watched() as seen:
        deadline = time.monotonic() + 30
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
    assert set(seen) == {37.0}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with batches.engines_watched() as seen:
        pass
    assert seen == []


def test_transforms_and_masks_have_a_row_each(shelf, rows):
    test_data.test_transform(Pedantic(), rows.extend, CPU, shelf, SMALL)
    assert [row["name"] for row in rows] == [
        "transform", "transform with motion shift", "transform with erasing", "transform with RandAugment",
    ]  # fmt: skip
    rows.clear()
    test_data.test_masks(Pedantic(), rows.extend, CPU)
    assert [row["name"] for row in rows] == ["masks, multiblock", "masks, multiblock, no truncation", "masks, tube"]
    assert all(row["value"] > 0 for row in rows)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gop", made.GOPS)
def test_timed_clips_are_like_those_that_a_run_draws(shelf, gop, length):
    """What a way decodes for a clip goes by its place: the mean over few clips must be that over many."""
    info = replace(decode.probe(shelf.path(SMALL, gop)), frames=length, keys=np.arange(0, length, gop))
    drawn = [draw.frames for draw in decoders.draws(info, 2000)]
    for way in ("fastjepa", decoders.PLAIN):
        few, many = (
            np.mean([decoders.frames_decoded(info, frames, way) for frames in clips])
            for clips in (decoders.spaced(info, test_data.READ), drawn)
        )
        assert few == pytest.approx(many, rel=0.05)


def test_blocks_of_the_loader_are_like_what_a_run_loads(tmp_path):
    """As above: on any machine, of few workers or many, of small batches or published ones."""
    s = loading.settings_of(tmp_path / "any.mp4", 4)
    d, (size, gop) = s.data, loading.LOADED
    width, height = map(int, size.split("x"))
    plan = ClipPlan(s.optim.seed, np.arange(1), d.frames, d.stride, d.scale, d.aspect, d.flip)
    slots = 24 * (loading.FIRST + 32)
    assert slots < loading.LISTED, "each clip is of a new video"
    assert max(test_scaling.WORKERS) < loading.FIRST, "a batch of each worker and one more come before"
    info = SimpleNamespace(keys=np.arange(0, 300, gop))
    decoded = np.array([decoders.frames_decoded(info, plan.clip(slot, 300, height, width).frames, "fastjepa")
                        for slot in range(slots)])  # fmt: skip
    for clips, most in ((4, 32), (24, 8)):
        for workers in range(most + 1):
            block = clips * loading.block_of(workers, clips)
            begin = clips * loading.FIRST
            assert decoded[begin : begin + block].mean() == pytest.approx(decoded.mean(), rel=0.05)


def test_transforms_differ_by_their_further_draws_alone(shelf):
    info = decode.probe(shelf.path(SMALL, 12))
    cut = [[(draw.box, draw.flip) for draw in decoders.draws(info, test_data.CUT, augmentation)]
           for augmentation in test_data.AUGMENTED.values()]  # fmt: skip
    assert cut == [cut[0]] * 4


def test_more_workers_than_processors_are_refused_with_a_sentence(monkeypatch):
    monkeypatch.setattr(loading, "processors", lambda: 2)
    assert loading.why_not(2) == ""
    assert loading.why_not(4) == "4 workers are more than this machine's 2 processors"


def test_a_block_has_as_many_batches_of_each_worker_and_some_dozen_clips():
    assert [loading.block_of(workers, 4) for workers in (0, 2, 7, 8, 16)] == [12, 12, 14, 16, 16]
    assert [loading.block_of(workers, 24) for workers in (0, 3, 8)] == [2, 3, 8]


def test_the_loader_is_that_of_a_run_and_every_clip_is_of_a_new_video(shelf, monkeypatch):
    from fastjepa.data import dataset

    probed, real = [], dataset.probe
    monkeypatch.setattr(dataset, "probe", lambda path: probed.append(path) or real(path))
    s = loading.settings_of(shelf.path(SMALL, 12), 2, *loading.TINY)
    assert (s.optim.global_batch, s.data.frames, s.data.crop, s.data.stride) == (2, 16, 64, 4)
    with loading.batches_of(s, 0, CPU) as batches:
        first, second = next(batches), next(batches)
    assert probed == [str(shelf.path(SMALL, 12))] * 4
    assert first.clips.shape == (2, 3, 16, 64, 64)
    assert first.clips.dtype == torch.uint8
    assert (first.slots, second.slots) == ((0, 1), (2, 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fresh_loader_times_the_same_clips_whatever_its_workers_and_ends_them(shelf, monkeypatch, workers):
    monkeypatch.setattr(loading, "LEAST_CLIPS", 2)
    s = loading.settings_of(shelf.path(SMALL, 12), 2, *loading.TINY)
    seen = []
    assert loading.fresh(s, workers, CPU, lambda batch: seen.append(batch.slots), block=2).ms > 0
    assert seen[workers + 1 :] == [(112, 113), (114, 115)], "from batch FIRST on"
    assert multiprocessing.active_children() == []


def batch(bad=()):
    return Batch(torch.zeros(1), [], [], None, (0,), list(bad), [])


def test_a_stretch_counts_as_waited_what_the_loader_takes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loading, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def coming():
        while True:
            now[0] += 3.0
            yield batch()

    def step(_):
        now[0] += 1.0

    found = loading.stretch(coming(), step, 5, CPU)
    assert found == (pytest.approx(20_000), pytest.approx(0.75))


def test_a_stretch_refuses_clips_of_another_file():
    with pytest.raises(ValueError, match=r"a\.mp4: the file is empty"):
        loading.stretch(iter([batch([("a.mp4", "the file is empty")])]), loading.pass_by, 1, CPU)


@pytest.mark.parametrize(("workers", "block", "timed"), [(0, None, 2), (1, None, 2), (4, None, 4), (1, 5, 5)])
def test_a_fresh_loader_has_no_queue_when_its_block_begins(monkeypatch, workers, block, timed):
    monkeypatch.setattr(loading, "LEAST_CLIPS", 8)
    events, real = [], loading.stretch
    s = SimpleNamespace(optim=SimpleNamespace(global_batch=4))

    @contextmanager
    def started(s, given, device, first):
        assert (given, first) == (workers, loading.FIRST - workers - 1)
        events.append("started")
        yield (batch() for _ in count())
        events.append("ended")

    monkeypatch.setattr(loading, "batches_of", started)
    monkeypatch.setattr(loading, "stretch", lambda b, step, n, device: events.append(n) or real(b, step, n, device))
    steps = []
    loading.fresh(s, workers, CPU, steps.append, block)
    assert events == ["started", workers + 1, timed, "ended"]
    assert len(steps) == sum(events[1:3]), "steps are taken from the first batch on"


def test_steps_beside_the_loader_are_training_steps(shelf, rows, monkeypatch):
    monkeypatch.setattr(test_data, "LOADED", (SMALL, 12))
    monkeypatch.setattr(test_data, "auto_workers", lambda: 0)
    kept = []
    real = loading.Beside.variants
    monkeypatch.setattr(loading.Beside, "variants", lambda self: kept.append(self) or real(self))
    test_data.test_beside_a_step(Pedantic(), rows.extend, CPU, shelf)
    (beside,) = kept
    assert [(row["name"], row["parameters"]["decoder"]) for row in rows] == [
        ("steps with the loader", "dali_gpu"), ("steps with the loader", "pyav"), ("loader alone", "pyav"),
        ("steps alone", "-"), ("data wait", "pyav"),
    ]  # fmt: skip
    assert rows[0]["skipped"] == "dali_gpu: there is no GPU to decode on"
    together = loading.WARM_UP + (1 + 2) + 2
    assert beside.runner.taken == together, "warm-up, a settling loader's and a block's steps, a block alone"
    assert {name: len(shares) for name, shares in beside.waited.items()} == {"pyav": 1}
    assert 0 < rows[-1]["value"] < 100
    assert all(loss.isfinite() for loss in beside.runner.losses)


def test_plain_reading_stops_at_the_last_frame_wanted(shelf, monkeypatch):
    real, decoded = av.open, []

    @contextmanager
    def watched(path):
        with real(path) as container:
            yield SimpleNamespace(decode=lambda video: (decoded.append(f) or f for f in container.decode(video=video)))

    monkeypatch.setattr(decoders.av, "open", watched)
    decoders.read_plainly(str(shelf.path(SMALL, 12)), np.array([3, 9, 9]))
    assert len(decoded) == 10
