"""Tar shards: what is found in them, how members are read, and what hostile archives do."""

import gzip
import os
import pickle
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from fastjepa.data import tables
from fastjepa.data.decode import VideoError
from fastjepa.data.index import update_index
from fastjepa.data.media import absolute, encoded, probe, read_frames, status
from fastjepa.data.shards import on_path, split_name
from fastjepa.data.source import open_videos
from fastjepa.data.tables import table
from tests.packed import pack


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    tables._table.cache_clear()
    return folder


@pytest.fixture
def forgotten():
    """Forget what this process knows of shards, as a new one does."""
    return tables._table.cache_clear


@pytest.fixture
def no_walk(monkeypatch):
    def go():
        tables._table.cache_clear()
        monkeypatch.setattr(tables, "_walk", None)

    return go


def members(path):
    return list(table(str(path)).members)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("/a/s.tar::clips/a.mp4", ("/a/s.tar", "clips/a.mp4")),
        ("/a/s.TAR::a.mp4", ("/a/s.TAR", "a.mp4")),
        ("/a/s.tar::b.tar::c.mp4", ("/a/s.tar", "b.tar::c.mp4")),
        ("/a/s.tar::../../etc/a.mp4", ("/a/s.tar", "../../etc/a.mp4")),
        ("/a/s.tar", ("/a/s.tar", "")),
        ("/a/b::c.mp4", ("/a/b::c.mp4", "")),
    ],
)
def test_a_member_is_named_behind_its_shard(name, parts):
    assert split_name(name) == parts


def test_only_the_path_of_a_member_is_a_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("x/../s.tar::../a.mp4") == f"{tmp_path}/s.tar::../a.mp4"
    assert absolute("./a.mp4") == f"{tmp_path}/a.mp4"
    assert on_path(os.path.basename, "/v/s.tar::d/a.mp4") == "s.tar::d/a.mp4"


# -- members ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_found_in_the_order_of_the_archive_and_read_at_their_place(tmp_path, clips, film, kind):
    long = "deep/" * 60 + "größe.mp4"  # 300 characters: needs a header of its own
    path = pack(tmp_path / "s.tar", [("z.mp4", clips[2]), (long, clips[0]), ("a/b.mp4", clips[5])], kind)
    assert members(path) == ["z.mp4", long, "a/b.mp4"]
    for member, n in (("z.mp4", 2), (long, 0), ("a/b.mp4", 5)):
        name = f"{path}::{member}"
        info = probe(name)
        assert (info.path, info.frames, info.width, info.height) == (name, 4 + n, film.WIDTH, film.HEIGHT)
        assert [film.number_of(image) for image in read_frames(info, [3, 0])] == [n + 3, n]
        assert encoded(name).tobytes() == clips[n]
        assert status(name) == (len(clips[n]), path.stat().st_mtime_ns)
        again = pickle.loads(pickle.dumps(info))
        assert film.number_of(read_frames(again, [1])[0]) == n + 1


def test_a_member_is_described_and_read_as_the_same_file_is(made, tmp_path, kind, film):
    path = pack(tmp_path / "s.tar", [("pad", b"x" * 777), (kind, made[kind].read_bytes())])
    alone, member = probe(made[kind]), probe(f"{path}::{kind}")
    assert (member.frames, member.rate, member.codec, member.duration) == (
        alone.frames,
        alone.rate,
        alone.codec,
        alone.duration,
    )
    assert (member.pts is None) == (alone.pts is None)
    assert [film.number_of(image) for image in read_frames(member, [44, 3, 25])] == [44, 3, 25]


def test_a_damaged_frame_of_a_member_is_replaced_as_in_a_file(tmp_path, film):
    file = film.spoil(film.video(tmp_path / "a.mkv", 12, codec="mjpeg", pixels="yuvj420p"), [5, 6])
    path = pack(tmp_path / "s.tar", [("a.mkv", file.read_bytes())])
    shown = [film.number_of(image) for image in read_frames(probe(f"{path}::a.mkv"), [5, 6, 7])]
    assert shown == [4, 4, 7]  # by time it is not found, so the member is opened again and read in order


