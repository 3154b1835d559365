"""Weights from elsewhere: checkpoints of the public V-JEPA code, and of other runs of this library.

Reading a file executes nothing in it: `.pth.tar` goes through torch's weights-only reader, our own checkpoints are
safetensors and JSON with checksums. Loading is strict: every key and every shape, or nothing is copied.
"""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fastjepa import checkpoint
from fastjepa.fit import NETWORKS, differences, heads_of, loaded_lines, settings_to_change, state_of
from fastjepa.jepa import JEPA
from fastjepa.models.vision_transformer import SIZES

PREFIX = "module.backbone."
META_LICENCE = (
    "published weights of this layout are Meta's V-JEPA weights of the first generation: CC BY-NC 4.0, for "
    "non-commercial use only"
)
# What a damaged or a hostile file can raise in torch's reader.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    AttributeError,
    AssertionError,
    EOFError,
    MemoryError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
# Entries of the public layout beside the networks, and why a run that starts from the weights does not take them.
NOT_WEIGHTS = {
    "opt": "the optimizer starts anew",
    "scaler": "the loss scale starts anew",
    "epoch": "",
    "loss": "",
    "batch_size": "",
    "world_size": "",
    "lr": "",
}
SHOWN_DIFFERENCES = 8
# The public code averages its fixed tables into the target encoder: rounding drifts them this far at most.
SAME_TABLE = 1e-3


class WeightsRefused(ValueError):
    """A file cannot be read or does not fit. The first line is a sentence; lines with differences may follow."""


@dataclass(frozen=True)
class Weights:
    """Three bare state dicts, and what is known of them. `heads` (encoder, predictor) is None where nobody knows.

    `settings` are those of the run that made them, dotted key -> value as in `config.flat`; `step` is its step. Both
    are None for weights from elsewhere.
    """

    path: Path
    description: str
    networks: dict[str, dict[str, Tensor]]
    ignored: list[str]
    licence: str
    heads: tuple[int, int] | None = None
    settings: dict[str, Any] | None = None
    step: int | None = None


