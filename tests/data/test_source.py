import os

import numpy as np
import pytest

from fastjepa.data.source import open_videos
from fastjepa.data.synthetic import MOTIONS, SHAPES

TINY = "synthetic://moving-shapes?videos=16&size=48&frames=10"


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def listed(tmp_path):
    """The videos of a list file with this text, and (path relative to the list, label) of each."""

    def go(text, name="list.csv", encoding="utf-8"):
        (tmp_path / name).write_text(text, encoding=encoding)
        videos = open_videos(str(tmp_path / name), seed=0)
        paths = [os.path.relpath(path, tmp_path) for path in videos.paths]
        task = videos.tasks.get("label")
        labels = [task.classes[number] for number in task.labels] if task else [None] * len(paths)
        return videos, list(zip(paths, labels))

    return go


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_recursively_and_only_for_videos(tmp_path):
    touch(
        tmp_path,
        "b.mp4",
        "a.MKV",
        "deep/er/c.webm",
        "deep/d.Avi",
        "notes.txt",
        "e.mp4.part",
        "deep/f.jpg",
        "mp4",
        ".mp4",
    )
    (tmp_path / "folder.mp4").mkdir()
    videos = open_videos(str(tmp_path), seed=0)
    assert videos.paths == [str(tmp_path / name) for name in ("a.MKV", "b.mp4", "deep/d.Avi", "deep/er/c.webm")]
    assert np.array_equal(videos.train, np.arange(4))
    assert (videos.tasks, videos.splits) == ({}, {})
    assert videos.description == f"4 videos under {tmp_path}; left out beside videos: 1 image"


def test_the_order_of_a_folder_is_that_of_its_names(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{folder}/{name}.mp4" for folder in "ba" for name in "312"))
    listing = os.walk

    def backwards(top, **more):
        return ((f, d.sort(reverse=True) or d, n[::-1]) for f, d, n in listing(top, **more))

    monkeypatch.setattr(os, "walk", backwards)
    names = [os.path.relpath(path, tmp_path) for path in open_videos(str(tmp_path), seed=0).paths]
    assert names == [f"{folder}/{name}.mp4" for folder in "ab" for name in "123"]


def test_a_folder_without_videos_is_refused(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(
        ValueError, match=rf"^data\.path: no video file under {tmp_path} \(looked for .*\.mp4 "
    ) as caught:
        open_videos(str(tmp_path), seed=0)
    assert "\n" not in str(caught.value)


def test_a_path_in_the_home_folder_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "videos/a.mp4")
    assert open_videos("~/videos", seed=0).paths == [str(tmp_path / "videos" / "a.mp4")]


def test_a_path_that_does_not_exist_is_refused_with_the_nearest(tmp_path):
    touch(tmp_path, "kinetics/a.mp4")
    with pytest.raises(ValueError) as caught:
        open_videos(str(tmp_path / "kinetic"), seed=0)
    assert str(caught.value) == (
        f"data.path: no such folder or file: {tmp_path / 'kinetic'}, nearest: {tmp_path / 'kinetics'}"
    )
    with pytest.raises(ValueError, match=r"no such folder or file: nowhere/at/all$"):
        open_videos("nowhere/at/all", seed=0)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError) as caught:
        open_videos("s3://bucket/videos", seed=0)
    assert str(caught.value) == (
        "data.path: expected a folder, a list file or synthetic://..., given 's3://bucket/videos'"
    )


def test_a_video_can_be_given_directly(tmp_path):
    touch(tmp_path, "one.MP4", "two.mp4")
    videos = open_videos(str(tmp_path / "one.MP4"), seed=0)
    assert videos.paths == [str(tmp_path / "one.MP4")]
    assert videos.tasks == {}


