"""The folder of a run's checkpoints: names, leftovers, checksums."""

import os
import re
import shutil
import warnings
import zlib
from pathlib import Path


def folders(root: Path) -> list[Path]:
    """What carries the name of a checkpoint, newest first."""
    if not root.is_dir():
        return []
    names = [p for p in root.iterdir() if re.fullmatch(r"step-[0-9]+", p.name)]
    return sorted(names, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def facts(path: Path) -> dict[str, int]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "crc32": crc32(path)}


def put_back(root: Path) -> None:
    """Undo a save of the same step that was killed between its two renames."""
    for aside in root.glob(".tmp-replaced-step-*"):
        final = root / aside.name.removeprefix(".tmp-replaced-")
        if not os.path.lexists(final):
            aside.rename(final)


def tidy(root: Path) -> None:
    """Take away what saves that did not finish have left, of whatever step."""
    put_back(root)
    for path in root.glob(".tmp-*"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a folder, a file, a link, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def point_latest(root: Path, name: str) -> None:
    """Let `latest` be a link to the checkpoint of this name."""
    link = root / ".tmp-latest"
    link.symlink_to(name)
    os.replace(link, root / "latest")


def crc32(path: Path) -> int:
    """The checksum of a file."""
    value = 0
    with path.open("rb") as source:
        while block := source.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def fsync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def expect_one_process() -> None:
    """torch warns at every save and load that no process group exists; with one process that is what is meant.

    For good: filters cannot be put back safely in a thread.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
