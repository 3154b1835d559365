"""Tar archives for tests."""

import io
import tarfile
from pathlib import Path


def pack(path: Path, files, kind=tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, bytes) pairs, or of TarInfo objects without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for one in files:
            if isinstance(one, tarfile.TarInfo):
                tar.addfile(one)
                continue
            info = tarfile.TarInfo(one[0])
            info.size = len(one[1])
            tar.addfile(info, io.BytesIO(one[1]))
    return path