# -- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a.mp4", "a.mp4", None),
        ("a.mp4 3", "a.mp4", "3"),
        ("a.mp4   -1", "a.mp4", "-1"),
        ("sub/a b c.mp4", "sub/a b c.mp4", None),
        ("sub/a b c.mp4 3", "sub/a b c.mp4", "3"),
        ("take 2.mp4", "take 2.mp4", None),
        ('"a b.mp4"', "a b.mp4", None),
        ('"a b.mp4" 3', "a b.mp4", "3"),
        ('"a b.mp4" cat', "a b.mp4", "cat"),
        ('"a, b.mp4",cat', "a, b.mp4", "cat"),
        ('"a b.mp4" , big cat', "a b.mp4", "big cat"),
        ("a b.mp4,cat", "a b.mp4", "cat"),
        ("a.mp4, big cat", "a.mp4", "big cat"),
        ("a.mp4 , cat", "a.mp4", "cat"),
        ("a.mp4\tcat", "a.mp4", "cat"),
        ("a.mp4::cat", "a.mp4", "cat"),
        ("a b.mp4 :: big cat", "a b.mp4", "big cat"),
        ("a.mp4,", "a.mp4", None),
        ("  a.mp4 3  ", "a.mp4", "3"),
        ("../a.mp4", "../a.mp4", None),
    ],
)
def test_a_line_of_a_list_is_a_path_and_an_optional_label(listed, line, path, label):
    # Labels need two classes; without any there is nothing to predict.
    _, found = listed(f"{line}\nother.mp4" + ("" if label is None else ",another\n"))
    assert found == [(path, label), ("other.mp4", None if label is None else "another")]


def test_comments_empty_lines_and_a_header_are_passed_over(listed):
    for header in ("path,label", "path", "Path\tLabel", "path label", "path::label"):
        assert listed(f"{header}\n\n# a.mp4\na.mp4 1\n   \n#b\npath.mp4 2\n")[1] == [("a.mp4", "1"), ("path.mp4", "2")]
    assert listed("path,label\na.mp4,1", encoding="utf-8-sig")[1] == [("a.mp4", None)]
    assert listed("a.mp4\r\nb.mp4\r\n")[1] == [("a.mp4", None), ("b.mp4", None)]


def test_paths_of_a_list_are_relative_to_it_or_absolute(listed, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    videos, _ = listed("sub/a.mp4\n/videos/b.mp4")
    assert videos.paths == [str(tmp_path / "sub/a.mp4"), "/videos/b.mp4"]
    assert videos.description == f"2 videos listed in {tmp_path / 'list.csv'}"


def test_labels_become_classes_in_the_order_of_numbers(listed):
    videos, _ = listed("".join(f"{n}.mp4 {n % 11}\n" for n in range(22)))
    task = videos.tasks["label"]
    assert task.classes == tuple(str(n) for n in range(11))
    assert task.labels.tolist() == [n % 11 for n in range(22)]
    assert np.array_equal(videos.train, np.arange(22))  # pretraining sees no labels, so it may see every video
    assert sorted(np.concatenate(list(videos.splits.values())).tolist()) == list(range(22))
    assert {name: len(split) for name, split in videos.splits.items()} == {"train": 13, "validation": 3, "test": 6}


@pytest.mark.parametrize("text", ["a.mp4 1\nb.mp4\n", "a.mp4 1\nb.mp4 1\n", "a.mp4\nb.mp4\n"])
def test_without_labels_for_every_video_and_two_classes_there_is_no_task(listed, text):
    videos, _ = listed(text)
    assert (len(videos.paths), videos.tasks, videos.splits) == (2, {}, {})


@pytest.mark.parametrize("line", [",3", '"" 3', "::3", ' "" '])
def test_a_line_without_a_path_is_refused_with_its_number(listed, tmp_path, line):
    with pytest.raises(ValueError) as caught:
        listed(f"a.mp4 1\n\n# comment\n{line}\n")
    assert str(caught.value) == (
        f"data.path: {tmp_path}/list.csv line 4: expected a path and an optional label, given {line!r}"
    )


def test_a_list_that_names_no_video_or_is_no_text_is_refused(listed, tmp_path):
    with pytest.raises(ValueError, match=f"^data.path: the list {tmp_path}/list.csv names no video$"):
        listed("path,label\n# nothing\n")
    (tmp_path / "photo.heic").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match=r"photo.heic is neither a video \(.*\.mp4 .*\), an image, a \.tar nor a text"):
        open_videos(str(tmp_path / "photo.heic"), seed=0)


