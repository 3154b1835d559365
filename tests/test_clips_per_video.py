"""Whole runs with several clips of a video, with clips of a duration, and with short videos passed over."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fastjepa.data.synthetic import MovingShapes, materialise, video_names
from fastjepa.exits import Exit

# Two videos a step, four clips of each, in truncation groups of one video or both.
SEVERAL = ("data.clips_per_video=4", "optim.global_batch=8", "data.batch_size=8", "optim.steps=6")
# Time in the embedded videos runs at 24 frames/s.
BY_TIME = ("data.stride=4", "data.duration=0.17")


def column(folder: Path, key: str) -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row[key] for row in found]


def losses(folder: Path) -> list[str]:
    return [loss.hex() for loss in column(folder, "loss")]


def copy_videos(folder: Path, long: int, short: int, bad: int = 0) -> None:
    """Videos of 8 frames, of 3 frames, and of none."""
    folder.mkdir()
    for frames, count in ((8, long), (3, short)):
        spec = MovingShapes.from_url(f"synthetic://moving-shapes?videos=48&size=48&frames={frames}")
        source = materialise(spec)
        for i, name in zip(range(count), video_names(spec)):
            (folder / f"{frames}-{i:02}.mp4").write_bytes((source / name).read_bytes())
    for i in range(bad):
        (folder / f"bad{i}.mp4").write_bytes(b"not a video" * 100)


# -- several clips of one video ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("mask.truncation=group", "mask.group=1"),
        ("mask.truncation=random", "data.batch_size=4"),
        ("mask.truncation=none", "data.batch_size=4", "runtime.execution=reference"),
        ("model.targets=noised", "model.noise=linear", *BY_TIME),
    ],
)
def test_a_run_that_stopped_twice_equals_an_uninterrupted_one_bit_for_bit(run, overrides):
    _, whole = run(*SEVERAL, *overrides, folder="whole")
    for stop_at in (1, 4):
        code, _ = run(*SEVERAL, *overrides, f"runtime.stop_at={stop_at}", folder="parts")
        assert code == Exit.DONE
    _, parts = run(*SEVERAL, *overrides, folder="parts")
    assert losses(parts) == losses(whole)
    assert len(losses(whole)) == 6


def test_loader_processes_change_nothing(run):
    _, alone = run(*SEVERAL, folder="alone")
    _, workers = run(*SEVERAL, "data.workers=2", folder="workers")
    assert losses(workers) == losses(alone)


@pytest.mark.parametrize("truncation", ["group", "random", "none"])
def test_executions_and_batch_sizes_compute_the_same_run(run, truncation):
    overrides = (*SEVERAL, f"mask.truncation={truncation}", "optim.steps=3")
    _, packed = run(*overrides, folder="packed")
    for number, other in enumerate(
        [("runtime.execution=reference",), ("data.batch_size=4",), ("data.batch_size=4", "runtime.execution=reference")]
    ):
        _, folder = run(*overrides, *other, folder=f"other{number}")
        for key in ("loss", "grad_norm"):
            assert column(folder, key) == pytest.approx(column(packed, key), rel=1e-4)


def test_the_number_of_clips_is_part_of_what_a_run_is(run):
    _, four = run(*SEVERAL, "mask.group=1")
    _, two = run(*SEVERAL, "mask.group=1", "data.clips_per_video=2")
    assert four != two
    assert losses(four)[0] != losses(two)[0]


def test_the_batch_is_fitted_in_whole_videos(run, capsys):
    code, _ = run(*SEVERAL, "data.batch_size=auto", "optim.steps=3", "optim.global_batch=12")
    assert code == Exit.DONE
    out = capsys.readouterr().out
    assert "4 of each video with the same masks (3 videos a step)" in out
    assert "12 clips a step = 12 x 1 accumulated" in out


# -- duration ---------------------------------------------------------------------------------------------------------


def test_a_duration_takes_the_place_of_the_stride(run):
    """4 frames in 0.34 s at 24 frames/s: a stride of 2."""
    _, by_time = run("data.stride=4", "data.duration=0.34", folder="time")
    _, by_stride = run("data.stride=2", folder="stride")
    assert losses(by_time) == losses(by_stride)
    _, other = run(*BY_TIME, folder="other")
    assert losses(other) != losses(by_time)


# -- short videos -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_short_videos_are_named_once_counted_apart_and_no_bad_files(run, cache, tmp_path, capsys, workers):
    copy_videos(tmp_path / "videos", long=3, short=12, bad=1)
    overrides = (f"data.path={tmp_path / 'videos'}", f"data.workers={workers}", "data.max_bad_fraction=0.0")
    code, folder = run(*overrides, "data.filter_short=true")
    out = capsys.readouterr().out
    assert code == Exit.DONE
    listed = [json.loads(line) for line in (folder / "short_files.jsonl").read_text().splitlines()]
    assert sorted(Path(entry["path"]).name for entry in listed) == [f"3-{i:02}.mp4" for i in range(12)]
    assert {entry["reason"] for entry in listed} == {"it has 3 frames, fewer than the 4 that a clip spans"}
    assert len((folder / "bad_files.jsonl").read_text().splitlines()) == 1
    named = re.findall(r"short file \S+/(3-\d\d\.mp4): it has 3 frames", out)
    assert len(named) == len(set(named)) == 10
    assert out.count("further ones are listed in") == 1
    assert out.count("short      12 of 16 videos replaced, listed in") == 1
    code, again = run(*overrides, "data.filter_short=true", "runtime.stop_at=10", folder="parts")
    assert (code, losses(again)) == (Exit.DONE, losses(folder))


def test_without_the_filter_short_videos_repeat_their_last_frame(run, cache, tmp_path, capsys):
    copy_videos(tmp_path / "videos", long=3, short=3)
    code, folder = run(f"data.path={tmp_path / 'videos'}")
    assert code == Exit.DONE
    assert not (folder / "short_files.jsonl").exists()
    assert "short" not in re.sub(re.escape(str(tmp_path)), "", capsys.readouterr().out)


def test_a_continued_run_names_no_short_video_again(run, cache, tmp_path, capsys):
    copy_videos(tmp_path / "videos", long=2, short=2)
    overrides = (f"data.path={tmp_path / 'videos'}", "data.filter_short=true")
    run(*overrides, "runtime.stop_at=6")
    assert capsys.readouterr().out.count("short file ") == 2
    _, folder = run(*overrides)
    out = capsys.readouterr().out
    assert "short file " not in out
    assert "short      2 of 4 videos replaced" in out
    assert np.isfinite(column(folder, "loss")).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_without_a_long_enough_video_ends_with_one_sentence(run, cache, tmp_path, capsys, workers):
    copy_videos(tmp_path / "videos", long=3, short=3, bad=1)
    code, _ = run(
        f"data.path={tmp_path / 'videos'}", "data.filter_short=true", "data.stride=3", f"data.workers={workers}"
    )
    assert code == Exit.TOO_MANY_BAD_FILES
    lines = [line for line in capsys.readouterr().out.splitlines() if "stopped" in line]
    assert len(lines) == 1
    assert "none of the 7 files is long enough for data.filter_short: 6 are too short, " in lines[0]
