"""A video once more: the same frames at the same times, small, upright, in one codec."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from fastjepa.data.decode import VideoError
from fastjepa.data.media import probe, read_frames
from fastjepa.data.reencode import Made, Recipe, reencode, size_of
from tests.data.test_decode_clips import GOOD, needs_clips

FINE = Recipe(quality=12)
MILLISECOND = Fraction(1, 1000)


def compare(source, target):
    """Mean grey levels by which the first, middle and last frame differ, at the new size."""
    before, after = probe(source), probe(target)
    assert after.frames == before.frames
    numbers = np.unique([0, before.frames // 2, before.frames - 1])
    old = [
        np.asarray(Image.fromarray(frame).resize((after.width, after.height), Image.Resampling.BICUBIC))
        for frame in read_frames(before, numbers)
    ]
    return np.abs(np.stack(old).astype(int) - read_frames(after, numbers)).mean((1, 2, 3)).max(), after


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((1920, 1080), 256, (456, 256)),
        ((1080, 1920), 256, (256, 456)),
        ((340, 256), 256, (340, 256)),
        ((341, 255), 256, (340, 254)),
        ((28, 28), 256, (28, 28)),
        ((1, 1), 256, (2, 2)),
        ((4000, 17), 16, (3764, 16)),
    ],
)
def test_pictures_are_made_smaller_to_even_sides_and_never_larger(size, short, expected):
    assert size_of(*size, short) == expected


def test_every_container_gives_the_same_frames_at_the_same_times(made, kind, film, tmp_path):
    target = tmp_path / "new" / "a.mp4"
    result = reencode(str(made[kind]), str(target), Recipe())
    before, after = probe(made[kind]), probe(target)
    assert result == Made(50, target.stat().st_size)
    assert [film.number_of(frame) for frame in read_frames(after, np.arange(50))] == list(range(50))
    assert (after.codec, after.pixel_format, after.rotation, after.pts is None) == ("h264", "yuv420p", 0, False)
    assert np.abs(before.times - after.times).max() < 6e-4, "a clock of milliseconds"
    assert np.diff(after.keys).tolist() == [16] * 3
    assert compare(made[kind], target)[0] < 4
    assert list(tmp_path.glob("new/*")) == [target]


def test_groups_are_closed_and_frames_are_stored_in_their_order(film, tmp_path):
    source = film.video(tmp_path / "a.mp4", frames=60, bf="3")
    reencode(str(source), str(tmp_path / "b.mp4"), Recipe(gop=10))
    with av.open(str(tmp_path / "b.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert not container.streams.audio
    assert all(packet.pts == packet.dts for packet in packets)
    assert [packet.is_keyframe for packet in packets] == [number % 10 == 0 for number in range(60)]
    content = (tmp_path / "b.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "what says where frames are comes first"


def test_sound_is_left_out(film, tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as out:
        video, sound = out.add_stream("libx264", rate=24), out.add_stream("aac", rate=44100)
        video.width, video.height, video.pix_fmt = film.WIDTH, film.HEIGHT, "yuv420p"
        for number in range(20):
            out.mux(video.encode(av.VideoFrame.from_ndarray(film.picture(number), format="rgb24")))
        out.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    reencode(str(path), str(tmp_path / "b.mp4"), Recipe())
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_rotated_video_is_stored_upright(film, tmp_path, rotation):
    source = film.video(tmp_path / "a.mp4", frames=8, rotation=rotation)
    reencode(str(source), str(tmp_path / "b.mp4"), FINE)
    apart, after = compare(source, tmp_path / "b.mp4")
    assert apart < 3
    assert (after.rotation, after.width, after.height) == (0, probe(source).width, probe(source).height)


@pytest.mark.parametrize(
    "kind",
    [
        {"codec": "mjpeg", "pixels": "yuvj420p"},
        {"codec": "libx264", "pixels": "yuv420p10le"},
        {"codec": "libx264", "pixels": "yuv420p", "x264_params": "fullrange=on"},
        {"codec": "libx264", "pixels": "yuv420p10le", "x264_params": "fullrange=on"},
        {"codec": "libx264", "pixels": "yuv444p"},
        {"codec": "libx264rgb", "pixels": "rgb24"},
        {"codec": "libx264", "pixels": "gray"},
    ],
    ids=lambda kind: " ".join(kind.values()),
)
def test_colours_stay_whatever_the_pixels_were(film, tmp_path, kind):
    colours = (200, 40, 40), (40, 200, 60), (250, 250, 250), (3, 3, 3)
    images = [np.full((64, 96, 3), colour, np.uint8) for colour in colours]
    source = film.write(tmp_path / "a.mkv", images, **kind)
    reencode(str(source), str(tmp_path / "b.mp4"), FINE)
    apart, after = compare(source, tmp_path / "b.mp4")
    assert apart < 2.5
    assert after.pixel_format == "yuv420p"


def test_a_variable_frame_rate_stays(film, tmp_path):
    times = np.cumsum([0, 40, 40, 200, 20, 20, 1000, 33, 33, 80])
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = film.WIDTH, film.HEIGHT, "yuv420p"
        stream.codec_context.time_base = MILLISECOND
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(film.picture(number), format="rgb24")
            frame.pts, frame.time_base = int(time), MILLISECOND
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert np.allclose(probe(path).times, times / 1000)
    reencode(str(path), str(tmp_path / "b.mp4"), Recipe())
    assert np.allclose(probe(tmp_path / "b.mp4").times, times / 1000, atol=1e-4)


@pytest.mark.parametrize("name", ["b_frames.mp4", "h264.mkv", "vp9.webm", "stream.ts", "mpeg4.avi"])
def test_a_constant_rate_stays_exactly_what_it_is(made, name, tmp_path):
    reencode(str(made[name]), str(tmp_path / "b.mp4"), Recipe())
    info = probe(tmp_path / "b.mp4")
    assert info.rate == 24
    assert np.allclose(info.times, np.arange(50) / 24, atol=1e-9)


def test_damaged_places_are_filled_as_they_are_read(film, tmp_path):
    source = film.spoil(film.video(tmp_path / "a.mp4", frames=40), range(20, 26))
    reencode(str(source), str(tmp_path / "b.mp4"), Recipe())
    shown = [film.number_of(frame) for frame in read_frames(probe(source), np.arange(40))]
    assert [film.number_of(frame) for frame in read_frames(probe(tmp_path / "b.mp4"), np.arange(40))] == shown


def test_folders_of_frames_become_videos(film, tmp_path):
    (tmp_path / "frames").mkdir()
    for number in range(12):
        Image.fromarray(film.picture(number)).save(tmp_path / "frames" / f"{number:04}.png")
    reencode(str(tmp_path / "frames"), str(tmp_path / "b.mp4"), Recipe())
    info = probe(tmp_path / "b.mp4")
    assert [film.number_of(frame) for frame in read_frames(info, np.arange(12))] == list(range(12))


def test_the_same_source_gives_the_same_bytes(film, tmp_path):
    # x264 itself is not so exact in pictures of under 64 pixels.
    source = film.write(tmp_path / "a.mkv", [film.picture(number, 128, 192) for number in range(30)])
    for name in "bc":
        reencode(str(source), str(tmp_path / f"{name}.mp4"), Recipe())
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()


def test_what_cannot_be_read_leaves_nothing_behind(tmp_path, film, monkeypatch):
    (tmp_path / "text.mp4").write_text("hello " * 99)
    with pytest.raises(VideoError):
        reencode(str(tmp_path / "text.mp4"), str(tmp_path / "new" / "b.mp4"), Recipe())
    source = film.video(tmp_path / "a.mp4", frames=9)
    monkeypatch.setattr("fastjepa.data.reencode._ticks", lambda info, tick: [0, 1, 2])
    with pytest.raises(VideoError, match=r"^the new file has 3 frames of 9$"):
        reencode(str(source), str(tmp_path / "new" / "b.mp4"), Recipe())
    assert not (tmp_path / "new").exists() or list((tmp_path / "new").iterdir()) == []


@needs_clips
@pytest.mark.parametrize("path", [p for p in GOOD if p.exists() and p.stat().st_size < 700_000], ids=lambda p: p.name)
def test_real_clips_keep_their_frames_times_and_pictures(path, tmp_path):
    reencode(str(path), str(tmp_path / "b.mp4"), Recipe(quality=16))
    apart, after = compare(path, tmp_path / "b.mp4")
    assert apart < 5
    before = probe(path)
    assert before.times is None or np.abs(before.times - after.times).max() < 2e-3
    assert min(after.width, after.height) <= 256
