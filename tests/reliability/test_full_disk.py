"""C8: a disk that is full or read-only for a while costs checkpoints, never the last good one, and not the run."""

import os
import subprocess
from contextlib import contextmanager

import pytest

from fastjepa import checkpoint
from fastjepa.exits import Exit
from tests.reliability.harness import assert_none_lost

STEPS = 16
SETTINGS = (f"optim.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=2")
BEGUN = 4


def saved(lab, name):
    """The steps of the checkpoints, all of which must be intact."""
    folders = sorted((lab.path(name) / "checkpoints").glob("step-*"))
    return [checkpoint.verify(folder).step for folder in folders]


def assert_said(child, step):
    """The failure is said with its step, and nothing worse than a warning."""
    lines = [line for line in child.out.splitlines() if f"checkpoint of step {step} could not be written" in line]
    assert len(lines) == 1, child.said()
    assert lines[0].startswith("warning: ")
    assert "Traceback" not in child.said()


@contextmanager
def mounted(folder, *arguments):
    """Something mounted on this folder; skips the test where that is not allowed."""
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs root to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def begun(lab):
    """A run of some steps with checkpoints."""

    def go(name="runs"):
        lab.run(name, *SETTINGS, f"runtime.stop_at={BEGUN}")
        assert saved(lab, name) == [BEGUN - 2, BEGUN]

    return go


@pytest.mark.parametrize("limit", [20_000, 400_000])
def test_files_that_cannot_grow_cost_checkpoints_until_they_can(lab, begun, limit):
    """Logs have less than that, shards of a checkpoint have more."""
    begun()
    freed = lab.folder / "freed"
    # Saves are due at 6, 8 and 10. Where one is written beside the training, the failure of 8 may not be known by 9.
    sabotage = [["file_size", {"limit": limit, "freed": str(freed)}], ["pause", {"step": 9, "until": str(freed)}]]
    child = lab.start("runs", *SETTINGS, sabotage=sabotage)
    lab.wait_for_file(child, freed.with_suffix(".paused"))
    assert saved(lab, "runs") == [BEGUN - 2, BEGUN]
    freed.touch()
    assert child.wait() == Exit.DONE, child.said()
    assert_said(child, 6)
    assert saved(lab, "runs") == [STEPS - 2, STEPS]
    assert_none_lost(lab.rows("runs"), lab.whole(*SETTINGS))


def test_a_disk_that_stays_full_ends_the_run_and_keeps_the_last_good_checkpoint(lab, begun):
    begun()
    child = lab.run(
        "runs", *SETTINGS, code=Exit.FAILED, sabotage=[["file_size", {"limit": 20_000, "freed": "/nowhere"}]]
    )
    for step in (6, 8, 10):
        assert_said(child, step)
    assert saved(lab, "runs") == [BEGUN - 2, BEGUN]
    assert lab.status("runs")["state"] == "failed"
    lab.run("runs", *SETTINGS)
    assert_none_lost(lab.rows("runs"), lab.whole(*SETTINGS))


@pytest.mark.parametrize("left", [0, 100_000, 1_000_000])
def test_a_full_file_system_costs_checkpoints_until_there_is_room(lab, begun, left):
    runs = lab.folder / "runs"
    runs.mkdir()
    with mounted(runs, "-t", "tmpfs", "-o", "size=32m", "tmpfs"):
        begun()
        freed = lab.folder / "freed"
        pauses = [["pause", {"step": step, "until": str(freed.with_name(f"freed-{step}"))}] for step in (5, 9)]
        child = lab.start("runs", *SETTINGS, sabotage=pauses)
        lab.wait_for_file(child, freed.with_name("freed-5.paused"))
        filler = runs / "filler"
        fill(filler, left)
        freed.with_name("freed-5").touch()
        lab.wait_for_file(child, freed.with_name("freed-9.paused"))
        assert saved(lab, "runs") == [BEGUN - 2, BEGUN]
        filler.unlink()
        freed.with_name("freed-9").touch()
        assert child.wait() == Exit.DONE, child.said()
        assert_said(child, 6)
        # Rows that found no room are written once there is some.
        assert ("cannot be written: [Errno 28]" in child.out) == (left == 0)
        assert saved(lab, "runs") == [STEPS - 2, STEPS]
        assert_none_lost(lab.rows("runs"), lab.whole(*SETTINGS))


def fill(path, left):
    """A file that takes all the room but so many bytes."""
    with path.open("wb", buffering=0) as out:
        size = 1 << 20
        while size >= 4096:
            try:
                out.write(bytes(size))
            except OSError:
                size //= 2
        os.ftruncate(out.fileno(), max(0, out.tell() - left))


def test_a_folder_of_checkpoints_that_becomes_read_only_costs_checkpoints_until_it_is_not(lab, begun):
    begun()
    folder = lab.path("runs") / "checkpoints"
    marks = {step: lab.folder / f"on-{step}" for step in (5, 9)}
    pauses = [["pause", {"step": step, "until": str(mark)}] for step, mark in marks.items()]
    child = lab.start("runs", *SETTINGS, sabotage=pauses)
    lab.wait_for_file(child, lab.folder / "on-5.paused")
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        marks[5].touch()
        lab.wait_for_file(child, lab.folder / "on-9.paused")
        assert saved(lab, "runs") == [BEGUN - 2, BEGUN]
    marks[9].touch()
    assert child.wait() == Exit.DONE, child.said()
    assert_said(child, 6)
    assert "Read-only file system" in child.out
    assert saved(lab, "runs") == [STEPS - 2, STEPS]
    assert_none_lost(lab.rows("runs"), lab.whole(*SETTINGS))


def test_a_run_folder_that_cannot_be_written_is_refused_in_one_sentence(lab):
    root = lab.folder / "runs"
    root.mkdir()
    with mounted(root, "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs"):
        child = lab.run("runs", code=Exit.WRONG_INPUT)
        assert child.err.count("\n") == 1
        assert "Read-only file system" in child.err
        assert str(root) in child.err