def test_reading_a_few_frames_does_not_read_the_whole_member(tmp_path, film, monkeypatch):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (320, 480, 3), np.uint8) for _ in range(60)]
    film.write(tmp_path / "a.mkv", noise, codec="mjpeg", pixels="yuvj420p", gop=1)
    content = (tmp_path / "a.mkv").read_bytes()
    path = pack(tmp_path / "s.tar", [("a.mkv", content)])
    info = probe(f"{path}::a.mkv")
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *a: read.append(len(found := pread(*a))) or found)
    read_frames(info, [50])
    assert 0 < sum(read) < len(content) / 2


def test_an_image_in_a_shard_is_a_still(tmp_path, png, film):
    path = pack(tmp_path / "s.tar", [("a.png", png)])
    info = probe(f"{path}::a.png")
    assert (info.still, info.frames) == (True, 1)
    assert [film.number_of(image) for image in read_frames(info, [0, 0])] == [99, 99]
    with pytest.raises(VideoError, match="it is an image, not an encoded video"):
        encoded(f"{path}::a.png")


def test_of_members_with_one_name_the_last_wins(tmp_path, clips):
    path = pack(tmp_path / "s.tar", [("a.mp4", clips[0]), ("b.mp4", clips[1]), ("a.mp4", clips[7])])
    assert members(path) == ["b.mp4", "a.mp4"]
    assert probe(f"{path}::a.mp4").frames == 4 + 7


