"""Checkpoints of runs of this library, as weights."""

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fastjepa import checkpoint
from fastjepa.fit import NETWORKS
from fastjepa.interop.folder import CONFIG, licence_of_folder
from fastjepa.interop.generation import licence
from fastjepa.interop.meta import licence_of_file
from fastjepa.interop.weights import (
    OWN_LICENCE,
    Weights,
    WeightsRefused,
    heads_of_settings,
    nearest,
    one_line,
)

SUFFIXES = (".pth.tar", ".pth", ".pt", ".tar")
ANEW = "optimizer state (the optimizer starts anew)"


@dataclass(frozen=True, kw_only=True)
class OwnCheckpoint(Weights):
    """Weights of a run of this library; `found` is the checkpoint that they lie in, with the state of its optimizer."""

    found: checkpoint.Found


def with_optimizer(weights: Weights) -> OwnCheckpoint:
    """The same weights for a run that takes the state of the optimizer too. Errors: WeightsRefused."""
    if not isinstance(weights, OwnCheckpoint):
        raise WeightsRefused(
            f"{weights.path} has no optimizer state that a run can go on with: expected a run folder of fastjepa or "
            f"a checkpoint in one, or init.optimizer=false, given weights alone ({weights.description})"
        )
    return replace(weights, ignored=[text for text in weights.ignored if text != ANEW])


def load_own_checkpoint(path: str | Path, *, generations: int = 8) -> OwnCheckpoint:
    """The networks of a run of this library: of the newest intact checkpoint of a run folder, or of one checkpoint.

    Nothing in the folder is touched. `generations`: how far back the licence is looked for, where runs began with runs.
    Errors: WeightsRefused with one sentence.
    """
    path = Path(path).expanduser()
    found = _intact(path)
    try:
        reader = HuggingFaceStorageReader(str(found.folder))
        stored = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(facts.size, dtype=facts.properties.dtype)
            for name, facts in stored.items()
            if isinstance(facts, TensorStorageMetadata) and name.startswith(tuple(f"{n}." for n in NETWORKS))
        }
        with warnings.catch_warnings():
            # torch warns that no process group exists; with one process that is what is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except (*checkpoint.UNREADABLE, RuntimeError, CheckpointException) as error:
        raise WeightsRefused(f"{found.folder} cannot be read: {one_line(error)}") from None
    networks: dict[str, dict[str, Tensor]] = {name: {} for name in NETWORKS}
    for name, tensor in tensors.items():
        network, _, key = name.partition(".")
        networks[network][key] = tensor
    settings = found.trainer.get("settings")
    settings = {str(key): value for key, value in settings.items()} if isinstance(settings, dict) else {}
    rotary = settings.get("model.positions", "table") != "table"
    words, name = _licence(settings.get("init.from"), generations, rotary)
    return OwnCheckpoint(
        found.folder,
        f"a checkpoint of fastjepa, step {found.step}",
        networks,
        [ANEW, "step, schedules and data position (this run has its own)"],
        words,
        heads_of_settings(settings),
        settings,
        found.step,
        name,
        found=found,
    )


def _licence(began: str | None, generations: int, rotary: bool) -> tuple[str, str]:
    """(sentence, id) for a run with this `init.from`: that of its first weights, however many runs ago.

    `rotary`: of the run, and so of the weights that it could begin from.
    """
    if began is None:
        return OWN_LICENCE, ""
    path = Path(began).expanduser()
    words = f"that of what it was trained from ({path.name})"  # no place on a disk: it goes along with the weights
    try:
        if (path / CONFIG).is_file():
            first, name = licence_of_folder(path)
        elif path.is_dir() and generations:
            own = load_own_checkpoint(path, generations=generations - 1)
            first, name = own.licence, own.licence_id
        elif path.is_file():
            first, name = licence_of_file(path)
        elif path.name.endswith(SUFFIXES):  # a file is always one of the public layout
            first, name = licence(rotary)
        else:
            return f"{words}, which is not there any more to be asked", ""
    except WeightsRefused:
        return f"{words}, which cannot be read any more", ""
    return f"{words}: {first}", name


def _intact(path: Path) -> checkpoint.Found:
    """The newest checkpoint whose files agree with their manifest: of a run folder, of its checkpoints, or this one."""
    if (path / "manifest.json").is_file():
        folders = [path]
    else:
        root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if not root.is_dir():
            what = "a file, and no run of fastjepa" if root.is_file() else "no such folder, and no run of fastjepa"
            raise WeightsRefused(f"{path} is {what}{'' if root.is_file() else nearest(path)}")
        folders = [p for p in root.iterdir() if re.fullmatch(r"step-[0-9]+", p.name)]
        folders.sort(key=lambda p: int(p.name[5:]), reverse=True)
    if not folders:
        raise WeightsRefused(f"{path} has no checkpoint of fastjepa{_instead(path)}")
    reasons = []
    for folder in folders:
        try:
            return checkpoint.verify(folder)
        except checkpoint.CheckpointError as error:
            reasons.append(f"{folder.name}: {one_line(error)}")
    raise WeightsRefused(f"no checkpoint in {path} is intact: {'; '.join(reasons[:2])}")


def _instead(folder: Path) -> str:
    """What a folder without a checkpoint of ours holds."""
    if re.fullmatch(r"step-[0-9]+", folder.name):
        return ": it is a checkpoint without its manifest.json, and not whole"
    if (folder / "config.yaml").is_file():
        return ": it is a run without a checkpoint so far"
    if any(folder.glob("*.safetensors")):
        return f": it has weights (*.safetensors) and no {CONFIG}, which says of what network they are"
    runs = {step.parents[1] for step in folder.glob("*/checkpoints/step-*")}
    if runs:
        return f": it holds runs, the newest is {max(runs, key=lambda run: run.stat().st_mtime)}"
    return "" if any(folder.iterdir()) else ": it is empty"
