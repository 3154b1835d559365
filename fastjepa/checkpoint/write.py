"""Saving: written under another name, put on the disk, then renamed."""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from fastjepa.checkpoint import files
from fastjepa.checkpoint.errors import UNWRITABLE, SaveFailed, cause
from fastjepa.checkpoint.ranks import Ranks
from fastjepa.checkpoint.read import FORMAT, looks_intact
from fastjepa.checkpoint.snapshot import local

# What a process puts into a file, unless one tensor is more. A save that is waited for holds as much of a device's
# tensors on the host.
FILE_BYTES = 1 << 30
# A folder that one machine has made is seen by the others after a while only, where a network lies between.
SECONDS_TO_SEE = 5.0
Say = Callable[[str], None]
T = TypeVar("T")


def save(
    root: Path,
    step: int,
    tensors: dict[str, Tensor],
    trainer: dict[str, Any],
    keep: int,
    say: Say,
    *,
    keep_every: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write one checkpoint and prune old ones to the `keep` newest. Returns its folder.

    `keep_every`: checkpoints whose step is a multiple of it are kept for ever and not counted (0: none). `trainer` is
    plain JSON. `group` (gloo): all of its processes call this, with the same names. DTensors are written by those that
    hold their shards; any other tensor is the same in all processes and written once, by one of them. They share a
    file system. `trainer` and `say` are the first process's.

    Errors: SaveFailed, in every process, where one has a full disk, cannot write to the folder or does not see it;
    nothing half-written stays.
    """
    return write(
        root, step, tensors, trainer, keep=keep, keep_every=keep_every, say=say, group=group,
        values=lambda: {name: local(tensor).contiguous() for name, tensor in tensors.items()},
    )  # fmt: skip


@torch.no_grad()
def write(
    root: Path,
    step: int,
    tensors: dict[str, Tensor],
    trainer: dict[str, Any],
    *,
    keep: int,
    keep_every: int,
    say: Say,
    group: dist.ProcessGroup | None,
    values: Callable[[], dict[str, Tensor]],
) -> Path:
    """`save` with the values of `values()`, which gives what this process holds of each tensor, contiguous.

    Of `tensors` themselves only shapes, dtypes and shards are looked at.
    """
    ranks, final, parts = Ranks(group), root / f"step-{step:07d}", {}

    def told(action: Callable[[], T]) -> T:
        try:
            return action()
        except SaveFailed:
            raise
        except UNWRITABLE as error:
            raise SaveFailed(why(step, root, cause(error))) from error

    def each(action: Callable[[], T]) -> list[T]:
        return ranks.each(lambda: told(action))

    def first(action: Callable[[], T]) -> T:
        return ranks.first(lambda: told(action))

    try:
        each(lambda: parts.update(values()))
        scratch = root / first(lambda: _begin(root, step, tensors, trainer))
        each(lambda: _must_see(scratch, ranks.rank))
        each(lambda: _write_tensors(scratch, tensors, parts, ranks))
        # What a process has written itself it sees for sure.
        names = sorted({name for listed in each(lambda: os.listdir(scratch)) for name in listed})
        facts = each(lambda: {name: files.facts(scratch / name) for name in names[ranks.rank :: ranks.size]})
        first(lambda: _commit(scratch, final, {name: some[name] for some in facts for name in some}))
    except BaseException:
        if ranks.rank == 0:
            with suppress(OSError):
                files.tidy(root)
        raise
    first(lambda: _prune(root, final, keep, keep_every, say))
    return final


def why(step: int, root: Path, reason: str) -> str:
    """The sentence of a save that failed."""
    return f"the checkpoint of step {step} could not be written to {root}: {reason}"


def _begin(root: Path, step: int, tensors: dict[str, Tensor], trainer: dict[str, Any]) -> str:
    """Make the folder that is written to, with a name that no other save has had; returns the name."""
    root.mkdir(parents=True, exist_ok=True)
    files.tidy(root)
    needed, free = sum(_bytes(tensor) for tensor in tensors.values()), shutil.disk_usage(root).free
    if needed > free:
        raise SaveFailed(why(step, root, f"it needs {_size(needed)}, {_size(free)} are free"))
    scratch = root / f".tmp-step-{step:07d}-{os.urandom(4).hex()}"
    scratch.mkdir()
    (scratch / "trainer.json").write_text(json.dumps({"format": FORMAT, "step": step, **trainer}, indent=2))
    return scratch.name


def _must_see(scratch: Path, rank: int) -> None:
    end = time.monotonic() + SECONDS_TO_SEE
    while not scratch.is_dir():
        if time.monotonic() > end:
            raise OSError(f"process {rank} does not see the folder that process 0 made: they need one file system")
        time.sleep(0.05)


class _Parts(DefaultSavePlanner):
    """Plans with tensors, and writes the values that were kept of them."""

    def __init__(self, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self._parts = parts

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._parts[index.fqn]


class _Writer(HuggingFaceStorageWriter):
    """Writes with safetensors' own function, in torch's layout, so that other threads run meanwhile.

    torch's writer builds every file in memory, and holds the interpreter for as long.
    """

    def __init__(self, folder: Path, numbers: dict[str, int], rank: int) -> None:
        super().__init__(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)
        self._folder, self._numbers, self._rank = folder, numbers, rank

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        groups: dict[int, list[WriteItem]] = {}
        for item in plan.items:
            groups.setdefault(self._numbers[item.index.fqn], []).append(item)
        for number, items in groups.items():
            values, places = {}, {}
            for item in items:
                value = planner.resolve_data(item)
                assert isinstance(value, Tensor), "a state holds tensors only"
                assert item.tensor_data is not None, "a tensor has a shape"
                values[item.index.fqn] = value.cpu()
                places[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            path = self._folder / f"shard-{self._rank + 1:05d}-model-{number:05d}.safetensors"
            save_file(values, path, {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)})
            files.fsync(path)
        written: Future[list[WriteResult]] = Future()
        written.set_result([])
        return written


def _write_tensors(scratch: Path, tensors: dict[str, Tensor], parts: dict[str, Tensor], ranks: Ranks) -> None:
    planned = {name: tensor if isinstance(tensor, DTensor) else parts[name] for name, tensor in tensors.items()}
    writer = _Writer(scratch, _files(tensors, ranks.size), ranks.rank)
    files.expect_one_process()
    dcp.save(
        planned,
        storage_writer=writer,
        planner=_Parts(parts),
        process_group=ranks.group,
        no_dist=ranks.group is None,
    )


def _files(tensors: dict[str, Tensor], processes: int) -> dict[str, int]:
    """Name -> number of the file it goes to, by size: of every number each process writes one, with its share."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        if filled and filled + _bytes(tensor) > FILE_BYTES * processes:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += _bytes(tensor)
    return numbers


def _commit(scratch: Path, final: Path, manifest: dict[str, dict[str, int]]) -> None:
    root = final.parent
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True))
    for path in [*scratch.iterdir(), scratch]:
        files.fsync(path)
    if os.path.lexists(final):
        final.rename(root / f".tmp-replaced-{final.name}")
    scratch.rename(final)
    files.point_latest(root, final.name)
    files.fsync(root)
    files.tidy(root)


def _prune(root: Path, written: Path, keep: int, keep_every: int, say: Say) -> None:
    """Remove what is older than the `keep` newest, the one just written among them whatever its step.

    It is the one that is known to be intact. Milestones are left alone, and what is evidently damaged does not count.
    """
    others = [folder for folder in files.folders(root) if folder != written]
    if keep_every:
        others = [folder for folder in others if files.step_of(folder) % keep_every]
    kept = 0 if keep_every and files.step_of(written) % keep_every == 0 else 1
    for folder in others:
        if kept < keep:
            kept += looks_intact(folder)
            continue
        try:
            files.remove(folder)
        except OSError as error:
            say(f"warning: the old checkpoint {folder.name} could not be removed: {error}")


def _bytes(tensor: Tensor) -> int:
    """Of all of a tensor, wherever its shards are."""
    return tensor.numel() * tensor.element_size()


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
