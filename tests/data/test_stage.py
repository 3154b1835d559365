"""Clips that are decoded between loader and step: their order, what fails, and who takes its place."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from fastjepa.data import excerpt as pieces
from fastjepa.data.dataset import ClipDataset, Reader
from fastjepa.data.decode import probe, read_frames
from fastjepa.data.decoders.encoded import EncodedClip
from fastjepa.data.decoders.stage import AHEAD, Decoding, Failures
from fastjepa.data.excerpt import excerpt
from fastjepa.data.index import examine
from fastjepa.data.loader import make_loader, running
from fastjepa.data.sampling import ClipDraw, ClipPlan
from fastjepa.data.transforms import transform
from fastjepa.masks import MaskCollator

FRAMES, CROP = 4, 16


class Pixels:
    """A batch decoder that reads with PyAV what it is given, and fails where it is told to."""

    def __init__(self, fails=()):
        self.fails, self.begun, self.most, self.closed, self.asked = set(fails), [], 0, False, []
        self.batches = []

    def begin(self, clips):
        self.begun.append(clips)
        self.asked += [clip.path for clip in clips]
        self.batches.append([clip.path for clip in clips])
        self.most = max(self.most, len(self.begun))

    def finish(self):
        clips = self.begun.pop(0)
        made = torch.zeros(len(clips), 3, FRAMES, CROP, CROP, dtype=torch.uint8)
        failed = {}
        for place, clip in enumerate(clips):
            if clip.path in self.fails:
                failed[place] = "codec trouble"
                continue
            content = io.BytesIO(clip.encoded.tobytes())
            info = probe(clip.path, content)
            assert (clip.height, clip.width, clip.rotation) == (info.height, info.width, info.rotation)
            draw = ClipDraw(clip.frames, clip.box, clip.flip)
            made[place] = transform(read_frames(info, clip.frames, content), draw, CROP)
        return made, failed

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def paths(film, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    return [str(film.video(folder / f"{n}.mp4", frames=8 + 2 * n, rotation=90 * (n % 2))) for n in range(6)]


def make_dataset(paths, taken=None, known=None, **plan):
    settings = {"flip": True} | plan
    drawn = ClipPlan(0, np.arange(len(paths)), FRAMES, 2, (0.3, 1.0), (0.75, 1.35), **settings)
    if taken is None:
        return ClipDataset(Reader(paths, 2), drawn, CROP)
    known = known or [examine((path, len(np.fromfile(path, np.uint8)), 0)) for path in paths]
    encoded = np.array([path in taken for path in paths])
    return ClipDataset(Reader(paths, 2, known=known), drawn, CROP, encoded=encoded)


def load(dataset, decoder=None, steps=(0, 4), workers=0):
    sets = [{"num_blocks": 2, "spatial_scale": (0.3, 0.3), "temporal_scale": (0.5, 0.5), "aspect_ratio": (0.75, 1.5)}]
    loader = make_loader(
        dataset, MaskCollator(sets * 2, CROP, FRAMES, 4, 2, seed=0, truncation="random", group=4),
        first_step=steps[0], last_step=steps[1], global_batch=4, batch_size=4, workers=workers, pin_memory=False,
        tokens=32,
    )  # fmt: skip
    said = []
    with running(loader) as loaded:
        stage = Decoding(lambda: decoder, "dali_gpu", dataset, said.append)
        batches = list(stage(loaded))
    return batches, said


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted):
        assert one.slots == other.slots
        assert torch.equal(one.clips, other.clips)
        assert one.bad == other.bad


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("clips_per_video", [1, 2])
def test_clips_are_those_of_the_loader_processes_wherever_they_are_decoded(paths, workers, clips_per_video):
    wanted, _ = load(make_dataset(paths, clips_per_video=clips_per_video))
    for taken in (paths, paths[::2], paths[:1]):
        decoder = Pixels()
        got, said = load(make_dataset(paths, taken, clips_per_video=clips_per_video), decoder, workers=workers)
        assert_same(got, wanted)
        assert set(decoder.asked) == {path for path in decoder.asked if path in taken} != set()
        assert said == []
        assert decoder.closed


def test_by_frames_per_second_too(paths):
    wanted, _ = load(make_dataset(paths, fps=6.0))
    assert_same(load(make_dataset(paths, paths, fps=6.0), Pixels())[0], wanted)
    plain, _ = load(make_dataset(paths))
    assert not all(torch.equal(a.clips, b.clips) for a, b in zip(wanted, plain))


def test_a_batch_is_begun_before_the_one_before_is_waited_for(paths):
    decoder = Pixels()
    load(make_dataset(paths, paths), decoder)
    assert decoder.most == AHEAD


def test_batches_of_the_loader_processes_are_handed_on_at_once(paths):
    dataset, taken = make_dataset(paths), []
    (whole, _) = load(dataset)

    def counted():
        for batch in whole:
            taken.append(batch.slots)
            yield batch

    stage = Decoding(Pixels, "pyav", dataset, print)(counted())
    assert next(stage) is whole[0]
    assert len(taken) == 1


def test_a_later_start_gives_the_rest(paths):
    whole, _ = load(make_dataset(paths, paths), Pixels())
    assert_same(load(make_dataset(paths, paths), Pixels(), steps=(2, 4))[0], whole[2:])


def test_what_the_decoder_fails_on_pyav_reads_and_after_two_failures_at_once(paths):
    wanted, _ = load(make_dataset(paths), steps=(0, 12))
    decoder = Pixels(fails=[paths[3], paths[4]])
    got, said = load(make_dataset(paths, paths), decoder, steps=(0, 12))
    assert_same(got, wanted)
    assert sorted(said) == [
        f"decoder    {path}: dali_gpu fails (codec trouble), so pyav reads it" for path in sorted(paths[3:5])
    ]
    for path in paths[3:5]:
        # Batches that were begun before the second failure was known have it still.
        assert 2 <= decoder.asked.count(path) <= 2 + AHEAD
    assert decoder.asked.count(paths[0]) == 8


@pytest.mark.parametrize("clips_per_video", [1, 2])
def test_what_pyav_cannot_read_either_is_replaced_by_the_slot_alone(paths, film, tmp_path, clips_per_video):
    broken = tmp_path / "broken.mp4"
    film.video(broken, frames=9)
    everything = [*paths, str(broken)]
    known = [examine((path, len(np.fromfile(path, np.uint8)), 0)) for path in everything]
    dataset = make_dataset(everything, everything, known, clips_per_video=clips_per_video)

    class Breaking(Pixels):
        def finish(self):
            if any(clip.path == str(broken) for clip in self.begun[0]):
                broken.write_bytes(bytes(known[-1].size))
            return super().finish()

    got, said = load(dataset, Breaking(fails=[str(broken)]), steps=(0, 8))
    wanted, _ = load(make_dataset(everything, clips_per_video=clips_per_video), steps=(0, 8))
    assert len(said) == 1
    assert [batch.clips.tolist() for batch in got] == [batch.clips.tolist() for batch in wanted]
    assert {path for batch in got for path, _ in batch.bad} == {str(broken)}


def test_a_file_that_changed_since_it_was_indexed_is_replaced_and_told(paths, film, tmp_path):
    changing = film.video(tmp_path / "changing.mp4", frames=9)
    everything = [*paths, str(changing)]
    known = [examine((path, len(np.fromfile(path, np.uint8)), 0)) for path in everything]
    film.video(changing, frames=30)
    got, _ = load(make_dataset(everything, everything, known), Pixels(), steps=(0, 4))
    told = {entry for batch in got for entry in batch.bad}
    assert told == {(str(changing), "it has changed since the index was made")}


@pytest.mark.parametrize("clips_per_video", [1, 2])
def test_clips_whose_pieces_are_too_large_are_decoded_in_the_loader_processes(paths, monkeypatch, clips_per_video):
    wanted, _ = load(make_dataset(paths, clips_per_video=clips_per_video))
    sizes = [len(np.fromfile(path, np.uint8)) for path in paths]
    monkeypatch.setattr(pieces, "LARGEST", sorted(sizes)[3] // 2)
    decoder = Pixels()
    got, said = load(make_dataset(paths, paths, clips_per_video=clips_per_video), decoder)
    assert_same(got, wanted)
    assert 0 < len(decoder.asked) < 16
    assert said == []


def test_files_that_the_index_calls_unreadable_are_not_opened(paths, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("hello" * 50)
    everything = [*paths, str(text)]
    known = [examine((path, len(np.fromfile(path, np.uint8)), 0)) for path in everything]
    text.unlink()
    got, _ = load(make_dataset(everything, everything, known), Pixels())
    assert {entry for batch in got for entry in batch.bad} == {(str(text), known[-1].reason)}


def test_an_encoded_clip_is_what_the_plan_says(paths):
    dataset = make_dataset(paths, paths)
    for slot in range(6):
        (clip,) = dataset[slot].clips
        assert isinstance(clip, EncodedClip)
        info = probe(clip.path)
        draw = dataset.plan.clip(slot, info.frames, info.height, info.width)
        piece, numbers = excerpt(info, draw.frames)
        assert clip.encoded.tobytes() == piece.tobytes()
        assert clip.frames.tolist() == numbers.tolist()
        assert (clip.box, clip.flip) == (draw.box, draw.flip)


@pytest.fixture
def uneven(film, tmp_path):
    """A video whose second half is shown at a third of the rate."""
    path = tmp_path / "uneven.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = film.WIDTH, film.HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(film.picture(number), format="rgb24")
            frame.pts, frame.time_base = 40 * number + 80 * max(0, number - 20), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return str(path)


def test_true_times_count_for_clips_that_are_decoded_elsewhere(uneven):
    wanted, _ = load(make_dataset([uneven], fps=5.0), steps=(0, 6))
    got, _ = load(make_dataset([uneven], [uneven], fps=5.0), Pixels(), steps=(0, 6))
    assert_same(got, wanted)


def test_which_decoder_reads_a_clip_is_the_same_for_a_run_that_goes_on(paths, tmp_path):
    """What has failed is written down with its place: a later start knows what the run knew there, and no more."""

    def run(first, last, listed):
        decoder, said = Pixels(fails=[paths[3]]), []
        dataset = make_dataset(paths, paths)
        sets = [{"num_blocks": 2, "spatial_scale": (0.3, 0.3), "temporal_scale": (0.5, 0.5), "aspect_ratio": (1, 1)}]
        loader = make_loader(
            dataset, MaskCollator(sets, CROP, FRAMES, 4, 2, seed=0, truncation="random", group=4), first_step=first,
            last_step=last, global_batch=4, batch_size=4, workers=0, pin_memory=False, tokens=32,
        )  # fmt: skip
        with running(loader) as loaded:
            stage = Decoding(lambda: decoder, "dali_gpu", dataset, said.append, Failures(listed, 4 * first))
            assert all(batch.clips.shape[0] == 4 for batch in stage(loaded))
        return decoder.batches, said

    whole, said = run(0, 16, tmp_path / "whole.jsonl")
    assert len(said) == 1
    tries = [number for number, clips in enumerate(whole) if paths[3] in clips]
    assert len(tries) >= 2
    for stop in range(1, 12):
        listed = tmp_path / f"{stop}.jsonl"
        # The first part runs on for a while after the checkpoint that the second begins with.
        run(0, stop + 2, listed)
        rest, said = run(stop, 16, listed)
        assert rest == whole[stop:], stop
        assert len(said) == (not any(number < stop for number in tries))
