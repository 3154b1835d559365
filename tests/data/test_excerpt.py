"""Pieces of videos: what they hold is what the video holds at those places, whatever the file is like."""

import io
import resource
import tarfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from fastjepa.data import excerpt as module
from fastjepa.data import media
from fastjepa.data.decode import VideoError, packets_of, probe, read_frames
from fastjepa.data.decoders import dali
from fastjepa.data.decoders.dali import DaliDecoder, EncodedClip
from fastjepa.data.excerpt import excerpt
from fastjepa.data.index import DALI_GPU, decoders
from fastjepa.data.sampling import Box, ClipDraw
from fastjepa.data.transforms import transform
from tests.data.conftest import KINDS
from tests.data.test_decode import SEEKABLE
from tests.data.test_decode_clips import CLIPS, GOOD, needs_clips

CROP, COLOURS = 48, 3.0  # grey levels in the mean, for another upsampling of chroma
MORE_KINDS = {
    "hevc.mp4": {"codec": "libx265", "x265-params": "log-level=none:open-gop=1"},
    "closed.mkv": {"codec": "libx265", "x265-params": "log-level=none:open-gop=0:radl=2"},
    "av1.mkv": {"codec": "libsvtav1", "preset": "12", "svtav1-params": "enable-overlays=1"},
    "alternate.webm": {"codec": "libvpx-vp9", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu_used": "8"},
    "plain.mp4": {"codec": "mpeg4", "bf": "2"},
    "turned.mp4": {"bf": "2", "rotation": 90},
}


@pytest.fixture(scope="module")
def more(made, tmp_path_factory, film):
    """Files with what the other kinds do not have."""
    folder = tmp_path_factory.mktemp("more")
    videos = {name: film.video(folder / name, **settings) for name, settings in MORE_KINDS.items()}

    def moved(places):
        """Changes the times of packets, which count 24ths of a second: from a frame to its time."""

        def change(number, packet):
            unit = Fraction(1, 24) / packet.time_base
            packet.pts = round(places(packet.pts / unit) * unit)
            packet.dts = round(places(packet.dts / unit) * unit)
            return packet

        return change

    source = made["b_frames.mp4"]
    edited = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    videos["edit.mp4"] = film.remux(source, folder / "edit.mp4", moved(lambda frame: frame - 7), **edited)
    videos["uneven.mp4"] = film.remux(source, folder / "uneven.mp4", moved(lambda frame: frame + (frame % 3) / 4))
    # 12,288 frames/s: nine of them within a millisecond
    videos["fast.mp4"] = film.remux(source, folder / "fast.mp4", moved(lambda frame: frame / 512))
    videos["cut.mp4"] = film.remux(
        made["open_gop.mp4"], folder / "cut.mp4", lambda number, packet: packet if number >= 5 else None
    )
    return videos


def draws(info, seed=0, count=8):
    """Frame numbers as a plan draws them, some from the ends, and some in no order."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        first = rng.integers(0, max(1, info.frames - 8))
        yield np.minimum(first + rng.integers(1, 3) * np.arange(4), info.frames - 1)
    yield np.array([0, 0, 1 % info.frames, info.frames - 1])
    yield np.array([info.frames - 1, info.frames // 2, info.frames - 1])


def opened(piece):
    content = io.BytesIO(piece.tobytes())
    return probe("piece", content), content


def is_right(info, frames, found):
    """Are the frames in the piece those in the file, told apart by their times and by their turn?"""
    wanted, (piece, content) = media.read_frames(info, frames), opened(found[0])
    by_turn = replace(piece, pts=None, keys=None)
    return all(np.array_equal(read_frames(one, found[1], content), wanted) for one in (piece, by_turn))


@pytest.mark.parametrize("name", [*SEEKABLE, *MORE_KINDS, "edit.mp4", "uneven.mp4", "fast.mp4"])
def test_the_frames_of_a_piece_are_those_of_the_video_bit_by_bit(made, more, name):
    info = probe((made | more)[name])
    assert info.pts is not None
    for frames in draws(info):
        found = excerpt(info, frames)
        assert found is not None
        assert opened(found[0])[0].pts is not None  # all frames have times of their own
        assert (found[0].dtype, found[1].dtype, found[1].shape) == (np.uint8, np.int64, frames.shape)
        assert is_right(info, frames, found), frames


def test_of_a_file_that_begins_amidst_a_group_there_are_pieces_from_its_first_key_frame_on(more):
    info = probe(more["cut.mp4"])
    for frames in draws(info):
        assert is_right(info, frames, excerpt(info, frames))


@pytest.mark.parametrize("name", ["h264.mkv", "open_gop.mp4", "vp9.webm", "intra.mkv"])
def test_a_piece_has_no_more_than_the_groups_of_its_frames(made, name):
    info = probe(made[name])
    for first in (0, 13, 30, 46):
        frames = np.arange(first, first + 4)
        piece, numbers = excerpt(info, frames)
        key = info.keys[np.searchsorted(info.keys, first, side="right") - 1]
        reordered = 4 if info.codec == "h264" else 0  # decoded before the last frame, and shown after it
        assert first + 3 - key < opened(piece)[0].frames <= first + 4 - key + reordered
        assert numbers.tolist() == (frames - key).tolist()
        assert len(piece) < Path(info.path).stat().st_size


@pytest.mark.parametrize("name", ["h264.mkv", "open_gop.mp4", "vp9.webm"])
def test_packets_before_the_group_and_after_the_last_frame_are_not_even_read(made, name, monkeypatch):
    info, seen = probe(made[name]), []
    monkeypatch.setattr(module, "packets_of", lambda *a: (seen.append(packet) or packet for packet in packets_of(*a)))
    excerpt(info, np.arange(26, 30))
    assert len(seen) < 14
    seen.clear()
    assert excerpt(replace(info, keys=np.array([0, 20])), np.arange(21, 24)) is None  # there is no such key frame
    assert len(seen) < 20


def test_hidden_vp8_frames_come_along_and_are_not_counted(made, tmp_path, film):
    def hide(number, packet):
        if number not in (5, 14, 30):
            return packet
        hidden = av.Packet(bytes([bytes(packet)[0] & ~0x10]) + bytes(packet)[1:])
        hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
        return hidden

    info = probe(film.remux(made["vp8.webm"], tmp_path / "hidden.webm", hide))
    assert (info.frames, info.unshown) == (47, 3)
    for frames in draws(info):
        assert is_right(info, frames, excerpt(info, frames))


def test_members_of_shards_give_pieces(made, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for name in ("b_frames.mp4", "h264.mkv", "b_frames.avi"):
            shard.add(made[name], name)
    for name in ("b_frames.mp4", "h264.mkv", "b_frames.avi"):
        info = media.probe(f"{tmp_path / 'shard.tar'}::{name}")
        for frames in draws(info, count=2):
            assert is_right(info, frames, excerpt(info, frames))


@pytest.mark.parametrize("name", ["b_frames.avi", "mpeg4.avi", "stream.ts"])
def test_a_video_without_times_is_handed_over_whole(made, name):
    piece, numbers = excerpt(probe(made[name]), np.array([3, 49, 3]))
    assert piece.tobytes() == made[name].read_bytes()
    assert numbers.tolist() == [3, 49, 3]


def test_key_frames_that_only_begin_to_build_up_a_picture_start_no_piece(tmp_path, film):
    """Intra refresh: the pictures after such a key frame are whole only a dozen frames later."""
    params = "intra-refresh=1:keyint=12:scenecut=0:bframes=0"
    for name in ("refresh.mp4", "refresh.mkv"):
        info = probe(film.video(tmp_path / name, x264_params=params))
        assert len(info.keys) > 2
        for frames in (np.arange(3, 9), np.arange(30, 34), np.arange(46, 50)):
            found = excerpt(info, frames)
            assert (found is None) == (frames[0] > 12)
            assert found is None or is_right(info, frames, found)


def test_where_an_edit_list_leaves_out_frames_amidst_others_there_is_a_right_piece_or_none(tmp_path, film):
    path = film.video(tmp_path / "two.mp4", sc_threshold="0", bf="0")
    content = path.read_bytes()
    place = content.index(b"elst")
    movie, medium = 1000, 12288  # steps of a second, of the movie and of its stream: the defaults of the muxer
    second = b"".join(
        n.to_bytes(4, "big") for n in (20 * movie // 24, 0, 65536, 20 * movie // 24, 30 * medium // 24, 65536)
    )
    content = bytearray(content[: place + 8] + (2).to_bytes(4, "big") + second + content[place + 24 :])
    for box in (b"elst", b"edts", b"trak", b"moov"):
        start = content.index(box) - 4
        content[start : start + 4] = (int.from_bytes(content[start : start + 4], "big") + 12).to_bytes(4, "big")
    path.write_bytes(content)
    info = probe(path)
    pictures = [film.number_of(image) for image in read_frames(info, range(info.frames))]
    assert {*range(18), *range(32, 48)} <= set(pictures)
    assert not {*range(22, 29)} & set(pictures)
    pieces = 0
    for first in range(info.frames - 4):
        frames = np.arange(first, first + 4)
        if (found := excerpt(info, frames)) is not None:
            assert is_right(info, frames, found), frames
            pieces += 1
    assert pieces > 10


def test_what_is_too_large_is_not_taken_into_memory(made, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 1500)
    for name in ("h264.mkv", "b_frames.avi"):
        assert excerpt(probe(made[name]), np.arange(0, 50, 7)) is None
    assert excerpt(probe(made["h264.mkv"]), np.arange(48, 50)) is not None


def damaged(made, name, film, folder):
    """Files of this kind with some of their packets zeroed."""
    for broken in ([13], [24], [25, 26], [0], [47, 48, 49]):
        path = folder / f"{broken[0]}-{name}"
        path.write_bytes(made[name].read_bytes())
        yield probe(film.spoil(path, broken))


@pytest.mark.parametrize("name", SEEKABLE)
def test_damage_elsewhere_moves_no_frame_of_a_piece(made, tmp_path, name, film):
    right = 0
    for info in damaged(made, name, film, tmp_path):
        for frames in draws(info):
            found = excerpt(info, frames)
            if found is None:
                continue
            with av.open(io.BytesIO(found[0].tobytes())) as piece:
                whole = all(any(bytes(packet)) for packet in piece.demux() if packet.size)
            if whole:
                assert is_right(info, frames, found), frames
                right += 1
    assert right > 10


@pytest.mark.parametrize("name", ["vp8.webm", "vp9.webm", "intra.mkv"])
def test_what_dali_decodes_of_damaged_pieces_is_right(made, tmp_path, name, film, decode):
    decoded, refused = 0, 0
    for info in damaged(made, name, film, tmp_path):
        for frames in draws(info):
            pixels, failed = decode(info, frames)
            decoded, refused = decoded + (not failed), refused + failed
            assert failed or distance(pixels, info, frames) < COLOURS, frames
    assert decoded > 10
    assert refused > 3


def test_a_file_that_is_another_by_now_gives_an_error_or_no_piece(made, tmp_path, film):
    path = tmp_path / "video.mp4"
    path.write_bytes(made["b_frames.mp4"].read_bytes())
    info = probe(path)
    film.video(path, frames=20)
    assert excerpt(info, np.arange(30, 34)) is None
    path.write_bytes(made["h264.mkv"].read_bytes())
    assert excerpt(info, np.arange(30, 34)) is None
    path.write_bytes(bytes(5000))
    with pytest.raises(VideoError, match="it is not a video file"):
        excerpt(info, np.arange(30, 34))
    path.unlink()
    with pytest.raises(VideoError, match="does not exist"):
        excerpt(info, np.arange(30, 34))


def test_numbers_outside_the_video_are_refused(made):
    info = probe(made["h264.mkv"])
    with pytest.raises(ValueError, match="frame 50 does not exist"):
        excerpt(info, np.array([3, 50]))
    with pytest.raises(ValueError, match="no frame was asked for"):
        excerpt(info, np.array([], np.int64))


def test_memory_does_not_grow_over_500_pieces(made):
    infos = [probe(made[name]) for name in ("b_frames.mp4", "h264.mkv", "vp9.webm")]
    for number in range(600):
        if number == 100:
            before = resident()
        excerpt(infos[number % 3], np.arange(30, 46))
    assert resident() - before < 4e6  # 500 pieces are 3 MB, of packets and of files


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@needs_clips
@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.name)
def test_the_frames_of_a_piece_of_a_real_clip_are_those_of_the_clip(path):
    info = probe(path)
    large = info.width * info.height > 500_000
    for frames in [*draws(info, count=1 if large else 4)][: 2 if large else 6]:
        found = excerpt(info, frames)
        if info.codec != "vvc":
            assert is_right(info, frames, found)


@needs_clips
@pytest.mark.parametrize("name", ["flipped_bits_middle.mp4", "truncated_faststart_half.mp4", "wrong_ext_mkv_as.mp4"])
def test_pieces_of_damaged_clips_are_read_like_the_clips(name):
    info = probe(CLIPS / "bad" / name)
    for frames in [*draws(info), *(np.array([0, key]) for key in info.keys)]:
        piece, numbers = excerpt(info, frames)
        one, content = opened(piece)
        assert np.array_equal(read_frames(one, numbers, content), read_frames(info, frames))


@pytest.mark.parametrize("name", ["vp8.webm", "vp9.webm", "alternate.webm", "intra.mkv"])
def test_dali_finds_the_frames_in_a_piece(made, more, name, decode):
    info = probe((made | more)[name])
    for frames in draws(info):
        pixels, failed = decode(info, frames)
        assert not failed
        assert distance(pixels, info, frames) < COLOURS


def test_dali_finds_the_frames_in_pieces_of_real_clips(shared, decode):
    for path in sorted((shared / "clips" / "dali_cpu").iterdir()):
        info = probe(path)
        for frames in draws(info, count=4):
            pixels, failed = decode(info, frames)
            assert not failed
            near = [distance(pixels, info, np.clip(frames + n, 0, info.frames - 1)) for n in (-1, 0, 1)]
            assert near[1] < COLOURS, path.name
            # Where the picture stands still, its neighbours are just as near.
            assert near[1] <= min(near) + 0.02, path.name


@pytest.mark.gpu
def test_a_gpu_finds_the_frames_in_a_piece(tmp_path, film):
    gpu = torch.device("cuda")
    if reason := dali.why_not(gpu):
        pytest.fail(f"the GPU is there, but {reason}")
    images = [film.picture(number, 192, 256) for number in range(50)]  # NVDEC refuses small pictures
    decode = on_dali(gpu)
    for name, settings in (KINDS | MORE_KINDS).items():
        info = probe(film.write(tmp_path / name, images, **settings))
        if DALI_GPU not in decoders(info) or info.codec == "av1":
            continue
        for frames in draws(info):
            pixels, failed = decode(info, frames)
            assert not failed, name
            assert distance(pixels, info, frames) < COLOURS, (name, frames)


def on_dali(device):
    """A function: (info, frames) -> uint8 [3, 4, CROP, CROP] by DALI, and whether that failed."""
    decoder = DaliDecoder(frames=4, crop=CROP, most=1, device=device, threads=2, prefetch=1)

    def decode(info, frames):
        decoder.begin([EncodedClip(info.path, *excerpt(info, four(frames)), *place(info), info.rotation)])
        pixels, failed = decoder.finish()
        return pixels[0].cpu(), bool(failed)

    return decode


@pytest.fixture(scope="module")
def decode():
    cpu = torch.device("cpu")
    if reason := dali.why_not(cpu):
        pytest.skip(reason)
    return on_dali(cpu)


def place(info):
    return Box(0, 0, info.height, info.width), False, info.height, info.width


def four(frames):
    return np.resize(frames, 4)


def distance(pixels, info, frames):
    """Grey levels in the mean, of the worst frame, from the clip by way of PyAV."""
    clip = transform(read_frames(info, four(frames)), ClipDraw(four(frames), *place(info)[:2]), CROP)
    return (pixels.int() - clip.int()).abs().float().mean((0, 2, 3)).max().item()
