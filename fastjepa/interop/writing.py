"""Weights as a folder in the transformers layout."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastjepa.config import Settings
from fastjepa.fit import NETWORKS
from fastjepa.interop.card import Probed, card
from fastjepa.interop.commit import committed
from fastjepa.interop.files import CARD, CONFIG, MODEL, MORE, PREPROCESSOR
from fastjepa.interop.folder import MODEL_TYPE, architecture_of
from fastjepa.interop.generation import other_mask_token
from fastjepa.interop.passport import Passport
from fastjepa.interop.vjepa2_folder import content_of
from fastjepa.interop.weights import Weights
from fastjepa.pixels import MEAN, STD

ARCHITECTURE = "VJEPAModel"  # of fastjepa.transformers_model


def write_folder(
    weights: Weights,
    settings: Settings,
    out: Path,
    network: str,
    *,
    everything: bool,
    probed: Sequence[Probed] = (),
    trained_on: str = "",
) -> None:
    """Write `network` to `out`, with `everything` the others beside it.

    Networks of the second generation are written as transformers' own classes have them, their predictor always beside
    the encoder. `settings` are those that build the networks. `probed` and `trained_on` are for the card. Errors:
    WeightsRefused where `out` is taken, or where no class has such networks; OSError.
    """
    passport = Passport.of(weights, settings)
    state = weights.networks[network]
    second = settings.model.positions != "table"
    beside = [name for name in NETWORKS if everything and name != network]
    if second:
        config, state = content_of(weights, settings, network)
        beside = [name for name in beside if name != "predictor"]
    else:
        config = {
            "architectures": [ARCHITECTURE],
            "model_type": MODEL_TYPE,
            **architecture_of(settings),
            "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        }
    config["fastjepa"] = {"network": network, **passport.content()}
    others = {f"{name}.{key}": tensor for name in beside for key, tensor in weights.networks[name].items()}
    with committed(out) as folder:
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _save(state, folder / MODEL)
        if others:
            _save(others, folder / MORE)
        for file in folder.glob("*.safetensors"):
            shutil.copymode(folder / CONFIG, file)  # safetensors makes files that nobody else may read
        (folder / PREPROCESSOR).write_text(json.dumps(_preprocessing(settings), indent=2) + "\n", encoding="utf-8")
        note = other_mask_token(settings, weights.networks)
        text = card(passport, settings, out.name, network, probed, trained_on, bool(others), note=note)
        (folder / CARD).write_text(text, encoding="utf-8")


def _save(state: dict[str, Tensor], file: Path) -> None:
    # Clones where memory is shared, which safetensors refuses: a file may hold one tensor under two names.
    seen: set[int] = set()
    apart = {}
    for key, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        apart[key] = (
            tensor.detach().clone(memory_format=torch.contiguous_format) if place in seen else tensor.contiguous()
        )
        seen.add(place)
    save_file(apart, file, metadata={"format": "pt"})


def _preprocessing(settings: Settings) -> dict[str, Any]:
    data = settings.data
    if settings.model.positions != "table":
        return {
            "video_processor_type": "VJEPA2VideoProcessor",
            "do_resize": True,
            "size": {"shortest_edge": data.crop},
            "resample": 2,  # bilinear
            "do_center_crop": True,
            "crop_size": {"height": data.crop, "width": data.crop},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        }
    return {
        "crop": "the central square of every frame, resized bilinearly without antialiasing",
        "size": {"height": data.crop, "width": data.crop},
        "rescale_factor": 1 / 255,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "num_frames": data.frames,
        "frame_stride": data.stride,
        "frames_per_second": data.fps,
        "clip_seconds": data.duration,
        "layout": "float32 [B, C, T, H, W], RGB",
    }
