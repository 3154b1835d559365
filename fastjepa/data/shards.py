"""Tar shards: videos and images are read inside the archive, at their place, and never written anywhere.

A member is named `/path/shard-000.tar::clips/a.mp4`: the path up to the first `.tar::`, then the name in the archive as
it stands there, which is never taken for a path. Only plain files count (no links, folders, sparse files), and of
several with one name the last, as when tar extracts them. The archive must not be compressed, as a compressed one
cannot be read at a place.

The table of a shard is found by walking over its headers, once: it is kept in the user's cache.
"""

import hashlib
import io
import json
import os
import re
import secrets
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from fastjepa.data.decode import NO_PERMISSION, NOT_REACHED, VideoError, check_file
from fastjepa.data.synthetic import default_cache

SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
VERSION = 1
TABLES_KEPT = 128  # in memory: a pass reads a few shards at a time
READ_AHEAD = 1 << 18
LONGEST_LABEL = 1 << 20
BLOCK = 512  # of a tar

_MARK = re.compile(r"(?<=\.tar)::", re.IGNORECASE)


@dataclass
class Table:
    """What a shard holds: (offset, size) in bytes of every member, in the order of the archive.

    `labels` are by name without extension (see `label`). `reason`: why there may be more than was found, else
    None. `unsaved`: why the table could not be kept.
    """

    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    unsaved: str | None = None

    def label(self, member: str) -> str | None:
        """That of the file beside it with the same name up to its last dot, or as in WebDataset to its first."""
        return self.labels.get(os.path.splitext(member)[0], self.labels.get(_key(member)))


def split_name(name: str) -> tuple[str, str]:
    """(path of the shard, name of the member); (name, "") for what is no member."""
    found = _MARK.search(name)
    return (name[: found.start()], name[found.end() :]) if found else (name, "")


def on_path(change: Callable[[str], str], name: str) -> str:
    """A name whose path is changed: of a member that is its shard's, whatever dots and slashes follow it."""
    shard, member = split_name(name)
    return f"{change(shard)}::{member}" if member else change(name)


def is_shard(name: str) -> bool:
    """Does the name end like that of a shard?"""
    return name.lower().endswith(SUFFIX)


def table(shard: str) -> Table:
    """The table of a shard: from memory, from the cache, or by walking over the archive. Errors: VideoError."""
    status = check_file(shard)
    return _table(os.path.abspath(shard), status.st_size, status.st_mtime_ns)


def member_status(name: str) -> tuple[int, int]:
    """(size of the member, mtime_ns of its shard). Errors: VideoError."""
    shard, _ = split_name(name)
    return _place(name)[1], check_file(shard).st_mtime_ns


@contextmanager
def opened_member(name: str) -> Iterator[BinaryIO]:
    """The content of a member, as a file that can be read and sought in. Errors: VideoError, while reading too."""
    offset, size = _place(name)
    with _opened(split_name(name)[0]) as file:
        yield io.BufferedReader(_Part(file.fileno(), offset, size, name), READ_AHEAD)


def _place(name: str) -> tuple[int, int]:
    shard, member = split_name(name)
    try:
        place = table(shard).members.get(member)
    except VideoError as error:
        raise VideoError(f"{error} (its shard)", name) from error
    if place is None:
        raise VideoError("its shard has no such member", name)
    if place[1] == 0:
        raise VideoError("the file is empty", name)
    return place


class _Part(io.RawIOBase):
    """`size` bytes at `offset` of an open file, whose own position does not move."""

    def __init__(self, descriptor: int, offset: int, size: int, name: str) -> None:
        self.descriptor, self.offset, self.size, self.path = descriptor, offset, size, name
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        wanted = min(len(buffer), max(0, self.size - self.position))
        try:
            content = os.pread(self.descriptor, wanted, self.offset + self.position)
        except OSError as error:
            raise VideoError(f"{NOT_REACHED}: {error.strerror} (its shard)", self.path) from error
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


@contextmanager
def _opened(shard: str) -> Iterator[BinaryIO]:
    try:
        file = open(shard, "rb")  # noqa: SIM115
    except PermissionError as error:
        raise VideoError(NO_PERMISSION, shard) from error
    except OSError as error:
        raise VideoError(f"{NOT_REACHED}: {error.strerror}", shard) from error
    with file:
        yield file


