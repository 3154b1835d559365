"""The file that keeps what is known of every video of a collection, a line of JSON each.

```
{"format": "fastjepa video index", "version": 2, "path": ..., "av": ..., "entries": 2}
{"path": "/videos/a.mp4", "size": 81920, "mtime_ns": 17..., "frames": 250, "width": 340, ..., "decoders": ["pyav"]}
{"path": "/videos/b.mp4", "size": 2048, "mtime_ns": 17..., "reason": "it has no video stream"}
```

Names are any bytes that the file system allows: what is no UTF-8 is written as escaped surrogates, as Python reads it.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

from fastjepa.data.source import SYNTHETIC
from fastjepa.data.synthetic import default_cache

FORMAT, VERSION = "fastjepa video index", 2
LONGEST_HEADER = 100_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One file. With a `reason` it cannot be read, and all after it is empty.

    `size` (bytes) and `mtime_ns` tell whether a file is the same. width, height: as displayed; rate: frames/s, average;
    duration: s; gop: mean distance of key frames, in frames; seekable: frames are reached by their time, not from the
    start; decoders: those that can take it, of `pyav` (for all that is read without DALI, images too), `dali_gpu` and
    `dali_cpu`; still: a single image.
    """

    path: str
    size: int
    mtime_ns: int
    reason: str | None = None
    frames: int = 0
    width: int = 0
    height: int = 0
    rate: Fraction | None = None
    duration: float | None = None
    codec: str = ""
    pixel_format: str = ""
    rotation: int = 0
    gop: float = 0.0
    seekable: bool = False
    decoders: tuple[str, ...] = ()
    still: bool = False


class NotAnIndex(ValueError):
    """A file that something else has written. The text is one sentence."""


def default_file(path: str) -> Path:
    """Where the index of a collection lies: in the cache folder of the user, by the path it really has."""
    real = path if path.startswith(SYNTHETIC) else os.path.realpath(os.path.expanduser(path))
    key = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
    name = re.sub(r"[^\w.-]+", "_", os.path.basename(real), flags=re.ASCII)[:40].strip("._")
    return default_cache() / "index" / f"{name or 'videos'}-{key}.jsonl"


def read_index(file: Path) -> tuple[dict[str, Entry], bool]:
    """(entries by path, whether the PyAV of today wrote them).

    Errors: NotAnIndex; ValueError where it is damaged or of another version; OSError.
    """
    entries: dict[str, Entry] = {}
    with file.open("rb") as lines:
        first = lines.readline(LONGEST_HEADER)
        if not first:
            raise ValueError(f"the index {file} is empty")
        try:
            header = json.loads(first)
            known = header["format"] == FORMAT
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise NotAnIndex(f"{file} is not an index of videos")
        if header.get("version") != VERSION:
            raise ValueError(f"the index {file} has version {header.get('version')}, this program writes {VERSION}")
        for number, line in enumerate(lines, start=2):
            try:
                entry = _from_json(json.loads(line))
            except (ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError):
                raise ValueError(f"the index {file} is damaged in line {number}") from None
            entries[entry.path] = entry
    if len(entries) != header.get("entries"):
        raise ValueError(f"the index {file} is damaged: it has {len(entries)} entries of {header.get('entries')}")
    return entries, header.get("av") == metadata.version("av")


def write_index(file: Path, path: str, entries: Collection[Entry]) -> None:
    """Replace the file by rename; `path` is that of the collection. Errors: OSError."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "path": path,
        "av": metadata.version("av"),
        "entries": len(entries),
    }
    scratch = file.with_name(f".tmp-{secrets.token_hex(4)}-{file.name}")
    try:
        with scratch.open("w", encoding="ascii") as out:
            out.write(json.dumps(header) + "\n")
            out.writelines(json.dumps(_to_json(entry)) + "\n" for entry in entries)
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)


def _to_json(entry: Entry) -> dict[str, Any]:
    one: dict[str, Any] = {"path": entry.path, "size": entry.size, "mtime_ns": entry.mtime_ns}
    if entry.reason is not None:
        return one | {"reason": entry.reason}
    rate = None if entry.rate is None else [entry.rate.numerator, entry.rate.denominator]
    return one | {
        "frames": entry.frames,
        "width": entry.width,
        "height": entry.height,
        "rate": rate,
        "duration": entry.duration,
        "codec": entry.codec,
        "pixel_format": entry.pixel_format,
        "rotation": entry.rotation,
        "gop": entry.gop,
        "seekable": entry.seekable,
        "decoders": entry.decoders,
        **({"still": True} if entry.still else {}),
    }


def _from_json(one: dict[str, Any]) -> Entry:
    """Errors: ValueError, KeyError, TypeError, ZeroDivisionError for what `_to_json` has not written."""
    where = (str(one["path"]), int(one["size"]), int(one["mtime_ns"]))
    if "reason" in one:
        return Entry(*where, str(one["reason"]))
    return Entry(
        *where,
        None,
        int(one["frames"]),
        int(one["width"]),
        int(one["height"]),
        None if one["rate"] is None else Fraction(*one["rate"]),
        None if one["duration"] is None else float(one["duration"]),
        str(one["codec"]),
        str(one["pixel_format"]),
        int(one["rotation"]),
        float(one["gop"]),
        bool(one["seekable"]),
        tuple(one["decoders"]),
        bool(one.get("still", False)),
    )
