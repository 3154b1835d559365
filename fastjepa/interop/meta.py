"""Checkpoints of the public V-JEPA code, read and written; nothing in a file is executed."""

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjepa.config import Settings
from fastjepa.fit import NETWORKS
from fastjepa.interop.commit import committed
from fastjepa.interop.files import CONFIG
from fastjepa.interop.generation import is_second, licence, refuse_relatives, without_tables
from fastjepa.interop.passport import Passport
from fastjepa.interop.weights import UNREADABLE, Weights, WeightsRefused, nearest, one_line

PREFIX = "module.backbone."
# An entry that the public code passes over: what this library knows of weights that it wrote, as JSON.
PASSPORT = "fastjepa"
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


@dataclass(frozen=True)
class MetaCheckpoint(Weights):
    """A checkpoint of the public code. `optimizer` and `scaler` are as stored."""

    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, int | float]:
        """epoch, loss, batch_size, world_size, lr: those of them that the file has."""
        return self.public

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


def load_meta_checkpoint(path: str | Path) -> MetaCheckpoint:
    """A file of the training scripts of V-JEPA (`.pth.tar`) or V-JEPA 2 (`.pt`), on the CPU; nothing in it is executed.

    Keys lose exactly the prefix "module.backbone.". A file of V-JEPA 2 may hold one encoder, with or without predictor;
    position tables in it are left out, for its networks do not use them. Errors: WeightsRefused with one sentence for
    anything else: another kind of file, a truncated one, a pickle that asks for more than tensors, another layout.
    """
    path = Path(path).expanduser()
    content = _torch_file(path)
    networks, unused = _networks(path, content)
    second = "pos_embed" not in networks.get("encoder", networks.get("target_encoder", {}))
    facts = {key: content[key] for key in ("epoch", "loss", "batch_size", "world_size", "lr") if key in content}
    if not all(isinstance(value, int | float) for value in facts.values()):
        raise WeightsRefused(f"{path} is no V-JEPA pretraining checkpoint: epoch, loss and the like are not numbers")
    optimizer, scaler = (content.get(key) for key in ("opt", "scaler"))
    if not all(value is None or isinstance(value, dict) for value in (optimizer, scaler)):
        raise WeightsRefused(f"{path} is no V-JEPA pretraining checkpoint: opt or scaler is no state")
    when = f", of epoch {facts['epoch']}" if "epoch" in facts else ""
    loss = f", loss {facts['loss']:.4g}" if "loss" in facts else ""
    ignored = [f"{', '.join(unused)} (rotary networks do not use position tables)"] if unused else []
    ignored += [_why_ignored(str(key), content[key]) for key in content if key not in (*NETWORKS, PASSPORT)]
    if PASSPORT in content:
        passport = Passport.from_text(path, content[PASSPORT])
        return MetaCheckpoint(
            path,
            f"{passport.description}, in the layout of the public code",
            networks,
            ignored,
            passport.licence,
            passport.heads,
            passport.settings,
            passport.step,
            passport.licence_id,
            facts,
            optimizer,
            scaler,
        )
    generation = "second-generation V-JEPA checkpoint (V-JEPA 2)" if second else "first-generation V-JEPA checkpoint"
    words, name = licence(second)
    return MetaCheckpoint(
        path,
        f"a {generation}{when}{loss}",
        networks,
        ignored,
        words,
        licence_id=name,
        public=facts,
        optimizer=optimizer,
        scaler=scaler,
    )


