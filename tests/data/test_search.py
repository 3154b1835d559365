"""Shards as a collection: which videos, in which order, with which labels, and what is left out."""

import json
import os

import numpy as np
import pytest
import torch

from fastjepa.data.dataset import ClipDataset, Reader
from fastjepa.data.index import update_index
from fastjepa.data.sampling import ClipPlan
from fastjepa.data.shards import split_name
from fastjepa.data.source import open_videos
from fastjepa.data.tables import table
from tests.packed import pack


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def inside(videos):
    return [split_name(path)[1] for path in videos.paths]


def test_a_compressed_archive_is_refused_where_it_is_named(tmp_path, clips):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    sentence = f"data.path: {tmp_path}/a.tar.gz is compressed and cannot be read at a place: unpack it to a plain .tar"
    (tmp_path / "list.txt").write_text("a.tar.gz\n")
    for place in ("a.tar.gz", "list.txt"):
        with pytest.raises(ValueError) as caught:
            open_videos(str(tmp_path / place), 0)
        assert str(caught.value) == sentence
    (tmp_path / "list.txt").unlink()
    note = "left out as only a plain .tar can be read at a place: 1 compressed archive"
    with pytest.raises(ValueError) as caught:
        open_videos(str(tmp_path), 0)
    assert str(caught.value) == f"data.path: no video or image under {tmp_path}; {note}"
    (tmp_path / "a.mp4").write_bytes(clips[0])
    assert open_videos(str(tmp_path), 0).description == f"1 video under {tmp_path}; {note}"


def test_a_shard_without_videos_is_left_out(tmp_path, clips):
    pack(tmp_path / "notes.tar", [("a.txt", b"x")])
    with pytest.raises(ValueError) as caught:
        open_videos(str(tmp_path / "notes.tar"), 0)
    assert str(caught.value).startswith(f"data.path: no video or image in {tmp_path}/notes.tar; ")
    pack(tmp_path / "s.tar", [("a.mp4", clips[0])])
    assert open_videos(str(tmp_path), 0).description == (
        f"1 video in 1 shard under {tmp_path}; left out for want of videos: 1 shard"
    )