# -- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_moved_folder_is_the_same_data_and_other_names_are_not(tmp_path):
    touch(
        tmp_path, "here/a.mp4", "here/sub/b.mp4", "there/far/a.mp4", "there/far/sub/b.mp4", "other/a.mp4", "other/b.mp4"
    )
    here, there, other = (open_videos(str(tmp_path / f), 0).fingerprint for f in ("here", "there/far", "other"))
    assert here == there != other
    touch(tmp_path, "here/c.mp4")
    assert open_videos(str(tmp_path / "here"), 0).fingerprint != here


def test_a_file_name_may_be_any_bytes(tmp_path):
    touch(tmp_path, os.fsdecode(b"\xff.mp4"), "vidéo.mp4")
    videos = open_videos(str(tmp_path), seed=0)
    assert [os.path.basename(os.fsencode(path)) for path in videos.paths] == ["vidéo.mp4".encode(), b"\xff.mp4"]
    assert len(videos.fingerprint) == 64


def test_the_fingerprint_of_a_list_is_that_of_its_paths_in_their_order(listed):
    first = listed("a.mp4 1\nb.mp4 2")[0].fingerprint
    assert listed('"a.mp4",x\nb.mp4,y', name="moved.txt")[0].fingerprint == first
    assert listed("b.mp4 2\na.mp4 1")[0].fingerprint != first
    assert listed("a.mp4\nb.mp4\nc.mp4")[0].fingerprint != first


# -- the embedded videos ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_the_moving_shapes_come_with_labels_and_a_split_that_pretraining_keeps_to(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    calls = []
    videos = open_videos(TINY, seed=3, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (16, 16)
    assert len(videos.paths) == 16
    assert all(path.startswith(str(cache)) and os.path.isfile(path) for path in videos.paths)
    assert videos.tasks["motion"].classes == MOTIONS
    assert videos.tasks["shape"].classes == SHAPES
    for path, shape, motion in zip(videos.paths, videos.tasks["shape"].labels, videos.tasks["motion"].labels):
        assert path.endswith(f"-{SHAPES[shape]}-{MOTIONS[motion]}.mp4")
    assert {name: len(split) for name, split in videos.splits.items()} == {"train": 10, "validation": 2, "test": 4}
    assert sorted(np.concatenate(list(videos.splits.values())).tolist()) == list(range(16))
    assert np.array_equal(videos.train, np.sort(videos.splits["train"]))
    assert "no real videos" in videos.description
    again = open_videos(TINY, seed=3)
    assert all(np.array_equal(again.splits[name], split) for name, split in videos.splits.items())
    other = open_videos(TINY, seed=4)
    assert not np.array_equal(other.train, videos.train)
    assert videos.fingerprint == other.fingerprint  # the seed is a setting of its own
    assert open_videos(TINY.replace("=10", "=11"), seed=3).fingerprint != videos.fingerprint


def test_a_wrong_address_of_embedded_videos_is_refused():
    with pytest.raises(ValueError, match="unknown parameter 'vidoes', the nearest is 'videos'"):
        open_videos("synthetic://moving-shapes?vidoes=3", seed=0)


def test_linked_folders_are_followed_once_and_circles_end(tmp_path):
    root, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
    touch(root, "a.mp4")
    touch(elsewhere, "b.mp4")
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    videos = open_videos(str(root), seed=0)
    assert [os.path.basename(path) for path in videos.paths] == ["a.mp4", "b.mp4"]


def test_labels_on_some_lines_only_are_said_to_be_unused(tmp_path):
    (tmp_path / "list.txt").write_text("a.mp4 1\nb.mp4\nc.mp4 2\n")
    videos = open_videos(str(tmp_path / "list.txt"), seed=0)
    assert videos.tasks == {}
    assert "only 2 have labels: they are not used" in videos.description
