import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from fastjepa.data import synthetic
from fastjepa.data.media import probe, read_frames
from fastjepa.data.synthetic import MOTIONS, SHAPES, MovingShapes, materialise, video_names

CLEAN = MovingShapes(videos=48, size=48, frames=10, noise=0.0)
TINY = MovingShapes(videos=6, size=32, frames=3)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def of_motion(spec: MovingShapes, motion: str) -> list[int]:
    return [i for i in range(spec.videos) if MOTIONS[spec.label(i)[1]] == motion]


def grey(spec: MovingShapes, index: int) -> np.ndarray:
    return spec.draw(index)[..., 0].astype(float) / 255 - 0.5


def shift(before: np.ndarray, after: np.ndarray, reach: int = 8) -> tuple[int, int]:
    """(dx, dy) in pixels by which `before` must move to look most like `after`."""
    size = before.shape[0]
    inner = before[reach : size - reach, reach : size - reach]
    errors = {
        (dx, dy): np.abs(after[reach + dy : size - reach + dy, reach + dx : size - reach + dx] - inner).mean()
        for dx in range(-reach, reach + 1)
        for dy in range(-reach, reach + 1)
    }
    return min(errors, key=lambda key: errors[key])


# Addresses


def test_an_address_survives_the_round_trip_and_is_normalised():
    spec = MovingShapes.from_url("synthetic://moving-shapes?frames=10&size=48&noise=0.1&videos=1920&seed=7")
    assert spec == MovingShapes(1920, 48, 10, 7, 0.1)
    assert spec.url() == "synthetic://moving-shapes?videos=1920&size=48&frames=10&seed=7&noise=0.1"
    assert MovingShapes.from_url(spec.url()) == spec
    assert MovingShapes.from_url("synthetic://moving-shapes") == MovingShapes()
    assert MovingShapes.from_url("synthetic://moving-shapes?noise=0").url() == MovingShapes(noise=0).url()


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("moving-shape", "'moving-shapes'"),
        ("moving-shapes/x?videos=3", "'moving-shapes/x'"),
        ("moving-shapes?video=3", "'video', the nearest is 'videos'"),
        ("moving-shapes?fps=3", "unknown parameter 'fps'"),
        ("moving-shapes?videos=3#seed=1", "unknown set"),
        ("moving-shapes?videos=many", "videos must be a whole number, got 'many'"),
        ("moving-shapes?videos=", "videos must be a whole number, got ''"),
        ("moving-shapes?frames=10.5", "frames must be a whole number"),
        ("moving-shapes?noise=loud", "noise must be a number"),
        ("moving-shapes?noise=nan", "noise must lie in 0.0..0.5"),
        ("moving-shapes?noise=0.6", "noise must lie in 0.0..0.5, got 0.6"),
        ("moving-shapes?size=49", "size must be even"),
        ("moving-shapes?size=30", "size must lie in 32..1024"),
        ("moving-shapes?size=1026", "size must lie in 32..1024"),
        ("moving-shapes?frames=0", "frames must lie in 1..1024"),
        ("moving-shapes?videos=0", "videos must lie in 1..1000000"),
        ("moving-shapes?videos=1000001", "videos must lie in"),
        ("moving-shapes?seed=-1", "seed must lie in"),
        ("moving-shapes?seed=1&seed=2", "seed is given twice"),
    ],
)
def test_each_mistake_in_an_address_is_one_sentence(rest: str, expected: str):
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        MovingShapes.from_url("synthetic://" + rest)
    assert "\n" not in str(caught.value)


def test_another_scheme_and_wrong_types_are_refused():
    with pytest.raises(ValueError, match="expected synthetic://moving-shapes"):
        MovingShapes.from_url("/data/videos")
    for wrong in ({"videos": True}, {"size": 48.0}, {"noise": "0.2"}):
        with pytest.raises(ValueError, match="must be a"):
            MovingShapes(**wrong)


# Labels


def test_labels_are_balanced_and_mixed():
    spec = MovingShapes(videos=480)
    pairs = [spec.label(i) for i in range(480)]
    for block in range(0, 480, 48):
        assert len(set(pairs[block : block + 48])) == len(SHAPES) * len(MOTIONS)
    for prefix in range(8, 480, 8):
        shapes, motions = np.array(pairs[:prefix]).T
        assert np.ptp(np.bincount(motions, minlength=8)) == 0
        assert np.ptp(np.bincount(shapes, minlength=6)) <= 1
    every_fourth = np.bincount([motion for _, motion in pairs[::4]], minlength=8)
    assert every_fourth.min() >= 5, "an evenly spaced selection must not lose a motion"


