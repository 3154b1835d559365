"""What is handed over is written under another name and renamed: a reader never sees half of it."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastjepa.interop.weights import WeightsRefused


@contextmanager
def committed(out: Path) -> Iterator[Path]:
    """A path beside `out`, for a file or a folder, that takes its name at the end, and is gone after an error.

    Errors: WeightsRefused where `out` exists, be it for an empty folder; OSError.
    """
    refuse_taken(out)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = out.absolute().with_name(f".tmp-{secrets.token_hex(4)}-{out.name}")
    try:
        yield scratch
        inside = sorted(scratch.iterdir()) if scratch.is_dir() else []
        for path in (*inside, scratch):
            _fsync(path)
        refuse_taken(out)
        if out.is_dir():
            out.rmdir()
        os.rename(scratch, out)
        _fsync(out.absolute().parent)
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def refuse_taken(out: Path) -> None:
    """Errors: WeightsRefused where something is there already that is not an empty folder."""
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if os.path.lexists(out):
        raise WeightsRefused(f"{out} is there already, and nothing is overwritten: name another place, or remove it")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
