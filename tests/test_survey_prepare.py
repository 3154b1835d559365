"""`python -m fastjepa data PATH --prepare OUT`, whole: what it says, what it refuses, and that it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fastjepa import preparing
from fastjepa.__main__ import main
from fastjepa.data.media import probe, read_frames
from fastjepa.data.pace import Pace
from fastjepa.data.source import open_videos
from tests.data.conftest import number_of, picture, video

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        video(folder / f"{number}.mp4", frames=20 + number, gop=250)
    (folder / "text.mp4").write_text("hello " * 99)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paces = iter([Pace(10, 3, 2.0), Pace(40, 3, 2.0)] * 9)
    monkeypatch.setattr(preparing, "measure_pace", lambda *_: next(paces))


def go(folder, *more):
    return main(["data", str(folder), "--prepare", *map(str, more), "--workers", "1"])


def test_it_says_what_it_will_do_what_it_expects_and_what_came_of_it(folder, tmp_path, capsys):
    assert go(folder, tmp_path / "out", "--short-side", "24", "--gop", "8", "--quality", "30") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith(" "))
    assert lines["prepare"] == (
        f"4 videos as H.264 in {tmp_path / 'out'}: short side at most 24, a key frame every 8 frames, quality 30, "
        "no sound"
    )
    # (21.5 / 2 + 21.5) * 96 * 48 against (8 / 2 + 21.5) * 48 * 24
    assert lines["expected"].startswith("5.1 times the clips/s of one process, an estimate")
    assert lines["prepared"].startswith("4 of 4 videos, 4 of them now: ")
    assert lines["prepared"].endswith(f"; train with data.path={tmp_path / 'out' / 'videos.csv'}")
    assert lines["left"] == "out   1 unreadable files, 0 single images"
    assert lines["gain"] == "5 -> 20 clips/s in one process with PyAV (4 x), measured on 3 videos"
    assert len(open_videos(str(tmp_path / "out" / "videos.csv"), 0).paths) == 4


def test_a_second_start_has_nothing_to_do(folder, tmp_path, capsys):
    go(folder, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.mp4")}
    capsys.readouterr()
    assert go(folder, tmp_path / "out") == 0
    assert "prepared   4 of 4 videos, 0 of them now" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.mp4")} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gop", "5"], "--gop: expected beside --prepare FOLDER only, given '5' without it"),
        (["--prepare", "new", "--gop", "0"], "--gop: expected a whole number from 1 to 600, given '0'"),
        (["--prepare", "new", "--quality", "x"], "--quality: expected a whole number from 1 to 51, given 'x'"),
        (["--prepare", "new", "--quality", "0"], "--quality: expected a whole number from 1 to 51, given '0'"),
        (["--prepare", "new", "--short-side", "5"], "--short-side: expected a whole number from 16 to 4096, given '5'"),
        (["--prepare", "file"], "--prepare: expected a folder, given file, which is a file"),
        (["--prepare", "full"], "--prepare: expected a new folder or one prepared before, given full, which holds"),
        (["--prepare", "{folder}/new"], "--prepare: expected a folder outside of the collection {folder}, given"),
        (["--prepare"], "argument --prepare: expected one argument"),
        (["--prepare", "new", "--gpu", "h200"], "--gpu: expected without --prepare, which measures this machine"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence_and_writes_nothing(
    folder, tmp_path, monkeypatch, capsys, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert main(["data", str(folder), *(text.format(folder=folder) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(sentence.format(folder=folder))
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert not (folder / "new").exists()


def test_another_collection_does_not_take_the_place_of_the_one_before(folder, tmp_path, capsys):
    go(folder, tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    video(other / "0.mp4", frames=20)
    before = (tmp_path / "out" / "videos.csv").read_text()
    capsys.readouterr()
    assert go(other, tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(f"--prepare: expected the collection that {tmp_path / 'out'} was made of")
    assert (tmp_path / "out" / "videos.csv").read_text() == before


def test_a_collection_of_images_alone_is_refused(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "pictures" / "cat.png")
    assert go(tmp_path / "pictures", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"--prepare: {tmp_path / 'pictures'} holds no video to encode among 1 files\n"


def test_what_stands_in_folders_of_frames_has_a_rate_that_is_said(tmp_path, capsys):
    (tmp_path / "frames" / "walk").mkdir(parents=True)
    for number in range(70):
        Image.fromarray(picture(number)).save(tmp_path / "frames" / "walk" / f"{number}.png")
    assert go(tmp_path / "frames", tmp_path / "out") == 0
    assert "rate       1 videos and folders of frames do not say it and get 25 frames/s" in capsys.readouterr().out
    (path,) = open_videos(str(tmp_path / "out" / "videos.csv"), 0).paths
    assert [number_of(one) for one in read_frames(probe(path), [0, 63, 64, 69])] == [0, 63, 64, 69]


def test_processes_that_cannot_start_end_it_with_a_sentence(folder, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("a process ended before it began")

    monkeypatch.setattr(preparing, "prepare", broken)
    assert go(folder, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error == "a process ended before it began; what was made is kept, and the same command goes on\n"


def test_one_that_is_killed_goes_on_where_it_was(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(16):
        video(folder / f"{number:02}.mp4", frames=60)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastjepa", "data", str(folder), "--prepare", str(out), "--workers", "1"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    for ending, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        already = len(list(out.glob("[0-9]*.mp4")))
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while len(list(out.glob("[0-9]*.mp4"))) < already + 3:
            assert process.poll() is None, "it ended before it was stopped"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(ending)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == code
    assert error.endswith("interrupted; what was made is kept, and the same command goes on\n")
    assert not (out / "videos.csv").exists(), "the list comes when all of it is there"
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("[0-9]*.mp4")}
    assert 6 <= len(before) < 16
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("[0-9]*.mp4")}
    made_again = [name for name, time in before.items() if after[name] != time]
    assert len(made_again) <= 1, "what was done between the rename and its line"
    assert len(open_videos(str(out / "videos.csv"), 0).paths) == 16
    assert not (out / ".unfinished").exists()
