"""Checkpoints: committed by rename, verified by checksum, resumed by default.

    checkpoints/
        step-0012000/
            shard-*.safetensors   tensors of the networks and the optimizer (torch distributed checkpoint, safetensors)
            trainer.json          step, settings, identity, versions
            manifest.json         size and CRC32 of every other file, written last
        latest                    link to the newest one
        corrupt-step-...          a damaged one, put aside with a warning

A folder counts only once it carries its final name, and its content only while it agrees with the manifest. Loading
executes no code: the tensors are safetensors, the rest is JSON.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

FORMAT = 1
# What parsing a damaged or a hostile file can raise; a RecursionError for brackets in brackets without end.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError, SafetensorError)
# A file is built in memory before it is written: small ones keep the peak low beside a model that fills the machine.
FILE_BYTES = 1 << 30
Say = Callable[[str], None]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used. The text is one sentence."""


class NotDamaged(CheckpointError):
    """A checkpoint cannot be used, but nothing says that it is damaged: it stays where it is and the run stops."""


class SaveFailed(OSError):
    """A checkpoint could not be written; the ones before it are untouched. The text is one sentence."""


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files agree with its manifest."""

    folder: Path
    step: int
    trainer: dict[str, Any]


def save(root: Path, step: int, tensors: dict[str, Tensor], trainer: dict[str, Any], keep: int, say: Say) -> Path:
    """Write one checkpoint and prune old ones to the `keep` newest. Returns its folder.

    Errors: SaveFailed where the disk is full or the folder cannot be written; nothing half-written stays.
    """
    final = root / f"step-{step:07d}"
    scratch = root / f".tmp-step-{step:07d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _tidy(root)
        scratch.mkdir()
        writer = HuggingFaceStorageWriter(str(scratch), fqn_to_index_mapping=_files(tensors), save_distributed=True)
        with _single_process():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
        (scratch / "trainer.json").write_text(json.dumps({"format": FORMAT, "step": step, **trainer}, indent=2))
        names = sorted(p.name for p in scratch.iterdir())
        manifest = {name: {"bytes": (scratch / name).stat().st_size, "crc32": _crc32(scratch / name)} for name in names}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2))
        for path in [*scratch.iterdir(), scratch]:
            _fsync(path)
        if os.path.lexists(final):
            final.rename(root / f".tmp-replaced-{final.name}")
        scratch.rename(final)
        _point_latest(root, final.name)
        _fsync(root)
        _tidy(root)
    except (OSError, CheckpointException) as error:
        with suppress(OSError):
            _tidy(root)
        raise SaveFailed(f"the checkpoint of step {step} could not be written to {root}: {_cause(error)}") from error
    _prune(root, final, keep, say)
    return final


def newest(root: Path, say: Say) -> Found | None:
    """The newest intact checkpoint, or None where there has never been one.

    Damaged ones are renamed to corrupt-... with one line of reason. Errors: CheckpointError where there are
    checkpoints but none is intact: a run is never silently started again from nothing. NotDamaged where the newest
    one has another format or cannot be read at the moment.
    """
    _put_back(root)
    for folder in _folders(root):
        try:
            return verify(folder)
        except NotDamaged:
            raise
        except CheckpointError as error:
            aside = folder.with_name(f"corrupt-{folder.name}")
            _remove(aside)
            folder.rename(aside)
            say(f"warning: checkpoint {folder.name} is damaged ({error}); it was put aside as {aside.name}")
    # Those put aside by an earlier start count too: trying again must not begin from nothing either.
    damaged = len(list(root.glob("corrupt-step-*")))
    if damaged:
        raise CheckpointError(f"none of the {damaged} checkpoints in {root} is intact; start anew with resume=never")
    return None


def verify(folder: Path) -> Found:
    """Check names, sizes and checksums of one checkpoint folder. Errors: CheckpointError."""
    try:
        if (folder / "manifest.json").is_symlink() or not (folder / "manifest.json").is_file():
            raise CheckpointError("it has no manifest.json")
        manifest = json.loads((folder / "manifest.json").read_text())
        present = {p.name for p in folder.iterdir()} - {"manifest.json"}
        if not isinstance(manifest, dict) or present != set(manifest) or "trainer.json" not in manifest:
            raise CheckpointError(f"its files are not those of its manifest: {_differences(present, set(manifest))}")
        for name, facts in manifest.items():
            path = folder / name
            if path.is_symlink() or not path.is_file():
                raise CheckpointError(f"{name} is not a regular file")
            if path.stat().st_size != facts["bytes"]:
                raise CheckpointError(f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}")
            if _crc32(path) != facts["crc32"]:
                raise CheckpointError(f"{name} does not have the checksum of its manifest")
        trainer = json.loads((folder / "trainer.json").read_text())
        if trainer["format"] != FORMAT:
            raise NotDamaged(f"{folder} has format {trainer['format']}, this version reads format {FORMAT}")
        return Found(folder, int(trainer["step"]), trainer)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{type(error).__name__}: {error}") from error
    except OSError as error:  # a disk that does not answer, a permission: it may be well again tomorrow
        raise NotDamaged(f"{folder} cannot be read: {error}") from error
    except UNREADABLE as error:
        raise CheckpointError(f"{type(error).__name__}: {error}") from error


def load(found: Found, tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint into live tensors, in place. Names, shapes and dtypes must be equal.

    Errors: CheckpointError with the differences; nothing is copied then.
    """
    try:
        reader = HuggingFaceStorageReader(str(found.folder))
        stored = reader.read_metadata().state_dict_metadata
    except UNREADABLE as error:
        raise CheckpointError(f"{found.folder} cannot be read: {type(error).__name__}: {error}") from error
    problems = [f"{name} is missing" for name in sorted(tensors.keys() - stored.keys())]
    problems += [f"{name} is not expected" for name in sorted(stored.keys() - tensors.keys())]
    for name in sorted(tensors.keys() & stored.keys()):
        have = (tuple(stored[name].size), stored[name].properties.dtype)  # type: ignore[union-attr]
        want = (tuple(tensors[name].shape), tensors[name].dtype)
        if have != want:
            problems.append(f"{name} is {have[1]} {list(have[0])} instead of {want[1]} {list(want[0])}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{found.folder} does not fit the model: {'; '.join(problems[:3])}{more}")
    try:
        with _single_process():
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{found.folder} cannot be read: {_cause(error)}") from error


