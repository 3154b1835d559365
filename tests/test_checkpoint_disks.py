"""Real file systems that are full or may not be written to: the last good checkpoint stays, saving goes on later."""

import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fastjepa.checkpoint import NotDamaged, SaveFailed, Saver, newest, save, write
from tests.checkpoints import TRAINER, names, quiet, seed_found, tensors

NOT_ALLOWED = "mounting is not allowed here"


def mount(*arguments: str) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
        pytest.skip(NOT_ALLOWED)


@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory of 64 KiB: six checkpoints of `tensors` or so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid():
        pytest.skip(NOT_ALLOWED)
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Use up all but `leave` bytes of a disk."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return filler


WAYS = ("here", "in a thread")


def failure(way: str, root: Path, step: int) -> str | None:
    """The sentence of a save that fails, None of one that succeeds."""
    if way == "in a thread":
        saver = Saver(root, keep=2, keep_every=0, say=quiet)
        saver.begin(step, tensors(step), TRAINER)
        return saver.wait().error
    try:
        save(root, step, tensors(step), TRAINER, 2, quiet)
    except SaveFailed as error:
        return str(error)
    return None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("leave", [0, 4096, 12288])
@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not asked"])
def test_a_full_disk_costs_the_save_only_and_saving_goes_on_once_there_is_room(
    small_disk, monkeypatch, leave, way, asked
):
    """Asked for its free space the disk says no at once; otherwise it is full in the middle of a file."""
    root = small_disk / "checkpoints"
    for step in (1, 2):
        assert failure(way, root, step) is None
    filler = fill(small_disk, leave)
    with monkeypatch.context() as patch:
        if not asked:
            patch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10**12))
        for _ in range(3):
            sentence = failure(way, root, 3)
            assert sentence is not None
            assert sentence.startswith(f"the checkpoint of step 3 could not be written to {root}: ")
            assert "\n" not in sentence
            assert names(root) == ["latest", "step-0000001", "step-0000002"]
            assert seed_found(root) == 2
    if asked and leave < 4096:
        assert "are free" in sentence
    if not asked:
        assert "No space left on device" in sentence
    filler.unlink()
    assert failure(way, root, 4) is None
    assert seed_found(root) == 4


def test_a_save_that_cannot_fit_is_not_begun_and_says_the_sizes(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(3_100_000_000))
    monkeypatch.setattr(write, "_write_tensors", lambda *arguments: pytest.fail("it was begun"))
    large = {"a": torch.empty(2_600_000_000, dtype=torch.float32, device="meta")}
    monkeypatch.setattr(write, "local", lambda tensor: tensor)
    with pytest.raises(SaveFailed) as caught:
        save(tmp_path, 7, large, {}, 2, quiet)
    assert str(caught.value) == (
        f"the checkpoint of step 7 could not be written to {tmp_path}: it needs 10.4 GB, 3.1 GB are free"
    )
    assert names(tmp_path) == []


@pytest.fixture
def read_only(tmp_path):
    """A folder with two checkpoints, and what makes it one that cannot be written to."""
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        save(root, step, tensors(step), TRAINER, 2, quiet)
    mounted = []

    def make() -> Path:
        if os.geteuid():
            root.chmod(0o500)
        else:  # root may write wherever the file system lets it
            mount("--bind", str(root), str(root))
            mounted.append(root)
            mount("-o", "remount,ro,bind", str(root))
        return root

    yield make
    root.chmod(0o700) if os.geteuid() else [subprocess.run(["umount", str(path)], check=True) for path in mounted]


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_that_may_not_be_written_to_keeps_its_checkpoints(read_only, way):
    root = read_only()
    sentence = failure(way, root, 3)
    assert sentence.startswith(f"the checkpoint of step 3 could not be written to {root}: ")
    assert "Read-only file system" in sentence or "Permission denied" in sentence
    assert names(root) == ["latest", "step-0000001", "step-0000002"]
    assert seed_found(root) == 2


def test_a_damaged_one_that_cannot_be_put_aside_is_a_sentence(tmp_path, read_only):
    (tmp_path / "checkpoints" / "step-0000002" / "manifest.json").unlink()
    root = read_only()
    with pytest.raises(NotDamaged) as caught:
        newest(root, quiet)
    assert str(caught.value).startswith(
        "checkpoint step-0000002 is damaged (it has no manifest.json), and cannot be put aside: "
    )
    assert "\n" not in str(caught.value)