def test_labels_depend_on_seed_and_index_alone():
    small, large = MovingShapes(videos=50), MovingShapes(videos=5000, size=48, frames=10, noise=0.0)
    assert [small.label(i) for i in range(50)] == [large.label(i) for i in range(50)]
    other = replace(small, seed=1)
    assert [small.label(i) for i in range(48)] != [other.label(i) for i in range(48)]
    for outside in (-1, 50):
        with pytest.raises(IndexError):
            small.label(outside)


def test_file_names_carry_the_labels():
    names = video_names(CLEAN)
    assert names == sorted(names)
    for index, name in enumerate(names):
        shape, motion = CLEAN.label(index)
        assert name == f"{index:06d}-{SHAPES[shape]}-{MOTIONS[motion]}.mp4"


# Drawing


def test_a_video_does_not_depend_on_what_was_drawn_before():
    spec = MovingShapes(videos=5, size=48, frames=10)
    forwards = [spec.draw(i) for i in range(5)]
    backwards = [MovingShapes(videos=9, size=48, frames=10).draw(i) for i in reversed(range(5))][::-1]
    for a, b in zip(forwards, backwards):
        assert a.dtype == np.uint8
        assert a.shape == (10, 48, 48, 3)
        assert np.array_equal(a, b)
    assert not np.array_equal(forwards[0], forwards[1])
    assert not np.array_equal(forwards[0], MovingShapes(videos=5, size=48, frames=10, seed=1).draw(0))


@pytest.mark.parametrize("word", ["right", "left", "up", "down"])
def test_translation_has_the_stated_direction_and_speed(word: str):
    direction = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}[word]
    spec, apart = replace(CLEAN, size=96), 3  # whole pixels at twice the size, three frames apart: known to 1/12
    for index in of_motion(spec, word):
        video = grey(spec, index)
        for first in (0, 6):
            moved = np.array(shift(video[first], video[first + apart], reach=24)) / (2 * apart)
            assert 2.4 * np.cos(0.25) - 0.1 < moved @ direction < 3.6 + 0.1
            assert abs(moved @ direction[::-1]) < 3.6 * np.sin(0.25) + 0.1


def test_a_still_video_does_not_move():
    for index in of_motion(CLEAN, "still"):
        video = CLEAN.draw(index)
        assert (video == video[0]).all()
        assert video.std() > 20


@pytest.mark.parametrize("word", ["grow", "shrink"])
def test_growth_changes_the_covered_area_by_the_square_of_the_stated_factor(word: str):
    spec = replace(CLEAN, size=160)  # finer pixels, as anti-aliasing blurs the area of small shapes
    for index in of_motion(spec, word):
        area = (np.abs(grey(spec, index)) > 0.2).mean((1, 2))
        steps = np.diff(area if word == "grow" else -area)
        assert (steps > 0).all()
        # Copies at the frame's edge and overlaps make the ratio of the whole frame inexact.
        ratio = max(area[0], area[-1]) / min(area[0], area[-1])
        assert 1.8**2 * 0.7 < ratio < 2.3**2 * 1.3


def test_rotation_changes_pixels_and_keeps_the_covered_area():
    for index in of_motion(CLEAN, "rotate"):
        video = grey(CLEAN, index)
        area = np.abs(video).mean((1, 2))
        assert np.ptp(area) < 0.12 * area.mean()
        assert np.abs(video[-1] - video[0]).mean() > 0.03
        assert np.median([shift(a, b) for a, b in pairwise(video)], axis=0).tolist() == [0, 0]