@contextmanager
def _single_process() -> Iterator[None]:
    """torch warns at every save that no process group exists; with one process that is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Name -> number of the file it goes to, by size."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += tensor.nbytes
    return numbers


def _folders(root: Path) -> list[Path]:
    """What carries the name of a checkpoint, newest first."""
    if not root.is_dir():
        return []
    names = [p for p in root.iterdir() if re.fullmatch(r"step-[0-9]+", p.name)]
    return sorted(names, key=lambda p: int(p.name[5:]), reverse=True)


def _prune(root: Path, written: Path, keep: int, say: Say) -> None:
    """Remove the oldest beyond `keep`, never the one just written: nothing is known of the others."""
    for folder in [other for other in _folders(root) if other != written][keep - 1 :]:
        try:
            _remove(folder)
        except OSError as error:
            say(f"warning: the old checkpoint {folder.name} could not be removed: {error}")


def _put_back(root: Path) -> None:
    """Undo a save of the same step that was killed between its two renames."""
    for aside in root.glob(".tmp-replaced-step-*"):
        final = root / aside.name.removeprefix(".tmp-replaced-")
        if not os.path.lexists(final):
            aside.rename(final)


def _tidy(root: Path) -> None:
    """Take away what saves that did not finish have left, of whatever step."""
    _put_back(root)
    for path in root.glob(".tmp-*"):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder, a file, a link, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _point_latest(root: Path, name: str) -> None:
    link = root / ".tmp-latest"
    link.symlink_to(name)
    os.replace(link, root / "latest")


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as source:
        while block := source.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _differences(present: set[str], listed: set[str]) -> str:
    parts = [f"missing {', '.join(sorted(listed - present))}" * bool(listed - present)]
    parts += [f"unlisted {', '.join(sorted(present - listed))}" * bool(present - listed)]
    return "; ".join(p for p in parts if p) or "no trainer.json"


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        inner = next(iter(error.failures.values()), None)
        return str(inner[0] if isinstance(inner, tuple) else inner)
    return str(error)
