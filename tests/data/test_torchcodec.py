"""torchcodec gives the frames that PyAV gives, or PyAV reads in its place."""

import numpy as np
import pytest

from fastjepa.data.decode import probe, read_frames
from fastjepa.data.decoders import torchcodec
from tests.data.test_decode_clips import GOOD, needs_clips

# Files whose colours are tagged BT.709, which torchcodec goes by and all others ignore.
OTHER_COLOURS = ("tfio_small", "torchcodec_av1", "torchcodec_nasa", "10bit", "wrong_ext")
MOST_GREY_LEVELS = 3


@pytest.fixture(autouse=True)
def _loaded():
    if reason := torchcodec.why_not():
        pytest.skip(reason)


@pytest.fixture
def counted(monkeypatch):
    """How often PyAV read in the place of torchcodec."""
    calls = []
    monkeypatch.setattr(torchcodec, "read_frames", lambda info, n: calls.append(info.path) or read_frames(info, n))
    return calls


WITHOUT = {"b_frames.avi", "mpeg4.avi", "stream.ts", "flash.flv"}  # no times to go by


def test_frames_have_their_numbers_in_every_container(made, kind, film, counted):
    info = probe(made[kind])
    numbers = [17, 3, 49, 0, 48, 3, 30]
    frames = torchcodec.read_with_torchcodec(info, np.array(numbers))
    assert frames.dtype == np.uint8
    assert [film.number_of(frame) for frame in frames] == numbers
    counted.clear()
    # Far from the end, where what counts otherwise shows no error.
    frames = torchcodec.read_with_torchcodec(info, np.array([20, 2, 11]))
    assert [film.number_of(frame) for frame in frames] == [20, 2, 11]
    assert bool(counted) == (kind in WITHOUT)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotated_videos_are_turned(film, tmp_path, rotation, counted):
    info = probe(film.video(tmp_path / "a.mp4", frames=8, rotation=rotation))
    frames = torchcodec.read_with_torchcodec(info, [5])
    assert np.abs(frames.astype(int) - read_frames(info, [5])).mean() < 1
    assert counted == []


def test_a_damaged_place_is_read_by_pyav(film, tmp_path, counted):
    path = film.spoil(film.video(tmp_path / "a.mp4", frames=40), range(20, 30))
    info = probe(path)
    numbers = np.arange(16, 36, 2)
    assert np.array_equal(torchcodec.read_with_torchcodec(info, numbers), read_frames(info, numbers))


def test_a_file_of_which_it_counts_other_frames_is_read_by_pyav(film, tmp_path, counted):
    path = film.video(tmp_path / "a.mp4", frames=40)
    info = probe(path)
    film.video(path, frames=30)
    torchcodec.read_with_torchcodec(info, [7])
    assert counted == [str(path)]


def test_without_the_package_or_its_libraries_the_reason_is_a_sentence(monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(error):
        def imported(name, *more):
            if name.startswith("torchcodec"):
                raise error
            return real(name, *more)

        return imported

    for error, sentence in (
        (ModuleNotFoundError("No module named 'torchcodec'", name="torchcodec"), "torchcodec is not installed"),
        (ImportError("libtorch_cuda.so: cannot open"), "torchcodec does not load: libtorch_cuda.so: cannot open"),
        (
            RuntimeError("Could not load it.\nLong."),
            "torchcodec does not load: Could not load it.",
        ),
    ):
        monkeypatch.setattr(builtins, "__import__", refuse(error))
        assert torchcodec.why_not() == sentence


@needs_clips
@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.name)
def test_real_clips_give_the_frames_of_a_sequential_decode(path, film):
    info = probe(path)
    rng = np.random.default_rng(len(path.name))
    numbers = np.unique([0, info.frames - 1, *rng.integers(0, info.frames, 3)])
    around = np.unique(np.clip([n + k for n in numbers for k in (-1, 0, 1)], 0, info.frames - 1))
    truth, _ = film.in_order(path, set(around.tolist()))
    for number, frame in zip(numbers, torchcodec.read_with_torchcodec(info, numbers)):
        apart = {n: np.abs(truth[n].astype(int) - frame).mean() for n in around if abs(n - number) <= 1}
        assert apart[number] == min(apart.values()), "it is another frame"
        assert apart[number] < MOST_GREY_LEVELS or path.name.startswith(OTHER_COLOURS) or "10bit" in path.name