@lru_cache(TABLES_KEPT)
def _table(shard: str, size: int, mtime_ns: int) -> Table:
    file = _table_file(shard)
    if (known := _read_table(file, shard, size, mtime_ns)) is not None:
        return known
    found = _walk(shard, size)
    try:
        _write_table(file, found, shard, size, mtime_ns)
    except OSError as error:  # what is lost is time, at the next start
        found.unsaved = error.strerror or str(error)
    return found


def _walk(shard: str, size: int) -> Table:
    """Read the headers, and of the contents only labels. Errors: VideoError for what is no tar at all."""
    found = Table()
    weak: dict[str, str] = {}  # labels of .json files: a .cls comes first
    end = 0
    with _opened(shard) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    if member.size < 0 or tar.offset <= end:
                        raise tarfile.ReadError("a negative size")  # tarfile would go round for ever
                    end = tar.offset
                    tar.members.clear()  # type: ignore[attr-defined]  # all of them would take memory
                    if not member.isreg() or member.issparse():
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("the shard ends before its last file")
                    found.members.pop(member.name, None)
                    found.members[member.name] = (member.offset_data, member.size)
                    stem, extension = os.path.splitext(member.name)
                    if extension in (".cls", ".json") and member.size <= LONGEST_LABEL:
                        label = _label(extension, os.pread(file.fileno(), member.size, member.offset_data))
                        (found.labels if extension == ".cls" else weak)[stem] = label
                # Behind a damaged header tarfile stops as if the archive ended there.
                file.seek(tar.offset)
                whole = not any(file.read(BLOCK))
        except OSError as error:
            raise VideoError(f"{NOT_REACHED}: {error.strerror}", shard) from error
        # Damaged headers end in many ways: numbers that are none, names that are no text, lengths without end.
        except (tarfile.TarError, ValueError, LookupError, ArithmeticError, EOFError, RecursionError) as error:
            whole = False
            if end == 0:
                raise VideoError(_no_tar(file), shard) from error
    if not whole:
        count = len(found.members)
        found.reason = f"the archive is damaged or breaks off: {count} whole files come before"
    found.labels = {stem: label for stem, label in (weak | found.labels).items() if label}
    return found


def _no_tar(file: BinaryIO) -> str:
    file.seek(0)
    packed = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
    if file.read(6).startswith(packed):
        return "it is a compressed archive, which cannot be read at a place: unpack it to a plain .tar"
    return "it is not a tar archive, or its header is damaged"


def _label(extension: str, content: bytes) -> str:
    """What a `.cls` file says (a number or a word), or the field `label` of a `.json`; "" where it says nothing."""
    try:
        said = content.decode() if extension == ".cls" else json.loads(content)
    except (ValueError, RecursionError):  # other things are kept under these names, too
        return ""
    if isinstance(said, dict):
        said = said.get("label")
    return str(said).strip() if isinstance(said, (str, int)) and not isinstance(said, bool) else ""


def _key(name: str) -> str:
    folder, base = os.path.split(name)
    return os.path.join(folder, base.split(".", 1)[0])


def _table_file(shard: str) -> Path:
    key = hashlib.sha256(os.fsencode(shard)).hexdigest()[:20]
    return default_cache() / "shards" / key[:2] / f"{key}.json"


def _read_table(file: Path, shard: str, size: int, mtime_ns: int) -> Table | None:
    """None where there is none, or one of another state of the shard, or something else in its place."""
    try:
        said = json.loads(file.read_bytes())
        if said["of"] != [VERSION, shard, size, mtime_ns]:
            return None
        members = {str(name): (int(offset), int(length)) for name, offset, length in said["members"]}
        labels = {str(stem): str(label) for stem, label in said["labels"].items()}
        return Table(members, labels, said["reason"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _write_table(file: Path, found: Table, shard: str, size: int, mtime_ns: int) -> None:
    """By rename, as other processes may read it. Errors: OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "of": [VERSION, shard, size, mtime_ns],
        "reason": found.reason,
        "labels": found.labels,
        "members": [(name, *place) for name, place in found.members.items()],
    }
    scratch = file.with_name(f".tmp-{secrets.token_hex(4)}-{file.name}")
    try:
        scratch.write_text(json.dumps(content), encoding="ascii")
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)
