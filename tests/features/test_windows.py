"""Windows cover a video, and each is cut by the rule that the model was trained with."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from fastjepa.data.decode import VideoError, VideoInfo
from fastjepa.data.frames import segment_frames, timed_frames
from fastjepa.features import Hop, Windows
from fastjepa.probe import Cut


def video(frames, rate=Fraction(25)):
    return VideoInfo("v.mp4", frames, 64, 48, rate, "h264", "yuv420p", 0, None, 1)


@pytest.mark.parametrize("frames", [32, 33, 63, 64, 65, 100, 257])
def test_windows_side_by_side_cover_every_frame_and_end_with_the_video(frames):
    windows = Windows(frames=8, stride=4)
    places = windows.places(video(frames))
    numbers = [windows.numbers(video(frames), place) for place in places]
    assert len(places) == -(-frames // 32)
    assert (numbers[0][0], numbers[-1][-1]) == (0, frames - 1)
    assert all(b[0] <= a[-1] + 1 for a, b in pairwise(numbers))
    assert all(len(one) == 8 and (np.diff(one) > 0).all() for one in numbers)


@pytest.mark.parametrize("place", [0, 1, 67])
def test_a_window_is_cut_by_the_published_rule(place):
    windows = Windows(frames=8, stride=4)
    assert np.array_equal(windows.numbers(video(101), place), segment_frames(101, 8, 4, place + 32))


@pytest.mark.parametrize("frames", [1, 2, 7, 31, 32])
def test_a_short_video_has_one_window_which_repeats_its_last_frame_as_published(frames):
    windows = Windows(frames=8, stride=4)
    assert windows.places(video(frames)).tolist() == [0]
    assert np.array_equal(windows.numbers(video(frames), 0), segment_frames(frames, 8, 4, None))


@pytest.mark.parametrize(
    ("hop", "places"),
    [(None, [0, 8, 12]), (4, [0, 4, 8, 12]), (5, [0, 5, 10, 12]), ("0.2s", [0, 5, 10, 12]), (100, [0, 12])],
)
def test_a_hop_in_frames_or_seconds(hop, places):
    windows = Windows(frames=4, stride=2, hop=None if hop is None else Hop.of(hop))
    assert windows.places(video(20)).tolist() == places


def test_frames_per_second_go_by_the_times():
    windows = Windows(frames=4, stride=99, fps=5.0, hop=Hop.of("0.4s"))
    # 50 frames at 25 frames/s are 2 s, a clip is 0.8 s.
    places = windows.places(video(50))
    np.testing.assert_allclose(places, [0, 0.4, 0.8, 1.2])
    assert windows.numbers(video(50), places[1]).tolist() == [10, 15, 20, 25]
    in_frames = Windows(frames=4, stride=99, fps=5.0, hop=Hop.of(10))
    np.testing.assert_allclose(in_frames.places(video(50)), places)
    last = Windows(frames=4, stride=99, fps=5.0).places(video(55))
    np.testing.assert_allclose(last, [0, 0.8, 1.4])


def test_the_central_window_is_that_of_the_probes():
    for how in ({"stride": 4}, {"stride": 1, "fps": 5.0}, {"stride": 1, "duration": 1.0}):
        windows, cut = Windows(8, **how, central=True), Cut(8, crop=32, **how)
        for frames in (3, 50, 101):
            (place,) = windows.places(video(frames))
            assert np.array_equal(windows.numbers(video(frames), place), cut.numbers(video(frames)))
    assert np.array_equal(
        Windows(8, 1, fps=5.0, central=True).numbers(video(99), 0),
        timed_frames(np.arange(99) / 25, 8, 5.0, rng=None),
    )


def test_seconds_need_a_frame_rate():
    for windows in (Windows(4, 2, hop=Hop.of("1s")), Windows(4, 2, fps=2.0), Windows(4, 2, duration=1.0)):
        with pytest.raises(VideoError, match="its frame rate is not known"):
            windows.places(video(100, rate=None))
    assert len(Windows(4, 2).places(video(100, rate=None))) == 13


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "s", "0s", "1 min", "", "1e3", "nan"])
def test_another_hop_is_refused(text):
    with pytest.raises(ValueError, match="expected a number of source frames"):
        Hop.of(text)