def test_shards_and_files_of_a_folder_are_one_collection_in_order(tmp_path, clips):
    pack(tmp_path / "b.tar", [("z.mp4", clips[0]), ("a.mp4", clips[1]), ("._z.mp4", b"of a Mac"), ("in.tar", b"x")])
    pack(tmp_path / "deep/c.tar", [("a.mp4", clips[2])])
    alone = open_videos(str(tmp_path), 0)
    assert [os.path.relpath(path, tmp_path) for path in alone.paths] == [
        "b.tar::z.mp4", "b.tar::a.mp4", "deep/c.tar::a.mp4",
    ]  # fmt: skip
    for name in ("a.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(clips[3])
    (tmp_path / "list.txt").write_text("a.mp4\nb.tar\nc.mp4\ndeep/c.tar\n")
    videos = open_videos(str(tmp_path / "list.txt"), 0)
    assert [os.path.relpath(path, tmp_path) for path in videos.paths] == [
        "a.mp4",
        "b.tar::z.mp4",
        "b.tar::a.mp4",
        "c.mp4",
        "deep/c.tar::a.mp4",
    ]
    assert videos.shards.tolist() == [0, 1, 1, 2, 3]
    assert videos.shards.dtype == np.int64
    assert videos.description == f"2 videos, 3 videos in 2 shards listed in {tmp_path / 'list.txt'}"


def test_shards_beside_loose_videos_are_what_these_came_in_and_are_left_out(tmp_path, clips):
    for name in ("a.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(clips[3])
    before = open_videos(str(tmp_path), 0)
    pack(tmp_path / "b.tar", [("z.mp4", clips[0]), ("a.mp4", clips[1])])
    (tmp_path / "broken.tar").write_bytes(b"no archive" * 99)
    after = open_videos(str(tmp_path), 0)
    assert (after.paths, after.fingerprint, after.shards) == (before.paths, before.fingerprint, None)
    assert after.description == f"2 videos under {tmp_path}; left out beside videos: 2 shards"


def test_a_moved_shard_is_the_same_data_and_other_members_are_not(tmp_path, clips):
    for place in ("here", "there/far"):
        pack(tmp_path / place / "s.tar", [("a.mp4", clips[0]), ("../b.mp4", clips[1])])
    pack(tmp_path / "other/s.tar", [("a.mp4", clips[0]), ("b.mp4", clips[1])])
    here, there, other = (open_videos(str(tmp_path / p), 0).fingerprint for p in ("here", "there/far", "other"))
    assert here == there != other
    assert open_videos(str(tmp_path / "here/s.tar"), 0).fingerprint == here


def test_images_of_shards_count_where_there_is_no_video(tmp_path, clips, png):
    pack(tmp_path / "i/s.tar", [("a.png", png), ("b.png", png)])
    videos = open_videos(str(tmp_path / "i"), 0)
    assert inside(videos) == ["a.png", "b.png"]
    assert videos.description == f"2 images in 1 shard under {tmp_path / 'i'}"
    pack(tmp_path / "i/t.tar", [("a.mp4", clips[0]), ("a.png", png)])
    videos = open_videos(str(tmp_path / "i"), 0)
    assert inside(videos) == ["a.mp4"]
    assert videos.description.endswith("; left out beside videos: 3 images")


def test_a_list_may_name_shards_and_gives_them_no_label(tmp_path, clips):
    pack(tmp_path / "s.tar", [("b.mp4", clips[0]), ("a.mp4", clips[1])])
    (tmp_path / "list.txt").write_text("t.mp4\ns.tar\n")
    videos = open_videos(str(tmp_path / "list.txt"), 0)
    assert videos.paths == [f"{tmp_path}/t.mp4", f"{tmp_path}/s.tar::b.mp4", f"{tmp_path}/s.tar::a.mp4"]
    assert videos.shards.tolist() == [0, 1, 1]
    for line in ("s.tar 3", "s.tar::a.mp4"):
        (tmp_path / "list.txt").write_text(line)
        with pytest.raises(ValueError) as caught:
            open_videos(str(tmp_path / "list.txt"), 0)
        sentence = f"expected a shard without a label (those are inside), given {line!r}"
        assert str(caught.value) == f"data.path: {tmp_path}/list.txt line 1: {sentence}"


def test_labels_stand_beside_the_members(tmp_path, clips):
    files = [
        ("a.mp4", clips[0]),
        ("a.cls", b"10\n"),
        ("a.json", b'{"label": 3}'),  # the .cls comes first
        ("d/a.mp4", clips[0]),
        ("d/a.json", json.dumps({"label": "2", "caption": "x"}).encode()),
        ("b.c.mp4", clips[0]),  # WebDataset's key ends at the first dot, others' at the last
        ("b.cls", b"2"),
        ("e.f.mp4", clips[0]),
        ("e.f.cls", b"10"),
    ]
    videos = open_videos(str(pack(tmp_path / "s.tar", files)), 0)
    assert inside(videos) == ["a.mp4", "d/a.mp4", "b.c.mp4", "e.f.mp4"]
    assert videos.tasks["label"].classes == ("2", "10")
    assert videos.tasks["label"].labels.tolist() == [1, 0, 0, 1]
    assert sorted(np.concatenate(list(videos.splits.values())).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.cls", b"\xff\xfe"),
        ("b.cls", b" \n"),
        ("b.json", b"{"),
        ("b.json", b"[1]"),
        ("b.json", b'{"label": [1]}'),
        ("b.json", b'{"label": true}'),
        ("b.json", b'{"caption": "x"}'),
        ("b.json", b"[" * 100_000),
        ("b.txt", b"2"),
    ],
)
def test_what_says_no_label_is_none(tmp_path, clips, name, content):
    path = pack(tmp_path / "s.tar", [("a.mp4", clips[0]), ("a.cls", b"1"), ("b.mp4", clips[0]), (name, content)])
    videos = open_videos(str(path), 0)
    assert videos.tasks == {}
    assert videos.description.endswith("(only 1 have labels: they are not used)")


def test_a_damaged_shard_is_in_no_split(tmp_path, clips):
    files = [
        (f"{n}.{kind}", clips[0] if kind == "mp4" else b"%d" % (n % 2)) for n in range(8) for kind in ("mp4", "cls")
    ]
    path = pack(tmp_path / "s.tar", files)
    path.write_bytes(path.read_bytes()[: table(str(path)).members["7.mp4"][0] + 5])
    videos = open_videos(str(path), 0)
    assert videos.paths[-1] == str(path)
    assert len(videos.tasks["label"].labels) == len(videos.paths)
    everywhere = np.concatenate(list(videos.splits.values()))
    assert sorted(everywhere.tolist()) == list(range(len(videos.paths) - 1))


def test_the_index_opens_members_again_only_where_their_shard_changed(tmp_path, clips):
    pack(tmp_path / "v/a.tar", [("a.mp4", clips[0]), ("b.mp4", b"text")])
    pack(tmp_path / "v/b.tar", [("c.mp4", clips[2])])
    file = tmp_path / "index.jsonl"
    index = update_index(str(tmp_path / "v"), file, say=print)
    assert index.opened == 3
    assert [entry.frames for entry in index.entries] == [4, 0, 6]
    assert index.entries[0].size == len(clips[0])  # not that of the shard, which a sum would count for every member
    again = update_index(str(tmp_path / "v"), file, say=print)
    assert (again.opened, again.entries) == (0, index.entries)
    os.utime(tmp_path / "v/a.tar", ns=(0, 77))
    again = update_index(str(tmp_path / "v"), file, say=print)
    assert (again.opened, again.entries[0].mtime_ns) == (2, 77)


def test_clips_of_members_are_those_of_the_same_files(tmp_path, clips):
    for n, content in enumerate(clips):
        (tmp_path / f"{n}.mp4").write_bytes(content)
    path = pack(tmp_path / "s.tar", [(f"{n}.mp4", content) for n, content in enumerate(clips)])
    plan = ClipPlan(0, np.arange(8), 4, 1, (0.3, 1.0), (0.75, 1.35), True)
    alone = ClipDataset(Reader([str(tmp_path / f"{n}.mp4") for n in range(8)], 2), plan, 32)
    inside = ClipDataset(Reader([f"{path}::{n}.mp4" for n in range(8)], 2), plan, 32)
    for slot in range(16):
        assert torch.equal(alone[slot].clips[0], inside[slot].clips[0])
