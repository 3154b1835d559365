"""An encoder from wherever weights lie, ready to be asked: a run or a checkpoint of it, a folder, a published file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastjepa.build import build_encoder
from fastjepa.config import Settings
from fastjepa.configfile import SettingsError, restore
from fastjepa.fit import architecture
from fastjepa.interop import Weights, WeightsRefused, read_weights
from fastjepa.models import VisionTransformer
from fastjepa.models.vision_transformer import SIZES

Network = Literal["target_encoder", "encoder"]
PUBLISHED_FRAMES = 16  # of every published first-generation model
# Clips of the published second-generation models: rotary weights do not tell, and compute with clips of any size.
ROTARY_CLIP = {"data.frames": 64, "data.fps": 4.0, "data.crop": 256}


@dataclass(frozen=True)
class Opened:
    """An encoder in float32 on its device, in evaluation mode: clips [B, C, T, H, W] -> tokens [B, N, E].

    `settings` tell how clips are cut for it (`data`) and which size it is (`model`): those of its run, or what shapes
    tell of weights from elsewhere. `step` is None for these. `run` is the run folder, where there is one.
    """

    path: Path
    description: str
    network: str
    encoder: VisionTransformer
    settings: Settings
    licence: str
    step: int | None = None
    run: Path | None = None


def open_encoder(source: str | Path, network: Network | None = None, device: torch.device | str = "cpu") -> Opened:
    """The encoder of a run (its folder, or a checkpoint in it), of an exported folder or of a published file.

    `network` None is the target encoder, or of a folder that holds one encoder that one. Errors: WeightsRefused (a
    ValueError) with one sentence.
    """
    weights = read_weights(source)
    settings = settings_of(weights)
    name = weights.network(network)
    encoder = load_encoder(settings, weights.networks[name], f"{weights.path}: {name}")
    run = next((folder for folder in weights.path.parents[:2] if (folder / "config.yaml").is_file()), None)
    return Opened(
        weights.path,
        weights.description,
        name,
        encoder.to(device),
        settings,
        weights.licence,
        weights.step,
        run,
    )


def settings_of(weights: Weights) -> Settings:
    """The settings of the run that made these weights, or for others what their shapes tell. Errors: WeightsRefused."""
    try:
        if weights.settings is not None:
            return restore(weights.settings, str(weights.path))
        return restore(_published_settings(weights.path, weights.networks), str(weights.path))
    except SettingsError as error:
        raise WeightsRefused(
            f"{weights.path}: its settings are not those of this version: {error.mistakes[0]}"
        ) from None


def load_encoder(settings: Settings, state: Mapping[str, Tensor], where: str) -> VisionTransformer:
    """An encoder with these weights in float32, in evaluation mode, without gradients. Errors: WeightsRefused."""
    # Before anything is built: position tables are computed, and those of absurd sizes would fill the memory.
    table, tokens = state.get("pos_embed"), _tokens(settings)
    if settings.model.positions == "table":
        if table is None:
            raise WeightsRefused(f"{where} does not fit its settings: it has no pos_embed")
        if table.shape[1:2] != (tokens,):
            raise WeightsRefused(
                f"{where} does not fit its settings: pos_embed: expected {tokens} tokens, given {list(table.shape)}"
            )
    with torch.device("meta"):
        encoder = build_encoder(settings)
    expected = {key: list(tensor.shape) for key, tensor in encoder.state_dict().items()}
    given = {key: list(tensor.shape) for key, tensor in state.items()}
    unlike = [key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key)]
    if unlike:
        key = min(unlike)
        raise WeightsRefused(
            f"{where} does not fit its settings: {key}: expected {expected.get(key, 'nothing')}, given "
            f"{given.get(key, 'nothing')}" + (f", and {len(unlike) - 1} more" if len(unlike) > 1 else "")
        )
    encoder.load_state_dict({key: tensor.detach().float() for key, tensor in state.items()}, assign=True)
    return encoder.eval().requires_grad_(False)


def _tokens(s: Settings) -> int:
    return (s.data.frames // s.data.tubelet) * (s.data.crop // s.data.patch) ** 2


def _published_settings(path: Path, networks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Dotted settings of a published model, from the shapes of its weights. Errors: WeightsRefused."""
    found = architecture(networks)
    if found.name not in SIZES:
        raise WeightsRefused(f"{path}: its encoder has {found.name}: {found.width} wide, {found.depth} blocks deep")
    if not (found.patch and found.tubelet and (found.rotary or found.tokens)):
        raise WeightsRefused(f"{path}: its encoder is none of clips: no tubelet embedding or no position table")
    told = found.settings()
    if found.rotary:
        return told | ROTARY_CLIP
    planes, tokens = PUBLISHED_FRAMES // found.tubelet, found.tokens or 0
    side = round((tokens / planes) ** 0.5)
    if planes * side**2 != tokens:
        raise WeightsRefused(
            f"{path}: positions for {tokens} tokens are expected to be {planes} square planes of clips of "
            f"{PUBLISHED_FRAMES} frames, and are not"
        )
    return told | {"data.frames": PUBLISHED_FRAMES, "data.crop": side * found.patch}