@dataclass(frozen=True)
class MetaCheckpoint(Weights):
    """A checkpoint of the public code. `facts`: epoch, loss, batch_size, world_size, lr; `optimizer` is as stored."""

    facts: dict[str, int | float] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's `step`, `exp_avg` and `exp_avg_sq` by parameter name ("encoder.norm.weight").

        The file keys them by a running index over four groups: encoder and predictor parameters with weight decay,
        then those without (biases and one-dimensional tensors), each in the order of the networks' own entries.
        Errors: WeightsRefused where the file has none, or where they do not belong to these networks.
        """
        if self.optimizer is None:
            raise WeightsRefused(f"{self.path} has no optimizer state")
        names = [list(group) for group in _published_groups(self.networks)]
        try:
            sizes = [len(group["params"]) for group in self.optimizer["param_groups"]]
            indices = [index for group in self.optimizer["param_groups"] for index in group["params"]]
            state = dict(self.optimizer["state"])
        except (LookupError, TypeError, ValueError) as error:
            raise WeightsRefused(f"{self.path}: its optimizer state is not that of AdamW: {error!r}") from None
        if sizes != [len(group) for group in names]:
            raise WeightsRefused(
                f"{self.path}: its optimizer has groups of {sizes} parameters, its networks make groups of "
                f"{[len(group) for group in names]}"
            )
        found = {}
        for index, name in zip(indices, (name for group in names for name in group)):
            slots = state.pop(index, None)
            if slots is None:
                continue  # a position table: it never has a gradient
            network, _, key = name.partition(".")
            found[name] = _slots(self.path, name, slots, self.networks[network][key])
        if state:
            raise WeightsRefused(f"{self.path}: its optimizer has moments of unknown parameters: {sorted(state)[:5]}")
        return found


def read_weights(source: str | Path) -> Weights:
    """Weights of a checkpoint of the public code (a file), or of a run of this library (its folder or a checkpoint's).

    Errors: WeightsRefused with one sentence.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return load_own_checkpoint(path)
    return load_meta_checkpoint(path)


def load_meta_checkpoint(path: str | Path) -> MetaCheckpoint:
    """A `.pth.tar` file of the first-generation V-JEPA training script, on the CPU; nothing in it is executed.

    Keys lose exactly the prefix "module.backbone.". Errors: WeightsRefused with one sentence for anything else: another
    kind of file, a truncated one, a pickle that asks for more than tensors, another layout.
    """
    path = Path(path).expanduser()
    content = _torch_file(path)
    missing = [name for name in NETWORKS if not isinstance(content.get(name), Mapping)]
    if missing:
        held = (
            "classifiers, not a pretrained encoder" if any("classifier" in str(k) for k in content) else "other things"
        )
        raise WeightsRefused(
            f"{path} is no V-JEPA pretraining checkpoint: it has no {', '.join(missing)}; it holds {held}"
        )
    networks = {name: dict(_bare(path, name, content[name])) for name in NETWORKS}
    if "pos_embed" not in networks["encoder"]:
        raise WeightsRefused(
            f"{path} has no encoder.pos_embed: its encoder uses rotary positions (V-JEPA 2), which cannot be read yet"
        )
    facts = {key: content[key] for key in ("epoch", "loss", "batch_size", "world_size", "lr") if key in content}
    if not all(isinstance(value, int | float) for value in facts.values()):
        raise WeightsRefused(f"{path} is no V-JEPA pretraining checkpoint: epoch, loss and the like are not numbers")
    optimizer, scaler = (content.get(key) for key in ("opt", "scaler"))
    if not all(value is None or isinstance(value, dict) for value in (optimizer, scaler)):
        raise WeightsRefused(f"{path} is no V-JEPA pretraining checkpoint: opt or scaler is no state")
    when = f", of epoch {facts['epoch']}" if "epoch" in facts else ""
    loss = f", loss {facts['loss']:.4g}" if "loss" in facts else ""
    return MetaCheckpoint(
        path,
        f"a first-generation V-JEPA checkpoint{when}{loss}",
        networks,
        [_why_ignored(str(key), content[key]) for key in content if key not in NETWORKS],
        META_LICENCE,
        facts=facts,
        optimizer=optimizer,
        scaler=scaler,
    )


def load_own_checkpoint(path: str | Path) -> Weights:
    """The networks of a run of this library: of the newest intact checkpoint of a run folder, or of one checkpoint.

    Nothing in the folder is touched. Errors: WeightsRefused with one sentence.
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
        raise WeightsRefused(f"{found.folder} cannot be read: {_one_line(error)}") from None
    networks: dict[str, dict[str, Tensor]] = {name: {} for name in NETWORKS}
    for name, tensor in tensors.items():
        network, _, key = name.partition(".")
        networks[network][key] = tensor
    settings = found.trainer.get("settings")
    settings = {str(key): value for key, value in settings.items()} if isinstance(settings, dict) else {}
    began = settings.get("init.from")
    return Weights(
        found.folder,
        f"a checkpoint of fastjepa, step {found.step}",
        networks,
        ["optimizer state (the optimizer starts anew)", "step, schedules and data position (this run has its own)"],
        f"that of what it was trained from: its run began with init.from={began}" if began else "yours",
        _heads_of_settings(settings),
        settings,
        found.step,
    )


@torch.no_grad()
def load_weights(jepa: JEPA, weights: Weights) -> list[str]:
    """Copy the three networks into a JEPA, in place; returns the report, a line each.

    Values become the dtype of the model. Errors: WeightsRefused with the settings to change and the differences, each
    with what was expected and what was given; nothing is copied then.
    """
    wrong = list(settings_to_change(jepa, weights.networks, weights.heads))
    unlike = list(differences(jepa, weights.networks))
    if wrong or unlike:
        more = len(unlike) - SHOWN_DIFFERENCES
        shown = [*wrong, *unlike[:SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])]
        raise WeightsRefused("\n  ".join([f"{weights.path} does not fit the settings:", *shown]))
    live = state_of(jepa)
    pairs = [(key, ours, weights.networks[name][key]) for name, state in live.items() for key, ours in state.items()]
    drift = max((ours.cpu() - tensor).abs().max().item() for key, ours, tensor in pairs if key.endswith("pos_embed"))
    for _, ours, tensor in pairs:
        ours.copy_(tensor)
    return _report(jepa, weights, drift)


def load_moments(state: dict[str, Tensor], loaded: MetaCheckpoint) -> None:
    """Copy AdamW's moments of a checkpoint into the live tensors of `OptimizerPass.state()`, all or none.

    Errors: WeightsRefused where the parameters differ.
    """
    stored = {f"optim.{slot}.{name}": v for name, slots in loaded.moments().items() for slot, v in slots.items()}
    live = {name: tensor for name, tensor in state.items() if not name.startswith("optim.skipped")}
    if live.keys() != stored.keys() or any(live[name].shape != stored[name].shape for name in live):
        names = sorted(live.keys() ^ stored.keys())[:3] or sorted(n for n in live if live[n].shape != stored[n].shape)
        raise WeightsRefused(f"{loaded.path}: its moments are not those of this model: {', '.join(names[:3])}")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(stored[name])


def _torch_file(path: Path) -> Mapping[str, Any]:
    """The dict in a file of torch.save, by the weights-only reader."""
    if not path.is_file():
        what = "a folder, no file of weights" if path.is_dir() else "no such file or folder"
        raise WeightsRefused(f"{path}: {what}")
    try:
        # torch.save writes a zip archive without compression: anything else never reaches an unpickler, and one that
        # would unpack to more than its own size is no checkpoint.
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise WeightsRefused(f"{path} is no checkpoint: it would unpack to {unpacked} bytes")
        with path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        raise WeightsRefused(f"{path} is no checkpoint of torch, or it is cut off: not a zip archive") from None
    except UNREADABLE as error:
        if isinstance(error, WeightsRefused):
            raise
        raise WeightsRefused(f"{path} cannot be read as tensors alone: {_one_line(error)}") from None
    if not isinstance(content, Mapping):
        raise WeightsRefused(f"{path} is no V-JEPA pretraining checkpoint: it holds a {type(content).__name__}")
    return content


def _bare(path: Path, network: str, state: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if not isinstance(key, str) or not key.startswith(PREFIX):
            raise WeightsRefused(f"{path}: {network}: expected keys that begin with {PREFIX}, given {str(key)[:100]!r}")
        if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
            raise WeightsRefused(f"{path}: {network}: {key[:100]} is not a dense tensor of floating-point numbers")
        yield key.removeprefix(PREFIX), value


def _why_ignored(key: str, value: Any) -> str:
    if key not in NOT_WEIGHTS:
        return f"{key[:50]} (not known)"
    reason = NOT_WEIGHTS[key] or f"{value:.6g}"
    return f"{key} ({'empty' if value is None else reason})"


def _published_groups(networks: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Iterator[str]]:
    for decayed in (True, False):
        for network in ("encoder", "predictor"):
            state = networks[network]
            yield (f"{network}.{key}" for key, p in state.items() if (p.ndim > 1 and "bias" not in key) == decayed)


def _slots(path: Path, name: str, slots: Any, parameter: Tensor) -> dict[str, Tensor]:
    wanted = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    if not isinstance(slots, Mapping) or set(slots) != set(wanted):
        raise WeightsRefused(f"{path}: the optimizer state of {name} is not that of AdamW")
    tensors = {slot: torch.as_tensor(slots[slot], dtype=torch.float32) for slot in wanted}
    for slot, tensor in tensors.items():
        if tensor.shape != wanted[slot]:
            raise WeightsRefused(f"{path}: {slot} of {name}: expected {list(wanted[slot])}, given {list(tensor.shape)}")
    return tensors


def _intact(path: Path) -> checkpoint.Found:
    """The newest checkpoint whose files agree with their manifest: of a run folder, of its checkpoints, or this one."""
    if (path / "manifest.json").is_file():
        folders = [path]
    else:
        root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if not root.is_dir():
            raise WeightsRefused(
                f"{path} is {'a file' if root.is_file() else 'no such folder'}, and no run of fastjepa"
            )
        folders = [p for p in root.iterdir() if re.fullmatch(r"step-[0-9]+", p.name)]
        folders.sort(key=lambda p: int(p.name[5:]), reverse=True)
    if not folders:
        raise WeightsRefused(f"{path} is no run folder and no checkpoint of fastjepa")
    reasons = []
    for folder in folders:
        try:
            return checkpoint.verify(folder)
        except checkpoint.CheckpointError as error:
            reasons.append(f"{folder.name}: {_one_line(error)}")
    raise WeightsRefused(f"no checkpoint in {path} is intact: {'; '.join(reasons[:2])}")


def _heads_of_settings(settings: dict[str, Any]) -> tuple[int, int] | None:
    """(encoder, predictor) heads of a run; None where its settings do not tell."""
    size = SIZES.get(str(settings.get("model.name")))
    if size is None or "model.predictor_heads" not in settings:
        return None
    return size["num_heads"], settings["model.predictor_heads"] or size["num_heads"]


def _report(jepa: JEPA, weights: Weights, drift: float) -> list[str]:
    heads = heads_of(jepa)
    source = "from the settings, for the file does not tell them" if weights.heads is None else "as in that run"
    near = f"equal to the settings' within {drift:.1g}"
    far = f"up to {drift:.2g} from the settings': is model.uniform_power right?"
    lines = [
        f"{weights.path}, {weights.description}",
        *loaded_lines(state_of(jepa)),
        f"position tables are the file's, {near if drift < SAME_TABLE else far}",
        f"heads: {heads[0]} in the encoder, {heads[1]} in the predictor, {source}",
        f"ignored: {'; '.join(weights.ignored) or 'nothing'}",
        f"licence: {weights.licence}",
    ]
    return [f"{'' if number else 'weights':<11}{line}" for number, line in enumerate(lines)]


def _one_line(error: BaseException) -> str:
    """The cause in one line; of torch's refusals the part that says what was not allowed."""
    if isinstance(error, CheckpointException):
        inner = next(iter(error.failures.values()), None)
        error = inner[0] if isinstance(inner, tuple) else error
    refused = re.search(r"WeightsUnpickler error: (.+)", str(error))
    text = (refused.group(1) if refused else str(error)).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"
