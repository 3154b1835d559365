"""The transformers layout: a folder that other programs can open, and this library reads back strictly.

This is the first generation's, whose class is this library's own; `vjepa2_folder` has that of transformers' V-JEPA 2.

```
OUT/
  config.json                    architecture, how clips are cut, and under `fastjepa` what travels with the weights
  model.safetensors              one encoder, published key names ("blocks.0.attn.qkv.weight")
  pretraining.safetensors        the other two networks ("encoder.…" or "target_encoder.…", "predictor.…"), if asked for
  video_preprocessor_config.json size, mean, deviation, frames, stride
  README.md                      the model card
```
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastjepa.config import Settings
from fastjepa.configfile import SettingsError, restore
from fastjepa.fit import NETWORKS
from fastjepa.interop.files import CONFIG, MODEL, MORE, read_config, tensors, tensors_in_parts
from fastjepa.interop.passport import Passport, one_paragraph
from fastjepa.interop.vjepa2 import MODEL_TYPE as SECOND
from fastjepa.interop.vjepa2_folder import licence_of_vjepa2_folder, load_vjepa2_folder
from fastjepa.interop.weights import Weights, WeightsRefused
from fastjepa.models.vision_transformer import SIZES
from fastjepa.pixels import MEAN, STD

MODEL_TYPE = "vjepa"
WRAPPED = "encoder."  # how transformers names them where its class wraps the encoder


def architecture_of(settings: Settings) -> dict[str, Any]:
    """The entries of config.json that tell what to build and how clips are cut, by transformers' names."""
    size = SIZES[settings.model.name]
    data = settings.data
    return {
        "hidden_size": size["embed_dim"],
        "num_hidden_layers": size["depth"],
        "num_attention_heads": size["num_heads"],
        "mlp_ratio": size["mlp_ratio"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "qk_scale": settings.model.qk_scale,
        "sdpa_ignores_scale": settings.compat.sdpa_ignores_scale,
        "in_chans": 3,
        "crop_size": data.crop,
        "patch_size": data.patch,
        "tubelet_size": data.tubelet,
        "frames_per_clip": data.frames,
        "frame_stride": data.stride,
        "frames_per_second": data.fps,
        "clip_seconds": data.duration,
        "position_embedding": "fixed sine-cosine, 3-D",
        "uniform_power": settings.model.uniform_power,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def load_folder(path: str | Path) -> Weights:
    """The networks of an exported folder, in the precision of its files.

    Nothing in it is executed. Errors: WeightsRefused with one sentence.
    """
    path = Path(path).expanduser()
    if read_config(path).get("model_type") == SECOND:
        return load_vjepa2_folder(path)
    config, passport = _described(path)
    network = config["fastjepa"].get("network")
    if network not in ("target_encoder", "encoder"):
        raise WeightsRefused(
            f"{path / CONFIG}: fastjepa.network: expected target_encoder or encoder, "
            f"given {one_paragraph(repr(network))[:60]}"
        )
    settings = _settings(path / CONFIG, passport)
    expected = architecture_of(settings)
    for key, value in expected.items():
        if key in config and config[key] != value:
            raise WeightsRefused(
                f"{path / CONFIG}: {key}: its settings make it {value}, given {one_paragraph(repr(config[key]))[:60]}"
            )
    found = tensors_in_parts(path / MODEL)
    if found and all(key.startswith(WRAPPED) for key in found):
        found = {key.removeprefix(WRAPPED): tensor for key, tensor in found.items()}
    networks = {network: found}
    if (path / MORE).exists():
        others = [name for name in NETWORKS if name != network]
        networks |= {name: {} for name in others}
        for key, tensor in tensors(path / MORE).items():
            name, _, inner = key.partition(".")
            if name not in others:
                raise WeightsRefused(
                    f"{path / MORE}: expected keys that begin with {' or '.join(f'{one}.' for one in others)}, "
                    f"given {one_paragraph(key)[:100]!r}"
                )
            networks[name][inner] = tensor
    held = "all three networks" if len(networks) == len(NETWORKS) else f"the {network.replace('_', ' ')} only"
    return Weights(
        path,
        f"{passport.description}, as a folder with {held}",
        {name: networks[name] for name in NETWORKS if name in networks},
        [],
        passport.licence,
        passport.heads,
        passport.settings,
        passport.step,
        passport.licence_id,
        passport.public,
    )


def licence_of_folder(path: Path) -> tuple[str, str]:
    """(sentence, id), from config.json and the card alone. Errors: WeightsRefused."""
    if read_config(path).get("model_type") == SECOND:
        return licence_of_vjepa2_folder(path)
    passport = _described(path)[1]
    return passport.licence, passport.licence_id


def _described(path: Path) -> tuple[Mapping[str, Any], Passport]:
    file, config = path / CONFIG, read_config(path)
    kind = config.get("model_type")
    if kind != MODEL_TYPE:
        given = "nothing" if kind is None else one_paragraph(repr(kind))[:60]
        raise WeightsRefused(f"{file}: model_type: expected {MODEL_TYPE!r} or {SECOND!r}, given {given}")
    if "fastjepa" not in config:
        raise WeightsRefused(f"{file} has no entry fastjepa: expected a folder that `fastjepa export` wrote")
    return config, Passport.from_content(file, config["fastjepa"])


def _settings(file: Path, passport: Passport) -> Settings:
    try:
        return restore(passport.settings, f"{file}: fastjepa.settings")
    except SettingsError as error:
        raise WeightsRefused(f"{file} has settings that this version does not take: {error.mistakes[0]}") from None
