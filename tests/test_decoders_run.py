"""Whole runs with every decoder: what they say, that they resume exactly, and that a bad file ends none."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa import checkpoint, start
from fastjepa.data.decoders import dali, torchcodec
from fastjepa.exits import Exit
from tests.data.conftest import picture, video, write
from tests.packed import pack

WHY_NOT = {"torchcodec": torchcodec.why_not, "dali_cpu": lambda: dali.why_not(torch.device("cpu"))}


@pytest.fixture(params=WHY_NOT)
def name(request):
    if reason := WHY_NOT[request.param]():
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos that DALI's own decoders read, one that they do not, and one that nobody does."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        kind = {"codec": "libvpx-vp9", "deadline": "realtime", "cpu_used": "8"} if number % 2 else {"codec": "mjpeg"}
        pixels = "yuv420p" if number % 2 else "yuvj420p"
        video(folder / f"{number}.mkv", frames=8 + number, pixels=pixels, **kind)
    video(folder / "h264.mp4", frames=9)
    (folder / "text.mp4").write_text("hello " * 99)
    return folder


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def settings(folder, name):
    return (f"data.path={folder}", f"data.decoder={name}", "data.max_bad_fraction=0.5")


def test_a_run_says_what_it_decodes_with_and_names_the_bad_file_once(run, folder, name, capsys):
    code, made = run(*settings(folder, name))
    out = capsys.readouterr().out
    assert code == Exit.DONE
    assert f"decoder    {name} (asked for)" in out
    if name == "dali_cpu":
        assert "dali_cpu 5 videos, pyav 1, unreadable 1" in out
        assert "for pyav: 1 h264 yuv420p 96 x 48" in out
    assert out.count("bad file   ") == 1
    (bad,) = [json.loads(line) for line in (made / "bad_files.jsonl").read_text().splitlines()]
    assert bad == {
        "path": str(folder / "text.mp4"),
        "reason": "it is not a video file, or its header is damaged",
        "decoder": "pyav",
    }


def test_a_run_goes_on_bitwise_with_the_same_decoder_and_any_number_of_workers(run, folder, name):
    _, whole = run(*settings(folder, name), folder="whole")
    run(*settings(folder, name), "runtime.stop_at=4", "data.workers=2", folder="parts")
    code, parts = run(*settings(folder, name), "data.workers=1", folder="parts")
    assert code == Exit.DONE
    assert losses(parts) == losses(whole)
    ours, theirs = (checkpoint.newest(one / "checkpoints", print) for one in (parts, whole))
    assert (ours.step, theirs.step) == (10, 10)


def test_decoders_are_told_apart_by_no_more_than_colours(run, folder, name):
    """Clips, boxes and frames are those of PyAV: a step of a tiny learning rate has nearly the same loss."""
    _, plain = run(*settings(folder, "pyav"), "optim.lr=1e-6", folder="plain")
    _, other = run(*settings(folder, name), "optim.lr=1e-6", folder="other")
    assert np.allclose(losses(other), losses(plain), rtol=0.02)


def test_what_cannot_run_here_ends_with_a_sentence_and_writes_nothing(run, folder, capsys, tmp_path):
    code, made = run(*settings(folder, "dali_gpu"))
    assert code == Exit.WRONG_INPUT
    assert made is None
    assert capsys.readouterr().err == "data.decoder: dali_gpu cannot be used here: there is no GPU to decode on\n"


def test_mixtures_and_frames_per_second_train_and_resume(run, folder):
    mixed = (f"data.path={{{folder}: 3, synthetic://moving-shapes?videos=16&size=48&frames=8: 1}}",)
    more = ("data.fps=12", "data.stride=4", "data.sampling=replacement", "data.antialias=true")
    code, whole = run(*mixed, *more, "data.max_bad_fraction=0.5", folder="whole")
    assert code == Exit.DONE
    run(*mixed, *more, "data.max_bad_fraction=0.5", "runtime.stop_at=3", folder="parts")
    _, parts = run(*mixed, *more, "data.max_bad_fraction=0.5", "data.workers=2", folder="parts")
    assert losses(parts) == losses(whole)


def test_a_mixture_is_decoded_by_dali_too(run, folder, tmp_path, capsys):
    if reason := WHY_NOT["dali_cpu"]():
        pytest.skip(reason)
    other = tmp_path / "other"
    other.mkdir()
    video(other / "more.mkv", frames=9, codec="mjpeg", pixels="yuvj420p")
    more = ("data.decoder=dali_cpu", "data.max_bad_fraction=0.5")
    code, _ = run(f"data.path={{{folder}: 1, {other}: 1}}", *more)
    out = capsys.readouterr().out
    assert code == Exit.DONE
    assert "dali_cpu 6 videos, pyav 1, unreadable 1" in out


def test_resizing_with_a_filter_is_for_clips_that_dali_decodes_too(run, folder):
    if reason := WHY_NOT["dali_cpu"]():
        pytest.skip(reason)
    runs = {}
    for decoder in ("pyav", "dali_cpu"):
        for antialias in ("false", "true"):
            more = (f"data.antialias={antialias}", "data.crop=16", "runtime.stop_at=1", "optim.lr=0")
            _, made = run(*settings(folder, decoder), *more, folder=f"{decoder}{antialias}")
            runs[decoder, antialias] = losses(made)[0]
    apart = abs(runs["pyav", "true"] - runs["pyav", "false"])
    assert abs(runs["dali_cpu", "true"] - runs["pyav", "true"]) < apart / 2
    assert abs(runs["dali_cpu", "false"] - runs["pyav", "false"]) < apart / 2


def test_a_video_that_comes_while_a_run_begins_is_none_of_it(run, folder, tmp_path, capsys, monkeypatch):
    if reason := WHY_NOT["dali_cpu"]():
        pytest.skip(reason)
    own = tmp_path / "own"
    own.mkdir()
    for number in range(3):
        video(own / f"{number}.mkv", frames=9, codec="mjpeg", pixels="yuvj420p")
    real = start.update_index

    def late(path, *more, **named):
        (own / "0.mkv").unlink(missing_ok=True)
        return real(path, *more, **named)

    monkeypatch.setattr(start, "update_index", late)
    code, _ = run(f"data.path={own}", "data.decoder=dali_cpu")
    assert code == Exit.DONE
    assert f"bad file   {own / '0.mkv'}: it came or went while the run began" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of frames and single images."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        (folder / f"walk{number}").mkdir()
        for frame in range(12):
            Image.fromarray(picture(frame + number)).save(folder / f"walk{number}" / f"{frame:03}.jpg")
    for name in ("cat", "dog"):
        Image.fromarray(picture(len(name))).save(folder / f"{name}.png")
    return folder


def test_images_and_folders_of_frames_train(run, pictures, capsys):
    code, _ = run(f"data.path={pictures}", "data.frame_rate=10", "data.fps=5", "data.stride=4")
    out = capsys.readouterr().out
    assert code == Exit.DONE
    assert f"data       3 folders of frames, 2 images under {pictures}; 5 for pretraining" in out
    assert "bad file" not in out


def test_without_a_rate_frames_per_second_name_the_folder_and_go_on_with_images(run, pictures, capsys):
    code, _ = run(f"data.path={pictures}", "data.fps=5", "data.stride=4")
    out = capsys.readouterr().out
    assert code == Exit.DONE
    assert f"bad file   {pictures / 'walk0'}: its frame rate is not known, and data.fps needs it (pyav)" in out
    assert out.count("bad file   ") == 3


def test_shards_train_in_windows_and_resume(run, folder, tmp_path, name, capsys):
    files = sorted(path for path in folder.iterdir() if path.suffix in (".mkv", ".mp4"))
    for number in range(2):
        chosen = [(path.name, path.read_bytes()) for path in files[number::2]]
        pack(tmp_path / "shards" / f"{number}.tar", chosen)
    more = (f"data.path={tmp_path / 'shards'}", f"data.decoder={name}", "data.shuffle_window=3")
    more = (*more, "data.max_bad_fraction=0.5")
    code, whole = run(*more, folder="whole")
    out = capsys.readouterr().out
    assert code == Exit.DONE
    assert "7 videos in 2 shards" in out
    assert out.count("bad file   ") == 1
    run(*more, "runtime.stop_at=4", folder="parts")
    _, parts = run(*more, "data.workers=2", folder="parts")
    assert losses(parts) == losses(whole)


@pytest.mark.gpu
def test_on_a_gpu_videos_are_decoded_there_and_what_it_cannot_read_by_pyav(run, tmp_path, capsys):
    if reason := dali.why_not(torch.device("cuda")):
        pytest.skip(f"DALI is not installed or cannot decode here: {reason}")
    folder = tmp_path / "videos"
    folder.mkdir()
    large = [picture(number, 160, 192) for number in range(20)]
    for name, kind in {
        "h264.mp4": {"bf": "3"},
        "vp9.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu_used": "8"},
        "hevc.mp4": {"codec": "libx265"},
        "turned.mp4": {"rotation": 90},
        "deep.mp4": {"codec": "libx265", "pixels": "yuv420p10le"},
    }.items():
        write(folder / name, large, **kind)
    (folder / "text.mp4").write_text("hello " * 99)
    more = (f"data.path={folder}", "runtime.device=cuda", "data.max_bad_fraction=0.5")
    code, made = run(*more)
    out = capsys.readouterr().out
    assert code == Exit.DONE
    assert "decoder    dali_gpu (DALI and a GPU are there)" in out
    assert "dali_gpu 4 videos, pyav 1, unreadable 1" in out
    assert "dali_gpu fails" not in out
    assert out.count("bad file   ") == 1
    _, plain = run(*more, "data.decoder=pyav", folder="plain")
    assert losses(made)[0] == pytest.approx(losses(plain)[0], rel=0.02), "the first step sees the same clips"
