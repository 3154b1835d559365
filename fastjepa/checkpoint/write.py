"""Saving: written under another name, put on the disk, then renamed."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter

from fastjepa.checkpoint import files
from fastjepa.checkpoint.alone import single_process
from fastjepa.checkpoint.errors import SaveFailed, cause
from fastjepa.checkpoint.read import FORMAT

# A file is built in memory before it is written: small ones keep the peak low beside a model that fills the machine.
FILE_BYTES = 1 << 30
Say = Callable[[str], None]


def save(root: Path, step: int, tensors: dict[str, Tensor], trainer: dict[str, Any], keep: int, say: Say) -> Path:
    """Write one checkpoint and prune old ones to the `keep` newest. Returns its folder.

    Errors: SaveFailed where the disk is full or the folder cannot be written; nothing half-written stays.
    """
    final = root / f"step-{step:07d}"
    scratch = root / f".tmp-step-{step:07d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        files.tidy(root)
        scratch.mkdir()
        writer = HuggingFaceStorageWriter(str(scratch), fqn_to_index_mapping=_files(tensors), save_distributed=True)
        with single_process():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
        (scratch / "trainer.json").write_text(json.dumps({"format": FORMAT, "step": step, **trainer}, indent=2))
        names = sorted(p.name for p in scratch.iterdir())
        manifest = {
            name: {"bytes": (scratch / name).stat().st_size, "crc32": files.crc32(scratch / name)} for name in names
        }
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2))
        for path in [*scratch.iterdir(), scratch]:
            files.fsync(path)
        if os.path.lexists(final):
            final.rename(root / f".tmp-replaced-{final.name}")
        scratch.rename(final)
        files.point_latest(root, final.name)
        files.fsync(root)
        files.tidy(root)
    except (OSError, CheckpointException) as error:
        with suppress(OSError):
            files.tidy(root)
        raise SaveFailed(f"the checkpoint of step {step} could not be written to {root}: {cause(error)}") from error
    _prune(root, final, keep, say)
    return final


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Name -> number of the file it goes to, by size."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += tensor.nbytes
    return numbers


def _prune(root: Path, written: Path, keep: int, say: Say) -> None:
    """Remove the oldest beyond `keep`, never the one just written: nothing is known of the others."""
    for folder in [other for other in files.folders(root) if other != written][keep - 1 :]:
        try:
            files.remove(folder)
        except OSError as error:
            say(f"warning: the old checkpoint {folder.name} could not be removed: {error}")
