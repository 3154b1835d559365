import errno
import os
import pickle
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace

from fastjepa.data import decode
from fastjepa.data.decode import VideoError, VideoInfo, probe, read_frames

SEEKABLE = ["b_frames.mp4", "open_gop.mp4", "fragmented.mp4", "faststart.mov", "h264.mkv", "intra.mkv", "vp9.webm"]
SEEKABLE += ["vp8.webm"]


@pytest.fixture
def no_reading_in_order(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the file was read in order")

    monkeypatch.setattr(decode, "_read_in_order", refuse)


def test_every_frame_is_counted_and_found_at_its_place(made, kind, film):
    info = probe(made[kind])
    assert (info.frames, info.width, info.height, info.rotation) == (50, film.WIDTH, film.HEIGHT, 0)
    assert info.rate == Fraction(24)
    assert [film.number_of(image) for image in read_frames(info, range(50))] == list(range(50))
    for number in range(50):
        assert film.number_of(read_frames(info, [number])[0]) == number


def test_frames_in_any_order_and_repeated_equal_the_sequential_decode_bit_by_bit(made, kind, film):
    info, (truth, count) = probe(made[kind]), film.in_order(made[kind])
    assert count == 50
    for seed in range(12):
        wanted = random.Random(seed).choices(range(50), k=5)
        images = read_frames(info, wanted)
        assert images.dtype == np.uint8
        assert images.shape == (5, film.HEIGHT, film.WIDTH, 3)
        for image, number in zip(images, wanted):
            assert np.array_equal(image, truth[number])


@pytest.mark.parametrize("kind", SEEKABLE)
def test_files_with_trustworthy_times_are_read_by_seeking(made, kind, no_reading_in_order, film):
    info = probe(made[kind])
    assert info.pts is not None
    assert info.pts.dtype == np.int64
    assert len(info.pts) == 50
    assert (np.diff(info.pts) > 0).all()
    for wanted in ([49], [0, 49], [13, 26, 39], [23, 24, 25], [11, 36]):
        assert [film.number_of(image) for image in read_frames(info, wanted)] == wanted


@pytest.mark.parametrize("kind", ["b_frames.avi", "mpeg4.avi", "stream.ts", "flash.flv"])
def test_other_containers_are_read_in_order(made, kind):
    assert probe(made[kind]).pts is None


@pytest.mark.parametrize("kind", ["b_frames.mp4", "h264.mkv"])
def test_a_seek_that_misses_falls_back_to_reading_in_order(made, kind, monkeypatch, film):
    info, calls = probe(made[kind]), []

    class Stubborn:
        """A container that always seeks to the end, or not at all."""

        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def seek(self, offset, stream):
            calls.append(offset)
            if len(calls) % 2:
                raise av.error.PermissionError(errno.EPERM, "no")
            self.container.seek(int(info.pts[-1]), stream=stream)

    whole, opened = decode._read_in_order, decode.opened

    @decode.contextmanager
    def stubborn(path, content):
        with opened(path, content) as (container, stream):
            yield Stubborn(container), stream

    monkeypatch.setattr(decode, "opened", stubborn)
    monkeypatch.setattr(decode, "_read_in_order", lambda *a: calls.append("in order") or whole(*a))
    for _ in range(2):
        assert [film.number_of(image) for image in read_frames(info, [14, 40])] == [14, 40]
    assert calls.count("in order") == 2


def test_only_wanted_frames_are_converted_and_decoding_stops_after_the_last(made, monkeypatch):
    converted, decoded = [], []
    convert, frames = decode._Converter.__call__, decode._frames

    def counting(*arguments):
        for frame in frames(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode._Converter, "__call__", lambda self, f: converted.append(f.pts) or convert(self, f))
    monkeypatch.setattr(decode, "_frames", counting)
    info = probe(made["h264.mkv"])
    assert info.keys.tolist() == [0, 12, 24, 36, 48]
    decoded.clear()
    read_frames(info, [26, 26, 28])
    assert len(converted) == 2
    assert len(decoded) == 5  # from key frame 24 to 28
    decoded.clear()
    read_frames(info, [1, 48])
    assert len(decoded) == 3  # 0, 1 and key frame 48: the groups between are passed over
    decoded.clear()
    read_frames(probe(made["b_frames.avi"]), [3, 6])
    assert len(decoded) == 7


def test_decoding_uses_one_thread(made):
    with decode.opened(str(made["b_frames.mp4"])) as (_, stream):
        assert stream.codec_context.thread_count == 1


def test_packets_before_an_edit_list_are_not_frames(made, tmp_path, film):
    def earlier(number, packet):
        shift = round(7 / 24 / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        return packet

    path = film.remux(
        made["b_frames.mp4"], tmp_path / "edit.mp4", earlier, avoid_negative_ts="disabled", use_editlist="1"
    )
    info = probe(path)
    assert info.frames == film.in_order(path)[1] == 43
    for number in range(43):
        assert film.number_of(read_frames(info, [number])[0]) == number + 7


def test_packets_after_an_edit_list_are_not_frames(made, tmp_path, film):
    content = bytearray(made["faststart.mov"].read_bytes())
    duration = content.index(b"elst") + 12
    shorter = int.from_bytes(content[duration : duration + 4], "big") // 2
    content[duration : duration + 4] = shorter.to_bytes(4, "big")
    path = tmp_path / "edit.mov"
    path.write_bytes(content)
    info = probe(path)
    assert 20 < info.frames == film.in_order(path)[1] < 30
    assert [film.number_of(image) for image in read_frames(info, range(info.frames))] == list(range(info.frames))


def test_hidden_vp8_frames_are_not_counted(made, tmp_path, film):
    def hide(number, packet):
        if number not in (5, 30):
            return packet
        content = bytearray(bytes(packet))
        content[0] &= ~0x10
        hidden = av.Packet(bytes(content))
        hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
        return hidden

    path = film.remux(made["vp8.webm"], tmp_path / "hidden.webm", hide)
    info, (truth, count) = probe(path), film.in_order(path)
    assert info.frames == count == 48
    assert info.unshown == 2
    assert probe(made["vp8.webm"]).unshown == 0
    for number in (4, 5, 28, 29, 47):
        assert np.array_equal(read_frames(info, [number])[0], truth[number])


def test_a_video_of_one_frame(tmp_path, film):
    info = probe(film.video(tmp_path / "one.mp4", 1))
    assert info.frames == 1
    assert [film.number_of(image) for image in read_frames(info, [0, 0])] == [0, 0]


def test_numbers_outside_the_video_are_refused(made, film):
    info = probe(made["b_frames.mp4"])
    for wrong in ([50], [-1], [3, 1000]):
        with pytest.raises(ValueError, match="does not exist: the video has frames 0 to 49"):
            read_frames(info, wrong)
    with pytest.raises(ValueError, match="no frame was asked for"):
        read_frames(info, [])
    with pytest.raises(TypeError):
        read_frames(info, [1.5])
    assert film.number_of(read_frames(info, np.array([7]))[0]) == 7


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_metadata_is_honoured(made, tmp_path, degrees, film):
    """Written turned one way, with a note to turn it back: what is shown is upright."""
    turned = [np.ascontiguousarray(np.rot90(film.picture(i), -degrees // 90)) for i in range(6)]
    info = probe(film.write(tmp_path / "turned.mp4", turned, rotation=degrees))
    assert (info.width, info.height, info.rotation) == (film.WIDTH, film.HEIGHT, -degrees % 360)
    images = read_frames(info, range(6))
    assert images.shape == (6, film.HEIGHT, film.WIDTH, 3)
    assert [film.number_of(image) for image in images] == list(range(6))
    assert np.abs(images[3].astype(int) - film.picture(3)).mean() < 6


def flat(y, u, v, pixels):
    frame = av.VideoFrame(64, 64, pixels)
    for plane, value in zip(frame.planes, (y, u, v)):
        plane.update(bytes([value]) * plane.buffer_size)
    return frame


@pytest.mark.parametrize(
    ("settings", "full"),
    [
        ({}, False),
        ({"x264_params": "colormatrix=bt709:colorprim=bt709:transfer=bt709"}, False),
        ({"codec": "libvpx-vp9", "color_range": "pc"}, True),
        ({"codec": "mjpeg", "pixels": "yuvj420p"}, True),
    ],
)
def test_colour_is_bt601_in_the_range_of_the_file(tmp_path, settings, full, film):
    y, u, v = 120, 90, 170
    frames = [flat(y, u, v, settings.get("pixels", "yuv420p")) for _ in range(3)]
    path = film.write(tmp_path / "flat.mkv", frames, size=(64, 64), **settings)
    with av.open(str(path)) as container:
        tags = next(container.decode(video=0))
    assert (tags.color_range == ColorRange.JPEG or tags.format.name == "yuvj420p") is full
    assert ("bt709" in settings.get("x264_params", "")) is (tags.colorspace == Colorspace.ITU709)
    luma, chroma = (y, 1.0) if full else ((y - 16) * 255 / 219, 255 / 224)
    expected = [
        luma + 1.402 * chroma * (v - 128),
        luma - 0.714136 * chroma * (v - 128) - 0.344136 * chroma * (u - 128),
        luma + 1.772 * chroma * (u - 128),
    ]
    image = read_frames(probe(path), [1])[0]
    assert np.abs(image.astype(float) - expected).max() < 3


def test_a_stream_that_changes_its_size_keeps_the_size_of_its_first_frame(tmp_path, film):
    small = film.video(tmp_path / "small.ts", 10)
    large = film.write(tmp_path / "large.ts", [film.picture(i, 96, 192) for i in range(10)])
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    info = probe(both)
    images = read_frames(info, [0, info.frames - 1])
    assert images.shape == (2, film.HEIGHT, film.WIDTH, 3)
    assert film.number_of(images[1]) == 9


def test_the_best_of_several_video_streams_is_taken(tmp_path, film):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        streams = []
        for scale in (1, 2):
            stream = out.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = film.WIDTH * scale, film.HEIGHT * scale, "yuv420p"
            stream.disposition = Disposition.default if scale == 2 else Disposition.dub
            streams.append(stream)
        for number in range(10):
            for scale, stream in zip((1, 2), streams):
                image = film.picture(number, film.HEIGHT * scale, film.WIDTH * scale)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            out.mux(stream.encode(None))
    info = probe(path)
    assert (info.width, info.height, info.frames) == (2 * film.WIDTH, 2 * film.HEIGHT, 10)
    assert film.number_of(read_frames(info, [6])[0]) == 6


@pytest.mark.parametrize("name", ["concat:a.mp4", "data:,a.mp4", "a b %03d.mp4", "videó.mp4", os.fsdecode(b"\xff.mp4")])
def test_a_strange_name_is_only_a_name(made, tmp_path, monkeypatch, name, film):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(made["b_frames.mp4"].read_bytes())
    info = probe(name)
    assert info.path == name
    assert film.number_of(read_frames(info, [30])[0]) == 30


def test_the_content_counts_and_not_the_ending(made, tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(made["h264.mkv"].read_bytes())
    assert probe(path).frames == 50


def test_errors_and_findings_survive_pickling(made, film):
    error = pickle.loads(pickle.dumps(VideoError("it is a folder, not a file", "/a/b")))
    assert (str(error), error.path) == ("it is a folder, not a file", "/a/b")
    assert str(VideoError("the text alone")) == "the text alone"  # how torch rebuilds an error of a worker
    info = probe(made["b_frames.mp4"])
    again = pickle.loads(pickle.dumps(info))
    assert again == info
    assert np.array_equal(again.pts, info.pts)
    assert np.array_equal(again.keys, info.keys)
    assert film.number_of(read_frames(again, [33])[0]) == 33
    assert isinstance(again, VideoInfo)


def test_a_finding_without_times_is_enough_to_read(made, film):
    info = replace(probe(made["open_gop.mp4"]), pts=None, keys=None)
    assert [film.number_of(image) for image in read_frames(info, [49, 3, 24])] == [49, 3, 24]
