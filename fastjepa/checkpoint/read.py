"""Finding the newest intact checkpoint, and loading it. Nothing in a file is executed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fastjepa.checkpoint import files
from fastjepa.checkpoint.errors import UNREADABLE, CheckpointError, NotDamaged, cause, one_line
from fastjepa.checkpoint.ranks import Ranks

FORMAT = 1
Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files agree with its manifest."""

    folder: Path
    step: int
    trainer: dict[str, Any]


def newest(root: Path, say: Say, group: dist.ProcessGroup | None = None) -> Found | None:
    """The newest intact checkpoint, or None where there has never been one.

    Damaged ones are renamed to corrupt-... with one line of reason. `group` (gloo): all of its processes call this; the
    first looks, and every one has its answer.

    Errors: CheckpointError where there are checkpoints but none is intact: a run is never silently started again from
    nothing. NotDamaged where the newest one has another format or cannot be read at the moment.
    """

    def look() -> tuple[str, int, dict[str, Any]] | None:
        found = _newest(root, say)
        return None if found is None else (found.folder.name, found.step, found.trainer)

    seen = Ranks(group).first(look)
    return None if seen is None else Found(root / seen[0], seen[1], seen[2])


def _newest(root: Path, say: Say) -> Found | None:
    files.put_back(root)
    for folder in files.folders(root):
        try:
            return verify(folder)
        except NotDamaged:
            raise
        except CheckpointError as error:
            aside = folder.with_name(f"corrupt-{folder.name}")
            try:
                files.remove(aside)
                folder.rename(aside)
            except OSError as refused:
                raise NotDamaged(
                    f"checkpoint {folder.name} is damaged ({error}), and cannot be put aside: {one_line(refused)}"
                ) from refused
            say(f"warning: checkpoint {folder.name} is damaged ({error}); it was put aside as {aside.name}")
    # Those put aside by an earlier start count too: trying again must not begin from nothing either.
    damaged = len(list(root.glob("corrupt-step-*")))
    if damaged:
        raise CheckpointError(f"none of the {damaged} checkpoints in {root} is intact; start anew with resume=never")
    return None


def verify(folder: Path) -> Found:
    """Check names, sizes and checksums of one checkpoint folder. Errors: CheckpointError."""
    return _checked(folder, sums=True)


def looks_intact(folder: Path) -> bool:
    """Whether names and sizes of a checkpoint's files are those of its manifest: their content is not read."""
    try:
        _checked(folder, sums=False)
    except NotDamaged:
        return True  # nothing says that it is damaged
    except CheckpointError:
        return False
    return True


def _checked(folder: Path, *, sums: bool) -> Found:
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
            if sums and files.crc32(path) != facts["crc32"]:
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


def entries(found: Found) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a checkpoint, by name. Errors: CheckpointError where it cannot be read."""
    stored = _stored(found.folder, HuggingFaceStorageReader(str(found.folder)))
    return {name: (tuple(kept.size), kept.properties.dtype) for name, kept in stored.items()}


def _stored(folder: Path, reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    try:
        stored = reader.read_metadata().state_dict_metadata
    except UNREADABLE as error:
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {one_line(error)}") from error
    # A safetensors file holds tensors only.
    return {name: kept for name, kept in stored.items() if isinstance(kept, TensorStorageMetadata)}


def load(
    found: Found, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None, *, part: bool = False
) -> None:
    """Copy a checkpoint into live tensors, in place. Names, shapes and dtypes must be equal; a `part` may leave some.

    Of a DTensor each process reads the shards that it holds, of any other tensor everything, however the tensors were
    spread and by how many processes when they were saved. `group` (gloo): all of its processes call this.

    Errors: CheckpointError, in every process, with the differences, or where one of them sees other files than the
    first; nothing is copied then.
    """
    ranks = Ranks(group)
    reader = HuggingFaceStorageReader(str(found.folder))
    sums = ranks.each(lambda: _fits(found.folder, reader, tensors, ranks, part))
    if len(set(sums)) > 1:
        raise CheckpointError(f"{found.folder} is not the same for all processes: they need one file system")
    ranks.each(lambda: _read(found.folder, reader, tensors))


def _fits(folder: Path, reader: HuggingFaceStorageReader, tensors: dict[str, Tensor], ranks: Ranks, part: bool) -> int:
    """The checksum of the manifest that this process sees. Errors: CheckpointError where `load` cannot go on."""
    try:
        if ranks.rank and not looks_intact(folder):  # the first one has looked closely
            raise CheckpointError(f"process {ranks.rank} does not see all of {folder}: they need one file system")
    except UNREADABLE as error:
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {one_line(error)}") from error
    stored = _stored(folder, reader)
    problems = [f"{name} is missing" for name in sorted(tensors.keys() - stored.keys())]
    if not part:
        problems += [f"{name} is not expected" for name in sorted(stored.keys() - tensors.keys())]
    for name in sorted(tensors.keys() & stored.keys()):
        kept = stored[name]
        have = (tuple(kept.size), kept.properties.dtype)
        want = (tuple(tensors[name].shape), tensors[name].dtype)
        if have != want:
            problems.append(f"{name} is {have[1]} {list(have[0])} instead of {want[1]} {list(want[0])}")
        elif sum(prod(chunk.sizes) for chunk in kept.chunks) != prod(kept.size):
            problems.append(f"{name} has a part missing or a part twice")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{folder} does not fit the model: {'; '.join(problems[:3])}{more}")
    return files.crc32(folder / "manifest.json") if ranks.size > 1 else 0


def _read(folder: Path, reader: HuggingFaceStorageReader, tensors: dict[str, Tensor]) -> None:
    files.expect_one_process()
    try:
        # Every process plans for itself: nothing has to be asked of the others, and nothing pickled for them.
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} cannot be read: {cause(error)}") from error


def _differences(present: set[str], listed: set[str]) -> str:
    parts = [f"missing {', '.join(sorted(listed - present))}" * bool(listed - present)]
    parts += [f"unlisted {', '.join(sorted(present - listed))}" * bool(present - listed)]
    return "; ".join(p for p in parts if p) or "no trainer.json"