@pytest.mark.parametrize(("size", "frames"), [(160, 64), (32, 2), (64, 200)])
def test_other_sizes_and_lengths_show_the_same_motion(size: int, frames: int):
    """A size scales the picture; a longer video spreads the motion of ten recipe frames over its length."""
    spec = replace(CLEAN, size=size, frames=frames)
    index = of_motion(spec, "right")[0]
    video, small = grey(spec, index), grey(CLEAN, index)
    assert abs(np.abs(video[0]).mean() - np.abs(small[0]).mean()) < 0.02
    scale, step = size / 48, max(1, frames // 10)
    moved = shift(video[0], video[step], reach=int(8 * scale))[0] / scale / (step * min(1, 10 / frames))
    assert 2.4 * np.cos(0.25) - 0.8 < moved < 3.6 + 0.8


def test_noise_is_fresh_in_each_frame_and_has_the_stated_strength():
    index = of_motion(CLEAN, "still")[0]
    noise = grey(replace(CLEAN, noise=0.1), index) - grey(CLEAN, index)
    background = np.abs(grey(CLEAN, index)[0]) < 0.01  # elsewhere white and black are clipped
    assert noise[:, background].std() == pytest.approx(0.1, rel=0.03)
    assert abs(np.corrcoef(noise[0][background], noise[1][background])[0, 1]) < 0.1


def test_every_shape_differs_and_is_half_white_half_black():
    coverage = {}
    for name in SHAPES:
        y, x = (np.mgrid[:201, :201] - 100.0).astype(np.float32) / 100 * 1.2
        coverage[name] = float((synthetic._distance(name, x, y, np.float32(1)) < 0).mean()) * 2.4**2
        edge = np.hypot(x, y)[synthetic._distance(name, x, y, np.float32(1)) < 0].max()
        assert 0.97 < edge < 1.01, "each shape touches the circle of its radius and stays inside"
    areas = {"disc": np.pi, "square": 2.0, "triangle": 27**0.5 / 4, "ring": np.pi * 0.75, "plus": 2.16, "star": 1.47}
    assert coverage == pytest.approx(areas, rel=0.03)
    video = grey(replace(CLEAN, size=160), of_motion(CLEAN, "still")[0])
    assert video.max() == pytest.approx(0.45, abs=0.01)
    assert video.min() == pytest.approx(-0.45, abs=0.01)


# Files


def test_files_have_the_stated_format_and_are_close_to_the_drawing(tmp_path: Path):
    spec = MovingShapes(videos=3, size=64, frames=12)
    folder = materialise(spec, tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [*video_names(spec), "labels.json"]
    for index, name in enumerate(video_names(spec)):
        with av.open(str(folder / name)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert (stream.codec_context.pix_fmt, stream.average_rate) == ("yuv420p", 24)
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert decoded.shape == (12, 64, 64, 3)
        error = np.abs(decoded.astype(float) - spec.draw(index)).mean() / 255
        assert error < 0.2 * spec.noise
    content = json.loads((folder / "labels.json").read_text())
    assert content["files"] == video_names(spec)
    assert list(zip(content["shape"], content["motion"])) == [spec.label(i) for i in range(3)]
    assert (tuple(content["shapes"]), tuple(content["motions"])) == (SHAPES, MOTIONS)
    assert MovingShapes.from_url(content["url"]) == spec


def test_the_same_bytes_for_every_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = replace(TINY, videos=36)
    seen: list[tuple[int, int]] = []
    alone = materialise(spec, tmp_path / "one", workers=1, progress=lambda *state: seen.append(state))
    assert seen == [(i, 36) for i in range(1, 37)]
    monkeypatch.setattr(synthetic, "PROCESS_PIXELS", 1)
    seen.clear()
    shared = materialise(spec, tmp_path / "two", workers=2, progress=lambda *state: seen.append(state))
    assert seen == [(i, 36) for i in range(2, 37, 2)]
    assert hashes(alone) == hashes(shared)
    assert len(hashes(alone)) == 37
    with pytest.raises(ValueError, match="workers"):
        materialise(spec, tmp_path, workers=0)


def test_the_bytes_do_not_depend_on_what_memory_held_before(tmp_path: Path):
    """glibc fills fresh memory with a given byte here; an encoder that reads it shows itself by other files."""
    script = (
        "import sys; from pathlib import Path; from fastjepa.data.synthetic import *\n"
        "print(materialise(MovingShapes(24, 48, 10), Path(sys.argv[1]), workers=1))"
    )
    folders = []
    for filling in ("85", "170"):
        command = [sys.executable, "-c", script, str(tmp_path / filling)]
        environment = {**os.environ, "MALLOC_PERTURB_": filling}
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        folders.append(Path(run.stdout.strip()))
    assert hashes(folders[0]) == hashes(folders[1])


def test_a_complete_set_is_returned_without_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = materialise(TINY, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    monkeypatch.setattr(synthetic, "_make_videos", None)
    assert materialise(TINY, tmp_path) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_every_parameter_and_the_recipe_change_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [
        materialise(replace(TINY, **change), tmp_path)
        for change in ({}, {"videos": 5}, {"size": 34}, {"frames": 4}, {"seed": 1}, {"noise": 0.1})
    ]
    monkeypatch.setattr(synthetic, "RECIPE", synthetic.RECIPE + 1)
    folders.append(materialise(TINY, tmp_path))
    assert len(set(folders)) == 7
    for folder in folders:
        assert folder.parent == tmp_path / "synthetic"
        assert re.fullmatch("moving-shapes-[0-9a-f]{12}", folder.name)


def test_the_cache_follows_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert materialise(TINY).parent == tmp_path / "xdg/fastjepa/synthetic"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert materialise(TINY).parent == tmp_path / "home/.cache/fastjepa/synthetic"


@pytest.mark.parametrize("damage", ["a missing video", "an empty video", "missing labels", "broken labels"])
def test_a_damaged_set_is_made_again(tmp_path: Path, damage: str):
    folder = materialise(TINY, tmp_path)
    good = hashes(folder)
    video, labels = folder / video_names(TINY)[2], folder / "labels.json"
    match damage:
        case "a missing video":
            video.unlink()
        case "an empty video":
            video.write_bytes(b"")
        case "missing labels":
            labels.unlink()
        case "broken labels":
            labels.write_text("{")
    assert materialise(TINY, tmp_path) == folder
    assert hashes(folder) == good
    assert list(folder.parent.iterdir()) == [folder]


def test_an_interrupt_leaves_nothing(tmp_path: Path):
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise(TINY, tmp_path, progress=interrupt)
    assert list((tmp_path / "synthetic").iterdir()) == []


def test_leftovers_of_a_killed_process_are_never_used_and_go_after_a_day(tmp_path: Path):
    script = (
        "import sys, time; from pathlib import Path; from fastjepa.data.synthetic import *\n"
        "def stop(done, total):\n    print(done, flush=True)\n    if done == 3: time.sleep(60)\n"
        f"materialise({TINY!r}, Path(sys.argv[1]), progress=stop)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() not in (b"3", b""):
            pass
        process.send_signal(signal.SIGKILL)
    (left,) = (tmp_path / "synthetic").iterdir()
    assert left.name.startswith(".")
    assert len(list(left.iterdir())) == 3

    folder = materialise(TINY, tmp_path)
    assert len(list(folder.iterdir())) == 7
    assert left.exists(), "it could belong to a living process"

    os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    (folder / "labels.json").unlink()
    materialise(TINY, tmp_path)
    assert list(folder.parent.iterdir()) == [folder]


def test_two_processes_making_the_same_set_both_end_well(tmp_path: Path):
    script = (
        "import sys; from pathlib import Path; from fastjepa.data.synthetic import *\n"
        "def wait(done, total):\n    if done == 6: print('ready', flush=True); sys.stdin.readline()\n"
        f"print(materialise({TINY!r}, Path(sys.argv[1]), progress=wait))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:  # each has all its videos before either gives its folder the final name
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    ends = [process.communicate("\n", timeout=60)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    folder = materialise(TINY, tmp_path, progress=lambda *_: pytest.fail("made again"))
    assert ends == [str(folder)] * 2
    assert list(folder.parent.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_is_named_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="XDG_CACHE_HOME") as caught:
        materialise(TINY, tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device\); free space there or set XDG_CACHE_HOME") as caught:
        materialise(TINY, tmp_path)
    assert caught.value.errno == 28
    assert list((tmp_path / "synthetic").iterdir()) == []


def test_importing_does_no_work_and_needs_no_torch():
    script = "import sys, fastjepa.data.synthetic; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_sets_of_one_frame_are_still_images_with_the_drawn_pixels_and_are_kept(tmp_path):
    spec = MovingShapes(videos=9, size=48, frames=1)
    folder = materialise(spec, tmp_path, workers=1)
    names = video_names(spec)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "labels.json"])
    assert all(name.endswith(".png") for name in names)
    for index, name in enumerate(names):
        info = probe(str(folder / name))
        assert info.still
        assert (read_frames(info, np.zeros(1, np.int64))[0] == spec.draw(index)[0]).all()
    written = {name: (folder / name).stat().st_mtime_ns for name in names}
    assert materialise(spec, tmp_path, workers=1) == folder
    assert written == {name: (folder / name).stat().st_mtime_ns for name in names}
    (folder / names[3]).unlink()
    materialise(spec, tmp_path, workers=1)
    assert (folder / names[3]).is_file()
