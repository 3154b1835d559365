"""Finding the newest intact checkpoint, and loading it. Nothing in a file is executed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader

from fastjepa.checkpoint import files
from fastjepa.checkpoint.alone import single_process
from fastjepa.checkpoint.errors import UNREADABLE, CheckpointError, NotDamaged, cause

FORMAT = 1
Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files agree with its manifest."""

    folder: Path
    step: int
    trainer: dict[str, Any]


def newest(root: Path, say: Say) -> Found | None:
    """The newest intact checkpoint, or None where there has never been one.

    Damaged ones are renamed to corrupt-... with one line of reason. Errors: CheckpointError where there are
    checkpoints but none is intact: a run is never silently started again from nothing. NotDamaged where the newest
    one has another format or cannot be read at the moment.
    """
    files.put_back(root)
    for folder in files.folders(root):
        try:
            return verify(folder)
        except NotDamaged:
            raise
        except CheckpointError as error:
            aside = folder.with_name(f"corrupt-{folder.name}")
            files.remove(aside)
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
            if files.crc32(path) != facts["crc32"]:
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
        with single_process():
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{found.folder} cannot be read: {cause(error)}") from error


def _differences(present: set[str], listed: set[str]) -> str:
    parts = [f"missing {', '.join(sorted(listed - present))}" * bool(listed - present)]
    parts += [f"unlisted {', '.join(sorted(present - listed))}" * bool(present - listed)]
    return "; ".join(p for p in parts if p) or "no trainer.json"