def test_links_folders_devices_and_sparse_files_are_passed_over(tmp_path, clips):
    odd = []
    for number, kind in enumerate(
        (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    ):
        info = tarfile.TarInfo(f"odd{number}.mp4")
        info.type, info.linkname = kind, "/etc/passwd"
        odd.append(info)
    path = pack(tmp_path / "s.tar", [*odd, ("a.mp4", clips[0])])
    assert members(path) == ["a.mp4"]
    with (tmp_path / "hole.mp4").open("wb") as file:
        file.truncate(10**7)
        file.write(b"x")
    if os.system(f"cd {tmp_path} && tar --sparse -cf sparse.tar hole.mp4 s.tar") == 0:
        assert members(tmp_path / "sparse.tar") == ["s.tar"]


def test_names_that_leave_the_archive_are_names_like_any_other(tmp_path, clips):
    names = [
        "../a.mp4",
        "a.mp4",
        "/a.mp4",
        "../../../../../../tmp/a.mp4",
        "./a.mp4",
        os.fsdecode(b"\xff.mp4"),
        "x\ny.mp4",
    ]
    path = pack(tmp_path / "deep/er/s.tar", [(name, clips[n]) for n, name in enumerate(names)])
    before = sorted(tmp_path.rglob("*"))
    index = update_index(str(path), tmp_path / "index.jsonl", say=print)
    assert [split_name(entry.path) for entry in index.entries] == [(str(path), name) for name in names]
    assert [entry.frames for entry in index.entries] == [4 + n for n in range(7)]
    assert sorted(set(tmp_path.rglob("*")) - set(before)) == [tmp_path / "index.jsonl"]  # nothing was extracted
    assert update_index(str(path), tmp_path / "index.jsonl", say=print).opened == 0


PLAYLIST = b"ffconcat version 1.0\nfile /etc/hostname\n"
BAD = {
    "text.mp4": (b"no video\n" * 100, "it is not a video file, or its header is damaged"),
    "list.mp4": (PLAYLIST, "it is not in a video container (a playlist, an image or a raw stream)"),
    "empty.mp4": (b"", "the file is empty"),
    "text.png": (b"no image", "it is not an image (JPEG, PNG, WebP, BMP, TIFF), or it is damaged"),
}


@pytest.mark.parametrize("member", BAD)
def test_a_bad_member_is_refused_with_a_sentence_and_the_others_are_read(tmp_path, clips, member):
    content, sentence = BAD[member]
    path = pack(tmp_path / "s.tar", [(member, content), ("b.mp4", clips[0])])
    with pytest.raises(VideoError) as caught:
        probe(f"{path}::{member}")
    assert (str(caught.value), caught.value.path) == (sentence, f"{path}::{member}")
    assert probe(f"{path}::b.mp4").frames == 4


def test_what_is_not_there_is_said(tmp_path, clips):
    path = pack(tmp_path / "s.tar", [("a.mp4", clips[0])])
    for name, sentence in (
        (f"{path}::b.mp4", "its shard has no such member"),
        (f"{tmp_path}/t.tar::a.mp4", "the file does not exist (its shard)"),
        (str(path), "it is an archive, not a video"),
    ):
        for look in (probe, encoded):
            with pytest.raises(VideoError) as caught:
                look(name)
            assert (str(caught.value), caught.value.path) == (sentence, name)


def test_a_disk_that_fails_while_a_member_is_read_is_a_sentence(tmp_path, clips, monkeypatch):
    path = pack(tmp_path / "s.tar", [("a.mp4", clips[0])])
    info = probe(f"{path}::a.mp4")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    for reading in (lambda: probe(info.path), lambda: read_frames(info, [0]), lambda: encoded(info.path)):
        with pytest.raises(VideoError, match=r"^the file cannot be reached: Input/output error \(its shard\)$"):
            reading()


def test_a_shard_that_changed_is_read_anew(tmp_path, clips):
    path = pack(tmp_path / "s.tar", [("a.mp4", clips[0]), ("b.mp4", clips[1])])
    assert probe(f"{path}::b.mp4").frames == 5
    pack(path, [("b.mp4", clips[3])])
    assert members(path) == ["b.mp4"]
    assert probe(f"{path}::b.mp4").frames == 7


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_no_shard_stays_open(tmp_path, clips):
    path = pack(tmp_path / "s.tar", [("a.mp4", clips[0]), ("bad.mp4", b"text")])
    info = probe(f"{path}::a.mp4")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read_frames(info, [1])
        with pytest.raises(VideoError):
            probe(f"{path}::bad.mp4")
    assert len(os.listdir("/proc/self/fd")) == before


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_is_kept_for_the_next_start(tmp_path, clips, no_walk):
    odd = os.fsdecode(b"\xff.mp4")
    path = pack(tmp_path / "s.tar", [("a.mp4", clips[0]), ("a.cls", b"3"), (odd, clips[1])])
    before = table(str(path))
    no_walk()
    after = table(str(path))
    assert after == before
    assert list(after.members) == ["a.mp4", "a.cls", odd]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"no json", b'{"of": [1], "members": 3}'])
def test_a_damaged_table_in_the_cache_is_made_anew(tmp_path, clips, cache, content, forgotten):
    path = pack(tmp_path / "s.tar", [("a.mp4", clips[0])])
    before = table(str(path))
    (file,) = cache.rglob("*.json")
    whole = file.read_bytes()
    file.write_bytes(content)
    forgotten()
    assert table(str(path)) == before
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_said_and_costs_nothing_else(tmp_path, clips, cache):
    path = pack(tmp_path / "s.tar", [("a.mp4", clips[0])])
    (cache / "fastjepa").write_text("in the way")
    videos = open_videos(str(path), 0)
    assert videos.paths == [f"{path}::a.mp4"]
    assert "; what shards hold cannot be kept for the next start (" in videos.description


def test_twenty_thousand_members_open_in_seconds(tmp_path, no_walk):
    path = pack(tmp_path / "s.tar", [(f"clips/{n:06}.mp4", b"x" * 10) for n in range(20_000)])
    start = time.process_time()
    videos = open_videos(str(path), 0)
    assert time.process_time() - start < 5
    assert (len(videos.paths), videos.paths[-1]) == (20_000, f"{path}::clips/019999.mp4")
    no_walk()
    start = time.process_time()
    assert open_videos(str(path), 0).fingerprint == videos.fingerprint
    assert time.process_time() - start < 1


