import errno
import os
import random
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from fastjepa.data import decode
from fastjepa.data.decode import VideoError, probe, read_frames
from tests.awkward import BAD, sound


def test_a_file_cut_inside_a_group_of_pictures_starts_at_its_first_decodable_frame(made, tmp_path, film):
    path = film.remux(
        made["open_gop.mp4"], tmp_path / "cut.mp4", lambda number, packet: packet if number >= 5 else None
    )
    info, (truth, count) = probe(path), film.in_order(path)
    assert 0 < info.frames == count < 45
    for number in range(count):
        assert np.array_equal(read_frames(info, [number])[0], truth[number])


@pytest.mark.parametrize("name", ["video.mp4", "video.mkv"])
def test_a_hole_in_a_seekable_file_is_filled_with_the_nearest_earlier_frame(tmp_path, name, film):
    path = film.spoil(film.video(tmp_path / name, 20, codec="mjpeg", pixels="yuvj420p"), [7, 8, 19])
    info = probe(path)
    assert info.frames == 20
    expected = [0, 1, 2, 3, 4, 5, 6, 6, 6, *range(9, 19), 18]
    assert [film.number_of(image) for image in read_frames(info, range(20))] == expected
    assert [film.number_of(read_frames(info, [i])[0]) for i in range(20)] == expected


def test_a_hole_in_a_file_without_times_moves_the_later_frames_up(tmp_path, film):
    path = film.spoil(film.video(tmp_path / "video.avi", 12, codec="mjpeg", pixels="yuvj420p"), [0, 7])
    info = probe(path)
    assert info.frames == 12
    expected = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 11, 11]
    assert [film.number_of(image) for image in read_frames(info, range(12))] == expected
    assert [film.number_of(read_frames(info, [i])[0]) for i in range(12)] == expected


def test_the_frames_lost_at_the_head_of_a_seekable_file_are_left_out(tmp_path, film):
    info = probe(film.spoil(film.video(tmp_path / "video.mkv", 12, codec="mjpeg", pixels="yuvj420p"), [0, 1, 2]))
    assert info.frames == 9
    assert film.number_of(read_frames(info, [0])[0]) == 3


def test_a_hole_at_the_start_is_filled_with_the_next_frame(tmp_path, film):
    path = film.video(tmp_path / "video.mkv", 12, codec="mjpeg", pixels="yuvj420p")
    info = probe(path)
    film.spoil(path, [0, 1, 2])
    assert [film.number_of(image) for image in read_frames(info, [0, 2, 3])] == [3, 3, 3]


def test_a_file_that_got_damaged_after_the_probe_is_an_error(tmp_path, film):
    path = film.video(tmp_path / "video.mkv", 12, codec="mjpeg", pixels="yuvj420p")
    info = probe(path)
    film.spoil(path, range(12))
    with pytest.raises(VideoError, match="none of its frames can be decoded") as caught:
        read_frames(info, [3])
    assert caught.value.path == str(path)
    path.unlink()
    with pytest.raises(VideoError, match="does not exist"):
        read_frames(info, [3])


@pytest.mark.parametrize("kind", ["faststart.mov", "h264.mkv", "vp9.webm", "b_frames.avi", "mpeg4.avi"])
def test_of_a_truncated_file_what_is_left_can_be_read(made, tmp_path, kind, film):
    start, size = film.payloads(made[kind])[30]
    path = tmp_path / kind
    path.write_bytes(made[kind].read_bytes()[: start + size // 2])
    info = probe(path)
    assert info.frames == 30
    numbers = [film.number_of(image) for image in read_frames(info, range(info.frames))]
    assert numbers[:-3] == list(range(info.frames - 3))  # the last ones may have lost what they refer to


def test_a_gap_in_a_transport_stream_costs_no_other_frame(tmp_path, film):
    path = film.video(tmp_path / "gap.ts", 20)
    path.write_bytes(2 * path.read_bytes())  # packets at the seam are marked corrupt, and yet whole
    assert probe(path).frames == film.in_order(path)[1] == 40


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_video_is_refused_with_a_sentence(tmp_path, name, capfd, film):
    make, sentence = BAD[name]
    make(film, tmp_path / name)
    capfd.readouterr()
    with pytest.raises(VideoError) as caught:
        probe(tmp_path / name)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.path == str(tmp_path / name)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "win32" and os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path, film):
    path = film.video(tmp_path / "secret.mp4", 3)
    path.chmod(0)
    with pytest.raises(VideoError, match="there is no permission to read the file"):
        probe(path)


def test_a_refusal_by_the_system_is_told_as_such():
    assert decode._opening_error(av.error.PermissionError(errno.EACCES, "no")) == (
        "there is no permission to read the file"
    )
    assert decode._opening_error(av.error.OSError(errno.EIO, "I/O error")) == "it cannot be opened: I/O error"


def test_an_impossible_path_is_refused():
    with pytest.raises(VideoError, match="not a possible file name"):
        probe("a\0b.mp4")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_no_file_stays_open(made, tmp_path, film):
    (tmp_path / "noise.mp4").write_bytes(random.Random(1).randbytes(65536))
    sound(film, tmp_path / "sound.mp4")
    infos = [probe(path) for path in made.values()]
    before = len(os.listdir("/proc/self/fd"))
    for info in infos:
        read_frames(info, [3, 40])
        probe(info.path)
    for bad in ("noise.mp4", "sound.mp4"):
        with pytest.raises(VideoError):
            probe(tmp_path / bad)
    assert len(os.listdir("/proc/self/fd")) == before
