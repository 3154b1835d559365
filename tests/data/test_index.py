import csv
import json
import os
import shutil
from fractions import Fraction
from types import SimpleNamespace

import pytest

from fastjepa.data import index as module
from fastjepa.data import processes
from fastjepa.data.decode import NO_PERMISSION
from fastjepa.data.index import decoders, update_index
from fastjepa.data.indexfile import Entry, default_file, read_index, write_index


def crash_on_one(job):
    name = os.path.basename(job[0])
    if name == "crash.mp4":
        os._exit(11)
    return module.examine(job)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, film):
    """Good, short, rotated and bad files in two folders."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "sub").mkdir()
    film.video(folder / "a.mp4", 50, bf="2", sc_threshold="0")
    film.video(folder / "short.mkv", 3)
    film.video(folder / "sub" / "turned.mp4", 10, rotation=90)
    film.video(folder / "old.avi", 30, codec="mpeg4")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video\n" * 100)
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture
def place(shelf, tmp_path):
    return shutil.copytree(shelf, tmp_path / "videos")


@pytest.fixture
def scan(tmp_path):
    """Scan into one file; returns (entries by name, index, what was said)."""

    def go(path, file=tmp_path / "index.jsonl", **more):
        said = []
        found = update_index(str(path), file, say=said.append, **more)
        return {os.path.basename(e.path): e for e in found.entries}, found, said

    return go


@pytest.fixture
def nothing_may_be_opened(monkeypatch):
    def go():
        monkeypatch.setattr(processes, "_Worker", None)

    return go


def test_the_entries_say_what_each_file_holds(place, scan, tmp_path, film):
    steps = []
    entries, index, said = scan(place, workers=2, progress=lambda *step: steps.append(step))
    assert said == []
    assert index.opened == 5  # the empty one needs no opening
    assert steps == [(n, 5) for n in range(1, 6)]
    status = (place / "a.mp4").stat()
    whole = Entry(
        str(place / "a.mp4"), status.st_size, status.st_mtime_ns, None, 50, film.WIDTH, film.HEIGHT, Fraction(24),
        pytest.approx(50 / 24, abs=0.01), "h264", "yuv420p", 0, 10.0, True, ("pyav",),
    )  # fmt: skip
    assert entries["a.mp4"] == whole
    assert entries["short.mkv"].frames == 3
    turned = entries["turned.mp4"]
    assert turned.rotation in (90, 270)
    assert (turned.width, turned.height) == (film.HEIGHT, film.WIDTH)
    assert not entries["old.avi"].seekable
    assert entries["old.avi"].duration == pytest.approx(30 / 24)
    assert entries["old.avi"].gop == 10.0
    assert entries["empty.mp4"].reason == "the file is empty"
    assert "not a video file" in entries["text.mp4"].reason
    assert read_index(tmp_path / "index.jsonl") == ({e.path: e for e in index.entries}, True)


def test_only_what_changed_is_opened_again(place, scan, tmp_path, film, nothing_may_be_opened):
    before, _, _ = scan(place)
    film.video(place / "short.mkv", 7)
    os.utime(place / "a.mp4", ns=(0, 123_456_789))
    (place / "old.avi").unlink()
    film.video(place / "new.mp4", 5)
    entries, index, _ = scan(place)
    assert index.opened == 3
    assert (entries["short.mkv"].frames, entries["new.mp4"].frames) == (7, 5)
    assert entries["a.mp4"].mtime_ns == 123_456_789
    assert entries["turned.mp4"] == before["turned.mp4"]
    assert "old.avi" not in entries
    kept = tmp_path / "index.jsonl"
    assert {os.path.basename(path) for path in read_index(kept)[0]} == entries.keys()

    nothing_may_be_opened()
    os.utime(kept, ns=(0, 0))
    again, index, said = scan(place)
    assert (again, index.opened, said) == (entries, 0, [])
    assert kept.stat().st_mtime_ns == 0  # not even written


def test_a_file_that_was_removed_is_forgotten_though_nothing_is_opened(place, scan, tmp_path, nothing_may_be_opened):
    scan(place)
    (place / "a.mp4").unlink()
    nothing_may_be_opened()
    assert "a.mp4" not in scan(place)[0]
    assert str(place / "a.mp4") not in read_index(tmp_path / "index.jsonl")[0]


def test_reasons_outside_the_file_are_looked_at_again(place, scan, tmp_path, monkeypatch):
    file = tmp_path / "index.jsonl"
    _, index, _ = scan(place)
    known = {e.path: e for e in index.entries}
    denied = known[str(place / "a.mp4")]
    known[denied.path] = Entry(denied.path, denied.size, denied.mtime_ns, NO_PERMISSION)
    write_index(file, str(place), known.values())
    entries, index, _ = scan(place)
    assert index.opened == 1
    assert entries["a.mp4"] == denied

    file.write_text(file.read_text().replace('"av": "', '"av": "0.'))  # another PyAV may know more codecs
    _, index, _ = scan(place)
    assert index.opened == 1  # text.mp4
    assert scan(place)[1].opened == 0


DAMAGE = {
    "empty": (lambda text: "", "is empty"),
    "cut": (lambda text: text[: text.rindex("{")], "is damaged: it has 1 entries of 2"),
    "half a line": (lambda text: text[:-20], "is damaged in line 3"),
    "version of before": (lambda text: text.replace('"version": 2', '"version": 1'), "has version 1, this program"),
    "other version": (lambda text: text.replace('"version": 2', '"version": 99'), "has version 99"),
    "a list of lists": (lambda text: text + "[1]\n", "is damaged in line 4"),
    "a rate of nothing": (lambda text: text.replace("[24, 1]", "[24, 0]"), "is damaged in line 2"),
}
TWO = [Entry("a.mp4", 9, 9, None, 5, 4, 4, Fraction(24), 0.2, "h264", "yuv420p"), Entry("b.mp4", 9, 9, "it is bad")]


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_index_is_said_and_nothing_of_it_used(tmp_path, case):
    change, sentence = DAMAGE[case]
    file, said = tmp_path / "index.jsonl", []
    write_index(file, "videos", TWO)
    assert module._known(file, said.append) == ({entry.path: entry for entry in TWO}, True)
    file.write_text(change(file.read_text()))
    assert module._known(file, said.append) == ({}, False)
    (line,) = said
    assert sentence in line
    assert line.endswith("; it is made anew")


@pytest.mark.parametrize("content", [b"path,label\na.mp4,1\n", b"\xff\xd8\xff\xe0" * 100, b'{"a": 1}\n', b"[]", b"7\n"])
def test_a_foreign_file_is_kept_aside(tmp_path, content):
    file, said = tmp_path / "index.jsonl", []
    file.write_bytes(content)
    assert module._known(file, said.append) == ({}, False)
    (line,) = said
    assert "is not an index of videos" in line
    (aside,) = tmp_path.iterdir()
    assert aside.read_bytes() == content
    assert str(aside) in line


def test_an_index_that_cannot_be_used_is_made_anew(place, scan, tmp_path):
    file = tmp_path / "index.jsonl"
    file.write_text("a.mp4 0\n")
    entries, index, said = scan(place)
    assert index.opened == 5
    assert len(said) == 1
    file.write_text(file.read_text()[:-20])
    again, index, said = scan(place)
    assert (again, index.opened, len(said)) == (entries, 5, 1)
    assert scan(place)[1].opened == 0


def test_a_crash_of_the_decoder_costs_its_file_alone(place, scan, monkeypatch):
    shutil.copy(place / "a.mp4", place / "crash.mp4")
    monkeypatch.setattr(module, "examine", crash_on_one)
    entries, _, _ = scan(place, workers=2)
    assert entries["crash.mp4"].reason == "the decoder crashed"
    assert entries["a.mp4"].reason is None
    assert entries["crash.mp4"].size == entries["a.mp4"].size  # unchanged, it is not tried again
    assert scan(place)[1].opened == 0


def test_an_interrupted_scan_goes_on_where_it_was(place, scan):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(place, progress=stop)
    entries, index, said = scan(place)
    assert (index.opened, said) == (3, [])
    assert len(entries) == 6


def test_what_was_found_survives_a_full_disk(place, scan, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_index", full)
    entries, index, _ = scan(place)
    assert len(entries) == 6
    assert index.unsaved == f"the index {tmp_path / 'index.jsonl'} cannot be written: No space left on device"


def test_hostile_names_and_links_have_their_entries(tmp_path, scan, film, nothing_may_be_opened):
    place = tmp_path / "videos"
    place.mkdir()
    odd = [os.fsdecode(b"\xff\xfe.mp4"), "line\nend.mp4", 'quote".mp4', " .mp4", "vidéo.mp4", "concat:a.mp4"]
    film.video(place / "one.mp4", 4)
    for name in odd:
        shutil.copy(place / "one.mp4", place / name)
    (place / "circle.mp4").symlink_to(place / "circle.mp4")
    (place / "gone.mp4").symlink_to(place / "nowhere.mp4")
    (place / "linked.mp4").symlink_to(place / "one.mp4")
    (place / "again").symlink_to(place)
    os.mkfifo(place / "pipe.mp4")
    entries, _, said = scan(place)
    assert said == []
    bad = {name: entry.reason for name, entry in entries.items() if entry.reason is not None}
    assert bad.keys() == {"circle.mp4", "gone.mp4", "pipe.mp4"}
    assert "levels of symbolic links" in bad["circle.mp4"]
    assert bad["gone.mp4"] == "it is a link to a file that does not exist"
    assert bad["pipe.mp4"] == "it is not a regular file"
    assert all(entries[name].frames == 4 for name in [*odd, "one.mp4", "linked.mp4"])
    assert len(entries) == len(odd) + 5  # the folder in the folder was entered once
    nothing_may_be_opened()
    assert scan(place)[0] == entries  # the names came back from the file as they are


def test_a_folder_that_cannot_be_read_is_named_and_the_others_scanned(place, scan, monkeypatch):
    real = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    entries, index, _ = scan(place)
    assert "turned.mp4" not in entries
    assert index.folders == [(str(place / "sub"), "the folder cannot be read: Permission denied")]
    with pytest.raises(ValueError, match=r"^data.path: .*sub: the folder cannot be read: Permission denied$"):
        scan(place / "sub")


def test_lists_load_as_the_public_code_writes_them(place, scan):
    listed = place / "train.csv"
    listed.write_text(f"{place}/a.mp4 0\n{place}/sub/turned.mp4 1\n{place}/missing.mp4 2\n{place}/a.mp4 0\n")
    entries, index, _ = scan(listed)
    assert list(entries) == ["a.mp4", "turned.mp4", "missing.mp4"]
    assert entries["missing.mp4"].reason == "the file does not exist"
    assert index.opened == 2


def test_one_video_is_a_collection(place, scan):
    entries, _, _ = scan(place / "a.mp4")
    assert entries["a.mp4"].frames == 50


def test_the_file_in_the_cache_goes_by_the_real_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "videos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "videos")
    monkeypatch.chdir(tmp_path)
    file = default_file(str(tmp_path / "videos"))
    assert file.parent == tmp_path / "cache" / "fastjepa" / "index"
    assert default_file("videos") == default_file("link") == default_file("./videos/") == file
    assert default_file(str(tmp_path)) != file
    for odd in (os.fsdecode(b"/a/\xff"), "/", "/a/" + "x" * 250, "/a/b\nc"):
        name = default_file(odd).name
        assert name.isascii()
        assert len(name) < 80


def about(codec="h264", pixels="yuv420p", width=320, height=240, pts=(0, 1), unshown=0):
    return SimpleNamespace(codec=codec, pixel_format=pixels, width=width, height=height, pts=pts, unshown=unshown)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (about(), "pyav dali_gpu"),
        (about("hevc"), "pyav dali_gpu"),
        (about("mpeg4"), "pyav dali_gpu"),
        (about("av1"), "pyav dali_gpu"),
        (about("vp8"), "pyav dali_gpu dali_cpu"),
        (about("vp9"), "pyav dali_gpu dali_cpu"),
        (about("mjpeg", "yuvj420p"), "pyav dali_cpu"),
        (about("mpeg4", pts=None), "pyav"),
        (about("vp9", pts=None), "pyav dali_cpu"),
        (about("vp8", unshown=1), "pyav"),
        (about("h264", "yuv420p10le"), "pyav"),
        (about("h264", "yuv444p"), "pyav"),
        (about("hevc", "yuv444p"), "pyav"),
        (about("mjpeg", "yuvj422p"), "pyav dali_cpu"),
        (about("vvc"), "pyav"),
        (about(width=128), "pyav"),
        (about(height=159), "pyav"),
        (about(width=160, height=160), "pyav dali_gpu"),
        (about(width=4098), "pyav"),
        (about("hevc", width=7680, height=4320), "pyav dali_gpu"),
        (about("hevc", width=8194), "pyav"),
    ],
)
def test_which_decoders_can_take_a_video(info, expected):
    assert decoders(info) == tuple(expected.split())


# What the manifest of bad files calls damage, and PyAV reads all the same.
READ_ALL_THE_SAME = {
    "flipped_bits_middle.mp4",
    "single_frame.mp4",
    "truncated_faststart_half.mp4",
    "wrong_ext_mkv_as.mp4",
}


def test_real_clips_are_described_and_every_bad_one_has_a_reason(shared, scan):
    entries, _, said = scan(shared / "clips", workers=2)
    assert said == []
    bad = {path.name for path in (shared / "clips" / "bad").glob("*.*") if path.suffix != ".csv"}
    for name in bad - READ_ALL_THE_SAME:
        assert entries[name].reason, name
    with (shared / "clips" / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    compared = 0
    for row in rows:
        entry = entries[row["file"]]
        if not row["frames"]:
            assert entry.codec == "vvc" or entry.reason
            continue
        assert entry.reason is None, row["file"]
        assert entry.codec == row["codec"]
        if row["video_streams"] == "1":
            assert entry.pixel_format == row["pix_fmt"]
            assert sorted((entry.width, entry.height)) == sorted((int(row["width"]), int(row["height"])))
            assert entry.frames == int(row["frames"])
            assert entry.gop == pytest.approx(float(row["gop"]), abs=0.06)
            if entry.seekable and row["vfr"] == "0" and entry.frames > 1:
                assert entry.duration == pytest.approx(entry.frames / float(Fraction(row["r_fps"])), rel=0.03)
        compared += 1
    assert compared >= 25


def test_a_line_of_the_file_is_plain_json(place, scan, tmp_path):
    scan(place)
    header, *lines = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert header["format"] == "fastjepa video index"
    assert header["version"] == 2
    assert header["entries"] == len(lines) == 6
    (bad,) = [line for line in lines if line["path"].endswith("text.mp4")]
    assert bad.keys() == {"path", "size", "mtime_ns", "reason"}
    (good,) = [line for line in lines if line["path"].endswith("a.mp4")]
    assert good["rate"] == [24, 1]
    assert good["decoders"] == ["pyav"]
