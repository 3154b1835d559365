"""The table of a tar shard: where its members lie, and which labels stand beside them.

It is found by walking over the headers, once: tables are kept in the user's cache, by path, size and time of the shard.
"""

import hashlib
import json
import os
import secrets
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from fastjepa.data.decode import NO_PERMISSION, NOT_REACHED, VideoError, check_file
from fastjepa.data.synthetic import default_cache

VERSION = 1
TABLES_KEPT = 128  # in memory: a pass reads a few shards at a time
LONGEST_LABEL = 1 << 20
BLOCK = 512  # of a tar


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


def table(shard: str) -> Table:
    """The table of a shard: from memory, from the cache, or by walking over the archive. Errors: VideoError."""
    status = check_file(shard)
    return _table(os.path.abspath(shard), status.st_size, status.st_mtime_ns)


@contextmanager
def opened_shard(shard: str) -> Iterator[BinaryIO]:
    """The archive itself. Errors: VideoError."""
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
    with opened_shard(shard) as file:
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
