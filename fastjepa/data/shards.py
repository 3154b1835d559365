"""Tar shards: videos and images are read inside the archive, at their place, and never written anywhere.

A member is named `/path/shard-000.tar::clips/a.mp4`: the path up to the first `.tar::`, then the name in the archive as
it stands there, which is never taken for a path. Only plain files count (no links, folders, sparse files), and of
several with one name the last, as when tar extracts them. The archive must not be compressed, as a compressed one
cannot be read at a place.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from fastjepa.data.decode import NOT_REACHED, VideoError, check_file
from fastjepa.data.tables import opened_shard, table

SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
READ_AHEAD = 1 << 18

_MARK = re.compile(r"(?<=\.tar)::", re.IGNORECASE)


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


def member_status(name: str) -> tuple[int, int]:
    """(size of the member, mtime_ns of its shard). Errors: VideoError."""
    shard, _ = split_name(name)
    return _place(name)[1], check_file(shard).st_mtime_ns


@contextmanager
def opened_member(name: str) -> Iterator[BinaryIO]:
    """The content of a member, as a file that can be read and sought in. Errors: VideoError, while reading too."""
    offset, size = _place(name)
    with opened_shard(split_name(name)[0]) as file:
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