# -- damage -----------------------------------------------------------------------------------------------------------


def test_of_an_archive_that_breaks_off_the_whole_members_are_kept_and_the_break_is_counted(tmp_path, clips):
    path = pack(tmp_path / "s.tar", [("a.mp4", clips[0]), ("b.mp4", clips[1]), ("c.mp4", clips[2])])
    place, size = table(str(path)).members["c.mp4"]
    whole = path.read_bytes()
    reason = "the archive is damaged or breaks off: 2 whole files come before"
    for end in (place + size - 1, place, place - 100):
        path.write_bytes(whole[:end])
        os.utime(path, ns=(0, end))
        videos = open_videos(str(path), 0)
        assert videos.paths == [f"{path}::a.mp4", f"{path}::b.mp4", str(path)]
        assert videos.shards.tolist() == [0, 0, 0]
        assert videos.description == f"2 videos in 1 shard in {path}; damaged: 1 shard, {path}: {reason}"
        with pytest.raises(VideoError) as caught:
            probe(str(path))
        assert str(caught.value) == reason
    index = update_index(str(path), tmp_path / "index.jsonl", say=print)
    assert [entry.reason for entry in index.entries] == [None, None, reason]


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path, clips):
    path = pack(
        tmp_path / "s.tar", [("a.mp4", clips[0]), ("b.mp4", clips[1]), ("c.mp4", clips[2])], tarfile.USTAR_FORMAT
    )
    place, _ = table(str(path)).members["b.mp4"]
    content = bytearray(path.read_bytes())
    content[place - 512 + 3] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(0, 1))
    assert members(path) == ["a.mp4"]
    assert table(str(path)).reason == "the archive is damaged or breaks off: 1 whole files come before"


def test_an_archive_without_its_end_mark_is_whole(tmp_path, clips):
    path = pack(tmp_path / "s.tar", [("a.mp4", clips[0])])
    place, size = table(str(path)).members["a.mp4"]
    path.write_bytes(path.read_bytes()[: place + -(-size // 512) * 512])
    assert (members(path), table(str(path)).reason) == (["a.mp4"], None)


def header(name, size_field):
    """A tar header with any bytes as its size, and the right checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size_field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "size", [b"\xff" * 12, (-512).to_bytes(12, "big", signed=True), b"\x80" + b"\xff" * 11, b"777777777777"]
)
def test_impossible_sizes_end_the_walk(tmp_path, size):
    path = tmp_path / "s.tar"
    path.write_bytes(header("a.mp4", b"%011o\0" % 3) + b"abc".ljust(512, b"\0") + header("b.mp4", size) + bytes(1024))
    assert members(path) == ["a.mp4"]
    assert table(str(path)).reason is not None


def test_what_is_no_tar_is_refused_with_a_sentence(tmp_path, clips):
    for content, sentence in (
        (b"", "the file is empty"),
        (b"no tar\n" * 200, "it is not a tar archive, or its header is damaged"),
        (b"short", "it is not a tar archive, or its header is damaged"),
        (
            gzip.compress(b"x" * 5000),
            "it is a compressed archive, which cannot be read at a place: unpack it to a plain .tar",
        ),
    ):
        (tmp_path / "s.tar").write_bytes(content)
        with pytest.raises(ValueError) as caught:
            open_videos(str(tmp_path / "s.tar"), 0)
        assert str(caught.value) == f"data.path: {tmp_path / 's.tar'}: {sentence}"
    pack(tmp_path / "good.tar", [("a.mp4", clips[0])])
    videos = open_videos(str(tmp_path), 0)
    assert videos.paths == [f"{tmp_path}/good.tar::a.mp4", f"{tmp_path}/s.tar"]
    index = update_index(str(tmp_path), tmp_path / "index.jsonl", say=print)
    assert index.entries[1].reason.startswith("it is a compressed archive")
