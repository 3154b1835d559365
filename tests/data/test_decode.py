import csv
import errno
import os
import pickle
import random
import sys
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

CLIPS = Path(__file__).resolve().parents[3] / "shared" / "clips"
GOOD = sorted(p for folder in (CLIPS, CLIPS / "dali_cpu") for p in folder.glob("*.*") if p.suffix != ".csv")
GOOD = [p for p in GOOD if "audio_only" not in p.name] or [CLIPS / "none"]
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="the shared clips are absent")

HEIGHT, WIDTH, BITS = 48, 96, 8
RENAMED = {"x264_params": "x264-params", "cpu_used": "cpu-used"}


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture whose upper half shows its number, a bar for each bit, which survives any codec. Below, things move."""
    image = np.empty((height, width, 3), np.uint8)
    for bit in range(BITS):
        image[:, bit * width // BITS : (bit + 1) * width // BITS] = 220 if number >> bit & 1 else 30
    x = np.arange(width)
    image[height // 2 :] = (128 + 80 * np.sin((x + 3 * number) / 7)).astype(np.uint8)[None, :, None]
    return image


def number_of(image: np.ndarray) -> int:
    height, width = image.shape[:2]
    bars = image[2 : height // 2 - 2].reshape(-1, BITS, width // BITS, 3).mean((0, 2, 3))
    return sum(1 << bit for bit in range(BITS) if bars[bit] > 125)


def write(path, images, codec="libx264", pixels="yuv420p", gop=12, container=None, rotation=0, size=None, **options):
    """Encode the images; `container` are options of the muxer."""
    height, width = size or images[0].shape[:2]
    with av.open(str(path), "w", container_options=container or {}) as out:
        stream = out.add_stream(codec, rate=24, options={RENAMED.get(k, k): v for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.thread_count, stream.codec_context.gop_size = 1, gop
        if rotation:
            stream.set_display_rotation(rotation)
        for image in images:
            frame = image if isinstance(image, av.VideoFrame) else av.VideoFrame.from_ndarray(image, format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def video(path, frames=50, **settings):
    return write(path, [picture(i) for i in range(frames)], **settings)


def remux(source, target, change, **container):
    """Copy the packets without decoding; `change(number, packet)` alters one and says whether to keep it."""
    with av.open(str(source)) as old, av.open(str(target), "w", container_options=container) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        number = 0
        for packet in old.demux(stream):
            if packet.size:
                if kept := change(number, packet):
                    kept.stream = copy
                    new.mux(kept)
                number += 1
    return target


def in_order(path, wanted=None):
    """What plain sequential decoding delivers, {number: image}, and how many frames: the measure of everything here."""
    images, number = {}, -1
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if wanted is None or number in wanted:
                image = frame.to_ndarray(
                    format="rgb24", src_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.JPEG
                )
                images[number] = np.rot90(image, frame.rotation // 90)
    return images, number + 1


def payloads(path):
    """Place and size of the data of each packet."""
    content = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    return [(content.index(packet), len(packet)) for packet in packets]


def spoil(path, numbers):
    """Overwrite the payload of some packets with zeros, in place."""
    places, content = payloads(path), bytearray(path.read_bytes())
    for start, size in (places[number] for number in numbers):
        content[start : start + size] = bytes(size)
    path.write_bytes(content)
    return path


KINDS = {
    "b_frames.mp4": {"bf": "3"},
    "open_gop.mp4": {"bf": "3", "x264_params": "open-gop=1:keyint=12:scenecut=0:bframes=3:b-adapt=0"},
    "fragmented.mp4": {"bf": "3", "container": {"movflags": "frag_keyframe+empty_moov"}},
    "faststart.mov": {"bf": "2", "container": {"movflags": "faststart"}},
    "h264.mkv": {"bf": "3", "sc_threshold": "0"},
    "intra.mkv": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "vp9.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu_used": "8"},
    "vp8.webm": {"codec": "libvpx", "deadline": "realtime", "cpu_used": "8"},
    "b_frames.avi": {"bf": "3"},
    "mpeg4.avi": {"codec": "mpeg4", "bf": "2"},
    "stream.ts": {"bf": "3"},
    "flash.flv": {"bf": "2"},
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {kind: video(folder / kind, **settings) for kind, settings in KINDS.items()}


@pytest.fixture
def no_reading_in_order(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the file was read in order")

    monkeypatch.setattr(decode, "_read_in_order", refuse)


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_counted_and_found_at_its_place(made, kind):
    info = probe(made[kind])
    assert (info.frames, info.width, info.height, info.rotation) == (50, WIDTH, HEIGHT, 0)
    assert info.rate == Fraction(24)
    assert [number_of(image) for image in read_frames(info, range(50))] == list(range(50))
    for number in range(50):
        assert number_of(read_frames(info, [number])[0]) == number


@pytest.mark.parametrize("kind", KINDS)
def test_frames_in_any_order_and_repeated_equal_the_sequential_decode_bit_by_bit(made, kind):
    info, (truth, count) = probe(made[kind]), in_order(made[kind])
    assert count == 50
    for seed in range(12):
        wanted = random.Random(seed).choices(range(50), k=5)
        images = read_frames(info, wanted)
        assert images.dtype == np.uint8
        assert images.shape == (5, HEIGHT, WIDTH, 3)
        for image, number in zip(images, wanted):
            assert np.array_equal(image, truth[number])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith((".mp4", ".mov", ".mkv", ".webm"))])
def test_files_with_trustworthy_times_are_read_by_seeking(made, kind, no_reading_in_order):
    info = probe(made[kind])
    assert info.pts is not None
    assert info.pts.dtype == np.int64
    assert len(info.pts) == 50
    assert (np.diff(info.pts) > 0).all()
    for wanted in ([49], [0, 49], [13, 26, 39], [23, 24, 25], [11, 36]):
        assert [number_of(image) for image in read_frames(info, wanted)] == wanted


@pytest.mark.parametrize("kind", ["b_frames.avi", "mpeg4.avi", "stream.ts", "flash.flv"])
def test_other_containers_are_read_in_order(made, kind):
    assert probe(made[kind]).pts is None


@pytest.mark.parametrize("kind", ["b_frames.mp4", "h264.mkv"])
def test_a_seek_that_misses_falls_back_to_reading_in_order(made, kind, monkeypatch):
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

    whole, opened = decode._read_in_order, decode._opened

    @decode.contextmanager
    def stubborn(path):
        with opened(path) as (container, stream):
            yield Stubborn(container), stream

    monkeypatch.setattr(decode, "_opened", stubborn)
    monkeypatch.setattr(decode, "_read_in_order", lambda *a: calls.append("in order") or whole(*a))
    for _ in range(2):
        assert [number_of(image) for image in read_frames(info, [14, 40])] == [14, 40]
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
    with decode._opened(str(made["b_frames.mp4"])) as (_, stream):
        assert stream.codec_context.thread_count == 1


def test_packets_before_an_edit_list_are_not_frames(made, tmp_path):
    def earlier(number, packet):
        shift = round(7 / 24 / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        return packet

    path = remux(made["b_frames.mp4"], tmp_path / "edit.mp4", earlier, avoid_negative_ts="disabled", use_editlist="1")
    info = probe(path)
    assert info.frames == in_order(path)[1] == 43
    for number in range(43):
        assert number_of(read_frames(info, [number])[0]) == number + 7


def test_packets_after_an_edit_list_are_not_frames(made, tmp_path):
    content = bytearray(made["faststart.mov"].read_bytes())
    duration = content.index(b"elst") + 12
    shorter = int.from_bytes(content[duration : duration + 4], "big") // 2
    content[duration : duration + 4] = shorter.to_bytes(4, "big")
    path = tmp_path / "edit.mov"
    path.write_bytes(content)
    info = probe(path)
    assert 20 < info.frames == in_order(path)[1] < 30
    assert [number_of(image) for image in read_frames(info, range(info.frames))] == list(range(info.frames))


def test_hidden_vp8_frames_are_not_counted(made, tmp_path):
    def hide(number, packet):
        if number not in (5, 30):
            return packet
        content = bytearray(bytes(packet))
        content[0] &= ~0x10
        hidden = av.Packet(bytes(content))
        hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
        return hidden

    path = remux(made["vp8.webm"], tmp_path / "hidden.webm", hide)
    info, (truth, count) = probe(path), in_order(path)
    assert info.frames == count == 48
    for number in (4, 5, 28, 29, 47):
        assert np.array_equal(read_frames(info, [number])[0], truth[number])


def test_a_file_cut_inside_a_group_of_pictures_starts_at_its_first_decodable_frame(made, tmp_path):
    path = remux(made["open_gop.mp4"], tmp_path / "cut.mp4", lambda number, packet: packet if number >= 5 else None)
    info, (truth, count) = probe(path), in_order(path)
    assert 0 < info.frames == count < 45
    for number in range(count):
        assert np.array_equal(read_frames(info, [number])[0], truth[number])


@pytest.mark.parametrize("name", ["video.mp4", "video.mkv"])
def test_a_hole_in_a_seekable_file_is_filled_with_the_nearest_earlier_frame(tmp_path, name):
    path = spoil(video(tmp_path / name, 20, codec="mjpeg", pixels="yuvj420p"), [7, 8, 19])
    info = probe(path)
    assert info.frames == 20
    expected = [0, 1, 2, 3, 4, 5, 6, 6, 6, *range(9, 19), 18]
    assert [number_of(image) for image in read_frames(info, range(20))] == expected
    assert [number_of(read_frames(info, [i])[0]) for i in range(20)] == expected


def test_a_hole_in_a_file_without_times_moves_the_later_frames_up(tmp_path):
    path = spoil(video(tmp_path / "video.avi", 12, codec="mjpeg", pixels="yuvj420p"), [0, 7])
    info = probe(path)
    assert info.frames == 12
    expected = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 11, 11]
    assert [number_of(image) for image in read_frames(info, range(12))] == expected
    assert [number_of(read_frames(info, [i])[0]) for i in range(12)] == expected


def test_the_frames_lost_at_the_head_of_a_seekable_file_are_left_out(tmp_path):
    info = probe(spoil(video(tmp_path / "video.mkv", 12, codec="mjpeg", pixels="yuvj420p"), [0, 1, 2]))
    assert info.frames == 9
    assert number_of(read_frames(info, [0])[0]) == 3


def test_a_hole_at_the_start_is_filled_with_the_next_frame(tmp_path):
    path = video(tmp_path / "video.mkv", 12, codec="mjpeg", pixels="yuvj420p")
    info = probe(path)
    spoil(path, [0, 1, 2])
    assert [number_of(image) for image in read_frames(info, [0, 2, 3])] == [3, 3, 3]


def test_a_file_that_got_damaged_after_the_probe_is_an_error(tmp_path):
    path = video(tmp_path / "video.mkv", 12, codec="mjpeg", pixels="yuvj420p")
    info = probe(path)
    spoil(path, range(12))
    with pytest.raises(VideoError, match="none of its frames can be decoded") as caught:
        read_frames(info, [3])
    assert caught.value.path == str(path)
    path.unlink()
    with pytest.raises(VideoError, match="does not exist"):
        read_frames(info, [3])


@pytest.mark.parametrize("kind", ["faststart.mov", "h264.mkv", "vp9.webm", "b_frames.avi", "mpeg4.avi"])
def test_of_a_truncated_file_what_is_left_can_be_read(made, tmp_path, kind):
    start, size = payloads(made[kind])[30]
    path = tmp_path / kind
    path.write_bytes(made[kind].read_bytes()[: start + size // 2])
    info = probe(path)
    assert info.frames == 30
    numbers = [number_of(image) for image in read_frames(info, range(info.frames))]
    assert numbers[:-3] == list(range(info.frames - 3))  # the last ones may have lost what they refer to


def test_a_gap_in_a_transport_stream_costs_no_other_frame(tmp_path):
    path = video(tmp_path / "gap.ts", 20)
    path.write_bytes(2 * path.read_bytes())  # packets at the seam are marked corrupt, and yet whole
    assert probe(path).frames == in_order(path)[1] == 40


def test_a_video_of_one_frame(tmp_path):
    info = probe(video(tmp_path / "one.mp4", 1))
    assert info.frames == 1
    assert [number_of(image) for image in read_frames(info, [0, 0])] == [0, 0]


def test_numbers_outside_the_video_are_refused(made):
    info = probe(made["b_frames.mp4"])
    for wrong in ([50], [-1], [3, 1000]):
        with pytest.raises(ValueError, match="does not exist: the video has frames 0 to 49"):
            read_frames(info, wrong)
    with pytest.raises(ValueError, match="no frame was asked for"):
        read_frames(info, [])
    with pytest.raises(TypeError):
        read_frames(info, [1.5])
    assert number_of(read_frames(info, np.array([7]))[0]) == 7


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_metadata_is_honoured(made, tmp_path, degrees):
    """Written turned one way, with a note to turn it back: what is shown is upright."""
    turned = [np.ascontiguousarray(np.rot90(picture(i), -degrees // 90)) for i in range(6)]
    info = probe(write(tmp_path / "turned.mp4", turned, rotation=degrees))
    assert (info.width, info.height, info.rotation) == (WIDTH, HEIGHT, -degrees % 360)
    images = read_frames(info, range(6))
    assert images.shape == (6, HEIGHT, WIDTH, 3)
    assert [number_of(image) for image in images] == list(range(6))
    assert np.abs(images[3].astype(int) - picture(3)).mean() < 6


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
def test_colour_is_bt601_in_the_range_of_the_file(tmp_path, settings, full):
    y, u, v = 120, 90, 170
    frames = [flat(y, u, v, settings.get("pixels", "yuv420p")) for _ in range(3)]
    path = write(tmp_path / "flat.mkv", frames, size=(64, 64), **settings)
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


def test_a_stream_that_changes_its_size_keeps_the_size_of_its_first_frame(tmp_path):
    small = video(tmp_path / "small.ts", 10)
    large = write(tmp_path / "large.ts", [picture(i, 96, 192) for i in range(10)])
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    info = probe(both)
    images = read_frames(info, [0, info.frames - 1])
    assert images.shape == (2, HEIGHT, WIDTH, 3)
    assert number_of(images[1]) == 9


def test_the_best_of_several_video_streams_is_taken(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        streams = []
        for scale in (1, 2):
            stream = out.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = WIDTH * scale, HEIGHT * scale, "yuv420p"
            stream.disposition = Disposition.default if scale == 2 else Disposition.dub
            streams.append(stream)
        for number in range(10):
            for scale, stream in zip((1, 2), streams):
                image = picture(number, HEIGHT * scale, WIDTH * scale)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            out.mux(stream.encode(None))
    info = probe(path)
    assert (info.width, info.height, info.frames) == (2 * WIDTH, 2 * HEIGHT, 10)
    assert number_of(read_frames(info, [6])[0]) == 6


def sound(path, cover=False):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        if cover:
            art = out.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            art.disposition = Disposition.attached_pic
            out.mux(art.encode(av.VideoFrame.from_ndarray(picture(1), format="rgb24")))
            out.mux(art.encode(None))
        for k in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44100, 1024 * k
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def without_decoder(path):
    video(path)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))


def without_data(path):
    """All chunk offsets point past the end of the file."""
    video(path)
    content = bytearray(path.read_bytes())
    table = content.index(b"stco") + 8
    for k in range(int.from_bytes(content[table : table + 4], "big")):
        content[table + 4 + 4 * k : table + 8 + 4 * k] = (10**8).to_bytes(4, "big")
    path.write_bytes(content)


def with_text(text):
    """A text file next to a video that it may point to."""

    def make(path):
        video(path.parent / "real.mp4", 4)
        path.write_text(text)

    return make


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nreal.mp4\n#EXT-X-ENDLIST\n"
PROTOCOL_PLAYLIST = PLAYLIST.replace("real.mp4", "http://127.0.0.1:9/real.mp4")
CONCATENATION = "ffconcat version 1.0\nfile real.mp4\n"
NOT_VIDEO, NO_CONTAINER = "it is not a video file, or its header is damaged", "it is not in a video container"
BAD = {
    "missing.mp4": (lambda path: None, "the file does not exist"),
    "under_a_file.mp4": (lambda path: None, "the file does not exist"),
    "empty.mp4": (lambda path: path.touch(), "the file is empty"),
    "noise.mp4": (lambda path: path.write_bytes(random.Random(1).randbytes(65536)), NOT_VIDEO),
    "zeros.mp4": (lambda path: path.write_bytes(bytes(65536)), NOT_VIDEO),
    "text.mp4": (lambda path: path.write_text("hello " * 500), NOT_VIDEO),
    "page.mp4": (lambda path: path.write_text("<!DOCTYPE html><html><body>404</body></html>"), NOT_VIDEO),
    "half.mp4": (lambda path: path.write_bytes(video(path).read_bytes()[:2000]), NOT_VIDEO),
    "playlist.mp4": (with_text(PLAYLIST), NOT_VIDEO),
    "playlist.m3u8": (with_text(PLAYLIST), NO_CONTAINER),
    "far_playlist.m3u8": (with_text(PROTOCOL_PLAYLIST), NO_CONTAINER),
    "concatenation.mp4": (with_text(CONCATENATION), NO_CONTAINER),
    "image.mp4": (lambda path: os.replace(write(path.with_suffix(".png"), [picture(1)], "png", "rgb24"), path), ""),
    "raw.h264": (video, NO_CONTAINER),
    "queue.mp4": (os.mkfifo, "it is not a regular file"),
    "folder.mp4": (os.mkdir, "it is a folder, not a file"),
    "dangling.mp4": (lambda path: path.symlink_to("nowhere.mp4"), "it is a link to a file that does not exist"),
    "circle.mp4": (lambda path: path.symlink_to(path), "the file cannot be reached: Too many levels of symbolic links"),
    "sound.mp4": (sound, "it has no video stream"),
    "sound_with_cover.mp4": (lambda path: sound(path, cover=True), "it has no video stream"),
    "codec.mp4": (without_decoder, "there is no decoder for its video codec"),
    "offsets.mp4": (without_data, "it has a video stream without any whole frame"),
    "spoilt.mp4": (lambda path: spoil(video(path), range(50)), "none of its frames can be decoded"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_video_is_refused_with_a_sentence(tmp_path, name, capfd):
    make, sentence = BAD[name]
    make(tmp_path / name)
    capfd.readouterr()
    with pytest.raises(VideoError) as caught:
        probe(tmp_path / name)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.path == str(tmp_path / name)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "win32" and os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    path = video(tmp_path / "secret.mp4", 3)
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


@pytest.mark.parametrize("name", ["concat:a.mp4", "data:,a.mp4", "a b %03d.mp4", "videó.mp4", os.fsdecode(b"\xff.mp4")])
def test_a_strange_name_is_only_a_name(made, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(made["b_frames.mp4"].read_bytes())
    info = probe(name)
    assert info.path == name
    assert number_of(read_frames(info, [30])[0]) == 30


def test_the_content_counts_and_not_the_ending(made, tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(made["h264.mkv"].read_bytes())
    assert probe(path).frames == 50


def test_errors_and_findings_survive_pickling(made):
    error = pickle.loads(pickle.dumps(VideoError("it is a folder, not a file", "/a/b")))
    assert (str(error), error.path) == ("it is a folder, not a file", "/a/b")
    assert str(VideoError("the text alone")) == "the text alone"  # how torch rebuilds an error of a worker
    info = probe(made["b_frames.mp4"])
    again = pickle.loads(pickle.dumps(info))
    assert again == info
    assert np.array_equal(again.pts, info.pts)
    assert np.array_equal(again.keys, info.keys)
    assert number_of(read_frames(again, [33])[0]) == 33
    assert isinstance(again, VideoInfo)


def test_a_finding_without_times_is_enough_to_read(made):
    info = replace(probe(made["open_gop.mp4"]), pts=None, keys=None)
    assert [number_of(image) for image in read_frames(info, [49, 3, 24])] == [49, 3, 24]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_no_file_stays_open(made, tmp_path):
    (tmp_path / "noise.mp4").write_bytes(random.Random(1).randbytes(65536))
    sound(tmp_path / "sound.mp4")
    infos = [probe(made[kind]) for kind in KINDS]
    before = len(os.listdir("/proc/self/fd"))
    for info in infos:
        read_frames(info, [3, 40])
        probe(info.path)
    for bad in ("noise.mp4", "sound.mp4"):
        with pytest.raises(VideoError):
            probe(tmp_path / bad)
    assert len(os.listdir("/proc/self/fd")) == before


@needs_clips
@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.name)
def test_random_reads_of_a_real_clip_equal_its_sequential_decode(path, capfd):
    info, rng = probe(path), random.Random(path.name)
    heavy = info.width * info.height > 500_000
    reads = [rng.choices(range(info.frames), k=4) for _ in range(2 if heavy else 5)]
    reads.append([0, info.frames - 1, info.frames // 2, info.frames - 1])
    truth, count = in_order(path, {i for read in reads for i in read})
    assert info.frames == count
    for read in reads:
        images = read_frames(info, read)
        assert images.shape == (4, info.height, info.width, 3)
        for image, number in zip(images, read):
            assert np.array_equal(image, truth[number]), (read, number)
    assert capfd.readouterr() == ("", "")


@needs_clips
def test_counts_of_the_real_clips_agree_with_an_independent_count():
    with open(CLIPS / "manifest.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    for path in GOOD:
        row = rows.get(path.name)
        if row and row["frames"] and row["video_streams"] == "1":
            assert probe(path).frames == int(row["frames"]), path.name
    nasa = probe(CLIPS / "torchcodec_nasa_13013.mp4")
    assert (nasa.frames, nasa.width, nasa.height) == (390, 480, 270)  # the second stream is the better one


@needs_clips
@pytest.mark.parametrize(("degrees", "size"), [(0, (568, 320)), (90, (320, 568)), (270, (320, 568))])
def test_phone_clips_are_turned_upright(degrees, size):
    info = probe(CLIPS / f"decord_rot{degrees}.mov")
    assert (info.rotation, info.width, info.height) == (degrees, *size)
    assert read_frames(info, [1]).shape == (1, info.height, info.width, 3)


@needs_clips
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("audio_only.mp4", "it has no video stream"),
        ("random_bytes.mp4", NOT_VIDEO),
        ("text_renamed.mp4", NOT_VIDEO),
        ("truncated_header.mp4", NOT_VIDEO),
        ("zero_bytes.mp4", "the file is empty"),
    ],
)
def test_bad_clips_are_refused(name, sentence):
    with pytest.raises(VideoError) as caught:
        probe(CLIPS / "bad" / name)
    assert str(caught.value) == sentence


@needs_clips
@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("flipped_bits_middle.mp4", 280),
        ("single_frame.mp4", 1),
        ("truncated_faststart_half.mp4", 139),
        ("wrong_ext_mkv_as.mp4", 125),
    ],
)
def test_damaged_clips_stay_usable(name, frames, capfd):
    info = probe(CLIPS / "bad" / name)
    assert info.frames == frames
    start = max(0, frames // 2 - 32)
    images = read_frames(info, [min(start + 4 * k, frames - 1) for k in range(16)])
    assert images.shape == (16, info.height, info.width, 3)
    assert images.std() > 10
    assert capfd.readouterr() == ("", "")
