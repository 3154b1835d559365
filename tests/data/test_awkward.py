"""Whole runs on files that are no videos, odd ones, and what happens to files while a run goes on."""

import errno
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fastjepa.data import dataset as dataset_module
from fastjepa.data import media
from fastjepa.data.decode import probe, read_frames
from fastjepa.data.source import open_videos
from fastjepa.exits import Exit
from tests.awkward import BAD

MORE = ("data.max_bad_fraction=1.0", "data.workers=2", "log.every=1")


@pytest.fixture(autouse=True)
def _deaths_are_found_soon(monkeypatch):
    """torch looks for dead workers when no batch has come for five seconds."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


def listed(folder):
    return [json.loads(line) for line in (folder / "bad_files.jsonl").read_text().splitlines()]


def write_list(tmp_path, paths):
    path = tmp_path / "list.csv"
    path.write_bytes(b"".join(b'"' + os.fsencode(p) + b'"\n' for p in paths))
    return path


@pytest.fixture
def good(film, tmp_path):
    (tmp_path / "good").mkdir()
    return [film.video(tmp_path / "good" / f"{n}.mp4", frames=6 + n) for n in range(6)]


# -- all kinds at once ------------------------------------------------------------------------------------------------


def make_odd(film, folder, source):
    """Videos that are strange and can be read all the same."""
    folder.mkdir()
    film.video(folder / "five_frames.mp4", frames=5)
    shutil.copy(source, folder / "mp4_called.avi")
    (folder / "linked.mp4").symlink_to(source)
    content = bytearray(source.read_bytes())
    # The header says that it lasts fifty times as long.
    duration = content.index(b"mvhd") + 4 + 16
    lasts = int.from_bytes(content[duration : duration + 4], "big")
    content[duration : duration + 4] = (50 * lasts).to_bytes(4, "big")
    (folder / "absurd_count.mp4").write_bytes(content)
    content = bytearray(source.read_bytes())
    size = content.rindex(b"avc1") + 4 + 24
    content[size : size + 4] = b"\xff" * 4
    (folder / "absurd_size.mp4").write_bytes(content)
    # A box at the end claims two gigabytes.
    (folder / "absurd_box.mp4").write_bytes(source.read_bytes() + (2**31 - 1).to_bytes(4, "big") + b"free" + bytes(64))
    odd = sorted(folder.iterdir())
    assert all(probe(path).frames in (5, 9) for path in odd)
    return odd


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_every_kind_of_bad_file_names_each_once_and_ends(run, film, good, tmp_path, workers, capfd):
    odd = make_odd(film, tmp_path / "odd", good[3])
    (tmp_path / "bad").mkdir()
    reasons = {}
    for name, (make, reason) in BAD.items():
        path = tmp_path / "bad" / name
        if not name.startswith("under_a_file"):
            make(film, path)
        reasons[str(path)] = reason
    reasons[str(tmp_path / "bad" / "folder.mp4")] = "it is a folder, and not one of frames with consecutive numbers"
    film.video(tmp_path / "bad" / "one_frame.mp4", frames=1)
    reasons[str(tmp_path / "bad" / "one_frame.mp4")] = "it has 1 frame, fewer than one tubelet of 2"
    paths = [*map(str, good), *map(str, odd), *reasons]
    steps = -(-len(paths) // 4) + 1
    code, folder = run(
        f"data.path={write_list(tmp_path, paths)}", *MORE, f"data.workers={workers}", f"optim.steps={steps}",
    )  # fmt: skip
    assert code == Exit.DONE
    found = {entry["path"]: entry["reason"] for entry in listed(folder)}
    assert len(listed(folder)) == len(found), "each once"
    assert set(found) == set(reasons), "good + bad = all"
    assert all(found[path].startswith(reason) for path, reason in reasons.items())
    out, err = capfd.readouterr()
    assert Counter(line.split(": ")[0].split()[-1] for line in out.splitlines() if "bad file " in line) == Counter(
        path.split()[-1] for path in reasons
    )
    assert err == ""
    assert not (folder / "crashed_videos.jsonl").exists()


def test_names_that_are_no_text_train_and_are_listed(run, good, tmp_path, capfd):
    """A file name is any bytes but two."""
    names = [os.fsdecode(b"\xff\xfe.mp4"), os.fsdecode(b"bad \xe9\n.mp4")]
    shutil.copy(good[3], tmp_path / "good" / names[0])
    (tmp_path / "good" / names[1]).write_bytes(b"no video")
    code, folder = run(f"data.path={tmp_path / 'good'}", "data.workers=1")
    assert code == Exit.DONE
    assert [entry["path"] for entry in listed(folder)] == [str(tmp_path / "good" / names[1])]
    assert capfd.readouterr().err == ""


def test_a_video_that_crashes_the_decoder_takes_no_run_with_it(run, good, tmp_path, monkeypatch):
    culprits, read_here, parent = set(), [], os.getpid()

    def read(info, frames):
        if os.getpid() == parent:
            read_here.append(info.path)
        elif info.path in culprits:
            os._exit(9)
        return media.read_frames(info, frames)

    def losses(folder):
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    monkeypatch.setattr("fastjepa.build.read_frames", read)
    more = (f"data.path={tmp_path / 'good'}", "data.workers=1", "log.images=true")
    run(*more, "optim.steps=3", folder="sound")
    culprit = read_here[0]  # a video that the pictures show
    culprits.add(culprit)
    read_here.clear()
    code, whole = run(*more, folder="whole")
    assert code == Exit.DONE
    reason = "the decoder ended its process (exit code 9)"
    assert [(entry["path"], entry["reason"]) for entry in listed(whole)] == [(culprit, reason)]
    assert (whole / "train.log").read_text().count("it is tried once more") == 1
    assert (whole / "viz" / "clips.png").is_file()
    assert read_here
    assert culprit not in read_here, "the training process keeps its hands off it"
    for stop_at in (2, 5):
        assert run(*more, f"runtime.stop_at={stop_at}", folder="parts")[0] == Exit.DONE
    code, parts = run(*more, folder="parts")
    assert losses(parts) == losses(whole)
    assert len(listed(parts)) == 1
    assert (parts / "train.log").read_text().count("it is tried once more") == 1, "what is known is not tried again"


def test_the_limit_of_a_decode_reaches_the_loader(run, good, tmp_path, monkeypatch):
    import time

    def read(info, frames):
        if info.path == str(good[1]):
            time.sleep(600)
        return media.read_frames(info, frames)

    monkeypatch.setattr("fastjepa.build.read_frames", read)
    code, folder = run(f"data.path={tmp_path / 'good'}", "data.workers=1", "data.decode_seconds=0.5")
    assert code == Exit.DONE
    assert [entry["reason"] for entry in listed(folder)] == ["decoding took more than 0.5 s"]
    assert "in read\n" in (folder / "train.log").read_text(), "the log shows where it hung"


# -- files that come and go -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_files_and_folders_that_vanish_during_a_run_are_bad_files(run, good, tmp_path, monkeypatch, workers):
    """One is gone between the search and the first read; a whole folder once the first step is done."""
    later = tmp_path / "good" / "later"
    later.mkdir()
    for number in range(3):
        shutil.copy(good[number], later / f"{number}.mp4")
    from fastjepa.loop import Trainer

    step, loader = Trainer._step, Trainer._loader

    def load(self, *arguments):
        good[0].unlink()
        return loader(self, *arguments)

    def train(self, number, batches, look):
        if number == 1 and later.is_dir():
            shutil.rmtree(later)
        return step(self, number, batches, look)

    monkeypatch.setattr(Trainer, "_loader", load)
    monkeypatch.setattr(Trainer, "_step", train)
    code, folder = run(f"data.path={tmp_path / 'good'}", f"data.workers={workers}", *MORE[:1])
    assert code == Exit.DONE
    want = {str(path): "the file does not exist" for path in (good[0], *(later / f"{n}.mp4" for n in range(3)))}
    assert {entry["path"]: entry["reason"] for entry in listed(folder)} == want
    assert len(listed(folder)) == 4


@pytest.mark.parametrize("sentence", ["", "# a comment\n", "path,label\n"])
def test_an_empty_list_is_refused_in_one_sentence(run, tmp_path, capsys, sentence):
    (tmp_path / "list.csv").write_text(sentence)
    code, folder = run(f"data.path={tmp_path / 'list.csv'}")
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    error = capsys.readouterr().err
    assert error.startswith("data.path: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_that_may_not_be_read_is_refused_in_one_sentence(run, good, tmp_path, monkeypatch, capsys, inside):
    """Rights do not hold root back, so that the system's refusal is put on."""
    closed = tmp_path / "good" / "closed" if inside else tmp_path / "good"
    closed.mkdir(exist_ok=True)
    scandir = os.scandir

    def refuse(path="."):
        if Path(os.fsdecode(path)) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(closed))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    code, folder = run(f"data.path={tmp_path / 'good'}")
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    assert capsys.readouterr().err == f"data.path: {closed} cannot be read: Permission denied\n"