def write_meta_checkpoint(weights: Weights, settings: Settings, out: Path) -> None:
    """All three networks in the layout of the public code, without an optimizer; what is known of them goes along.

    With position tables that is a file of V-JEPA, with rotary positions (model.positions=rope_v2) one of V-JEPA 2. The
    public evaluation reads such a file; its training cannot go on from it, as `opt` is empty. A run of this library has
    no epochs: `epoch` is 0 then, an entry that the public code prints. Errors: WeightsRefused where networks are
    missing, where the public code would compute other features (positions that are rotary in the usual order, a scale
    of attention scores), or where `out` exists; OSError.
    """
    if settings.model.positions == "rope":
        raise WeightsRefused(
            f"{weights.path} has rotary positions in the usual order (model.positions=rope), and V-JEPA 2 of the "
            "public code turns by other angles: its features would be others; expected model.positions=rope_v2"
        )
    if settings.model.qk_scale is not None and not settings.compat.sdpa_ignores_scale:
        raise WeightsRefused(
            f"{weights.path} scales attention scores by model.qk_scale={settings.model.qk_scale:g}, which the fused "
            "attention of the public code ignores: its features would be others; expected model.qk_scale=null"
        )
    missing = [name for name in NETWORKS if name not in weights.networks]
    if missing:
        raise WeightsRefused(
            f"{weights.path} has no {' and no '.join(name.replace('_', ' ') for name in missing)}: a file in the "
            "layout of the public code needs an encoder and a predictor (`export --all` and `import` write both)"
        )
    content: dict[str, Any] = {
        name: {PREFIX + key: tensor.contiguous() for key, tensor in weights.networks[name].items()} for name in NETWORKS
    }
    content |= {"opt": None, "scaler": None, "epoch": 0, **weights.public}
    content[PASSPORT] = Passport.of(weights, settings).text()
    with committed(out) as scratch:
        with scratch.open("wb") as file:
            torch.save(content, file)


def options_of(settings: Settings) -> str:
    """What the public code must be told to build this encoder, beyond its size: it reads no settings from the file."""
    if settings.model.mlp == "gelu":
        return ""
    return f" of V-JEPA 2, told use_silu: true and wide_silu: {str(settings.model.mlp == 'swiglu').lower()},"


def licence_of_file(path: Path) -> tuple[str, str]:
    """(sentence, id) of a file in the public layout, without reading its tensors. Errors: WeightsRefused."""
    content = _torch_file(path, mmap=True)
    if PASSPORT not in content:
        networks, _ = _networks(path, content)
        return licence("pos_embed" not in networks.get("encoder", networks.get("target_encoder", {})))
    passport = Passport.from_text(path, content[PASSPORT])
    return passport.licence, passport.licence_id


def _networks(path: Path, content: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The networks of a file, rotary ones without position tables, and the names of the tables left out."""
    held = [name for name in NETWORKS if isinstance(content.get(name), Mapping)]
    if not set(held) & {"encoder", "target_encoder"}:
        raise _incomplete(path, content, held)
    refuse_relatives(path, {name: content[name] for name in held})
    networks = {name: dict(_bare(path, name, content[name])) for name in held}
    passport = Passport.from_text(path, content[PASSPORT]) if PASSPORT in content else None
    known = passport is not None and passport.settings.get("model.positions", "table") != "table"
    if known or (passport is None and is_second(path, networks)):
        for name in held:
            if name != "predictor" and "patch_embed.proj.weight" not in networks[name]:
                raise WeightsRefused(f"{path} is no V-JEPA checkpoint: {name} has no patch_embed.proj.weight")
        return without_tables(networks)
    if len(held) < len(NETWORKS):
        raise _incomplete(path, content, held)
    return networks, []


def _incomplete(path: Path, content: Mapping[str, Any], held: list[str]) -> WeightsRefused:
    missing = [name for name in NETWORKS if name not in held]
    names = [str(key)[:60] for key in content]
    kind = f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}" if names else "nothing"
    if any("classifier" in name for name in names):
        kind = "classifiers, not a pretrained encoder"
    return WeightsRefused(
        f"{path} is no V-JEPA pretraining checkpoint: it has no {', '.join(missing)}; it holds {kind}"
    )


def _torch_file(path: Path, *, mmap: bool = False) -> Mapping[str, Any]:
    """The dict in a file of torch.save, by the weights-only reader."""
    if not path.is_file():
        what = "a folder, no file of weights" if path.is_dir() else f"no such file or folder{nearest(path)}"
        raise WeightsRefused(f"{path}: {what}")
    if (path.parent / CONFIG).is_file() and path.suffix in (".safetensors", ".json"):
        raise WeightsRefused(f"{path} lies in a folder of transformers: expected the folder, {path.parent}")
    try:
        # torch.save writes a zip archive without compression: anything else never reaches an unpickler, and one that
        # would unpack to more than its own size is no checkpoint.
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise WeightsRefused(f"{path} is no checkpoint: it would unpack to {unpacked} bytes")
        if mmap:
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        else:
            with path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        raise WeightsRefused(f"{path} is no checkpoint of torch, or it is cut off: not a zip archive") from None
    except UNREADABLE as error:
        if isinstance(error, WeightsRefused):
            raise
        raise WeightsRefused(f"{path} cannot be read as tensors alone: {one_line(error)}") from None
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
