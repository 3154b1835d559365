"""What DALI cannot decode costs its clip, never the batch or those after it."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastjepa.data.decode import probe, read_frames
from fastjepa.data.decoders import dali
from fastjepa.data.decoders.dali import DaliDecoder, EncodedClip
from fastjepa.data.decoders.graph import build_graph
from fastjepa.data.sampling import Box, ClipDraw
from fastjepa.data.transforms import transform

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

T, CROP = 4, 48
VP9 = {"codec": "libvpx-vp9", "deadline": "realtime", "cpu_used": "8"}


@pytest.fixture(scope="module")
def good(tmp_path_factory, film):
    path = tmp_path_factory.mktemp("dali") / "good.webm"
    return film.write(path, [film.picture(i, 96, 160) for i in range(30)], **VP9)


@pytest.fixture
def decoder():
    one = DaliDecoder(frames=T, crop=CROP, most=4, device=torch.device("cpu"), threads=2, prefetch=3)
    yield one
    one.close()


def clip_of(path, first=0):
    frames = np.arange(first, first + T)
    return EncodedClip(str(path), np.fromfile(path, np.uint8), frames, Box(4, 6, 80, 100), first % 2 == 1, 96, 160)


def is_right(pixels, clip):
    wanted = transform(read_frames(probe(clip.path), clip.frames), ClipDraw(clip.frames, clip.box, clip.flip), CROP)
    return (pixels.int() - wanted.int()).abs().float().mean() < 3


def empty(path, film, folder):
    return replace(clip_of(path), encoded=np.zeros(0, np.uint8)), "does not support empty input"


def text(path, film, folder):
    return replace(clip_of(path), encoded=np.frombuffer(b"no video\n" * 500, np.uint8)), "create video decoder"


def number_too_large(path, film, folder):
    return replace(clip_of(path), frames=np.array([0, 1, 30, 2])), "out-of-bounds frame index 30"


def number_below_zero(path, film, folder):
    return replace(clip_of(path), frames=np.array([0, -1, 3, 2])), "out-of-bounds frame index -1"


def cut_in_half(path, film, folder):
    whole = clip_of(path, 26)
    return replace(whole, encoded=whole.encoded[: len(whole.encoded) // 2]), "out-of-bounds frame index"


def codec_for_gpus(path, film, folder):
    other = film.write(folder / "h264.mp4", [film.picture(i, 96, 160) for i in range(8)])
    return clip_of(other), "create video decoder"


def damaged(path, film, folder):
    other = folder / "damaged.webm"
    other.write_bytes(path.read_bytes())
    return clip_of(film.spoil(other, [2])), "Invalid data found"


def another_size(path, film, folder):
    return replace(clip_of(path), height=90), "pictures of 160 x 96 pixels in it, not of 160 x 90"


@pytest.mark.parametrize(
    "fault",
    [empty, text, number_too_large, number_below_zero, cut_in_half, codec_for_gpus, damaged, another_size],
    ids=lambda fault: fault.__name__,
)
def test_a_clip_that_fails_is_named_and_all_others_come_out(decoder, good, film, tmp_path, fault):
    bad, reason = fault(good, film, tmp_path)
    fine = [clip_of(good, first) for first in range(5)]
    decoder.begin([fine[0], bad, fine[1]])
    decoder.begin([fine[2], fine[3]])
    decoder.begin([bad])
    found, failed = decoder.finish()
    decoder.begin([fine[4]])
    assert list(failed) == [1]
    assert reason in failed[1]
    assert re.fullmatch(r"DALI [^\n]{10,300}", failed[1])
    assert not found[1].any()
    assert is_right(found[0], fine[0])
    assert is_right(found[2], fine[1])
    found, failed = decoder.finish()
    assert not failed
    assert is_right(found[0], fine[2])
    assert is_right(found[1], fine[3])
    found, failed = decoder.finish()
    assert (list(failed), found.any()) == ([0], False)
    found, failed = decoder.finish()
    assert not failed
    assert is_right(found[0], fine[4])


def test_several_failing_clips_of_one_batch_are_all_named(decoder, good, film, tmp_path):
    fine = clip_of(good, 3)
    decoder.begin([text(good, film, tmp_path)[0], fine, empty(good, film, tmp_path)[0]])
    found, failed = decoder.finish()
    assert sorted(failed) == [0, 2]
    assert is_right(found[1], fine)


def breaks(monkeypatch, decoder, what):
    """From now on the pipeline fails as one does that an exception has left dead."""

    def dead(*_, **__):
        raise RuntimeError("Current pipeline object is no longer valid.")

    monkeypatch.setattr(decoder._pipeline, what, dead)


@pytest.mark.parametrize("what", ["outputs", "schedule_run", "feed_input"])
def test_a_dead_pipeline_is_replaced_and_what_was_under_way_decoded_again(decoder, good, monkeypatch, what):
    clips = [clip_of(good, first) for first in range(6)]
    dead = decoder._pipeline
    decoder.begin(clips[:2])
    decoder.begin(clips[2:3])
    breaks(monkeypatch, decoder, what)
    if what != "outputs":
        decoder.begin(clips[3:])
    found = [*decoder.finish()[0], *decoder.finish()[0]]
    if what == "outputs":
        decoder.begin(clips[3:])
    pixels, failed = decoder.finish()
    assert decoder._pipeline is not dead
    assert not failed
    assert all(is_right(pixel, clip) for pixel, clip in zip([*found, *pixels], clips, strict=True))


class Mortal:
    """A pipeline that is dead once it has failed, as DALI says of its own."""

    def __init__(self, pipeline):
        self.pipeline, self.dead = pipeline, False

    def feed_input(self, name, arrays):
        self.pipeline.feed_input(name, arrays)

    def schedule_run(self):
        self.pipeline.schedule_run()

    def outputs(self, stream):
        if self.dead:
            raise RuntimeError("Current pipeline object is no longer valid.")
        self.dead = True
        found = self.pipeline.outputs(stream)
        self.dead = False
        return found


def test_pipelines_that_die_of_a_bad_clip_cost_no_other_clip(good, film, tmp_path, monkeypatch):
    monkeypatch.setattr(dali, "build_graph", lambda *settings: Mortal(build_graph(*settings)))
    decoder = DaliDecoder(frames=T, crop=CROP, most=4, device=torch.device("cpu"), threads=2, prefetch=3)
    fine = [clip_of(good, first) for first in range(4)]
    decoder.begin([text(good, film, tmp_path)[0], fine[0], empty(good, film, tmp_path)[0], fine[1]])
    decoder.begin([fine[2]])
    decoder.begin([fine[3]])
    results = [decoder.finish() for _ in range(3)]
    assert [list(failed) for _, failed in results] == [[0, 2], [], []]
    found = [results[0][0][1], results[0][0][3], results[1][0][0], results[2][0][0]]
    assert all(is_right(pixels, clip) for pixels, clip in zip(found, fine, strict=True))
    decoder.close()


def test_failing_again_without_a_bad_clip_ends_in_an_error(decoder, good, monkeypatch):
    decoder.begin([clip_of(good)])
    decoder.begin([clip_of(good)])
    breaks(monkeypatch, decoder, "outputs")
    decoder.finish()
    breaks(monkeypatch, decoder, "outputs")
    with pytest.raises(RuntimeError, match=r"DALI fails on whole batches .*no longer valid"):
        decoder.finish()