def test_a_folder_of_links_that_go_in_circles_is_searched_once(good, tmp_path):
    folder = tmp_path / "good"
    (folder / "self").symlink_to(folder)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    assert open_videos(str(folder), seed=0).paths == sorted(map(str, good))


# -- long and large ---------------------------------------------------------------------------------------------------


def test_ten_minutes_of_video_are_read_at_any_place(film, tmp_path):
    """3000 frames: those of a clip are found without decoding the others."""
    pictures = [film.picture(number % 256) for number in range(256)]
    path = film.write(
        tmp_path / "long.mp4", (pictures[number % 256] for number in range(3000)), gop=250, preset="ultrafast",
        size=(film.HEIGHT, film.WIDTH),
    )  # fmt: skip
    info = probe(path)
    assert info.frames == 3000
    wanted = [0, 1499, 2998, 2999, 2999]
    assert [film.number_of(image) for image in read_frames(info, wanted)] == [number % 256 for number in wanted]
    plan = dataset_module.ClipPlan(0, np.arange(1), 16, 4, (0.3, 1.0), (0.75, 1.35), True)
    clip = dataset_module.ClipDataset(dataset_module.Reader([str(path)], 2), plan, 32)[0].clips[0]
    assert clip.shape == (3, 16, 32, 32)


def test_a_film_of_4096_by_2160_gives_clips(film, tmp_path):
    picture = np.kron(film.picture(181), np.ones((45, 43, 1), np.uint8))[:2160, :4096]
    path = film.write(tmp_path / "4k.mp4", [picture] * 20, preset="ultrafast", gop=20)
    info = probe(path)
    assert (info.frames, info.height, info.width) == (20, 2160, 4096)
    plan = dataset_module.ClipPlan(0, np.arange(1), 4, 4, (0.3, 1.0), (0.75, 1.35), True)
    sample = dataset_module.ClipDataset(dataset_module.Reader([str(path)], 2), plan, 32)[0]
    assert sample.bad == []
    assert sample.clips[0].shape == (3, 4, 32, 32)
