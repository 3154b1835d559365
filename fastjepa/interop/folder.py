"""The transformers layout: a folder that other programs can open, and this library reads back strictly.

```
OUT/
  config.json                    architecture, how clips are cut, and under `fastjepa` what travels with the weights
  model.safetensors              one encoder, published key names ("blocks.0.attn.qkv.weight")
  pretraining.safetensors        the other two networks ("encoder.…" or "target_encoder.…", "predictor.…"), if asked for
  video_preprocessor_config.json size, mean, deviation, frames, stride
  README.md                      the model card
```
"""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors import safe_open
from torch import Tensor

from fastjepa.config import Settings
from fastjepa.configfile import SettingsError, restore
from fastjepa.fit import NETWORKS
from fastjepa.interop.passport import Passport, one_paragraph, parsed
from fastjepa.interop.weights import UNREADABLE, Weights, WeightsRefused, one_line
from fastjepa.models.vision_transformer import SIZES
from fastjepa.pixels import MEAN, STD

CONFIG, MODEL, MORE = "config.json", "model.safetensors", "pretraining.safetensors"
PREPROCESSOR, CARD = "video_preprocessor_config.json", "README.md"
MODEL_TYPE = "vjepa"
LONGEST_CONFIG = 4_000_000  # bytes
DTYPES = ("F32", "BF16", "F16", "F64")
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
    found = _tensors(path / MODEL)
    if found and all(key.startswith(WRAPPED) for key in found):
        found = {key.removeprefix(WRAPPED): tensor for key, tensor in found.items()}
    networks = {network: found}
    if (path / MORE).exists():
        others = [name for name in NETWORKS if name != network]
        networks |= {name: {} for name in others}
        for key, tensor in _tensors(path / MORE).items():
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
    """(sentence, id), from config.json alone. Errors: WeightsRefused."""
    passport = _described(path)[1]
    return passport.licence, passport.licence_id


def _described(path: Path) -> tuple[dict[str, Any], Passport]:
    file = path / CONFIG
    _expect_file(file, LONGEST_CONFIG)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsRefused(f"{file} cannot be read: {one_line(error)}") from None
    config = parsed(file, "it", text)
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if kind == "vjepa2":
        raise WeightsRefused(f"{path} is a V-JEPA 2 model, whose rotary positions cannot be read yet")
    if kind != MODEL_TYPE:
        given = "nothing" if kind is None else one_paragraph(repr(kind))[:60]
        raise WeightsRefused(f"{file}: model_type: expected {MODEL_TYPE!r}, given {given}")
    if "fastjepa" not in config:
        raise WeightsRefused(f"{file} has no entry fastjepa: expected a folder that `fastjepa export` wrote")
    return config, Passport.from_content(file, config["fastjepa"])


def _settings(file: Path, passport: Passport) -> Settings:
    try:
        return restore(passport.settings, f"{file}: fastjepa.settings")
    except SettingsError as error:
        raise WeightsRefused(f"{file} has settings that this version does not take: {error.mistakes[0]}") from None


def _tensors(file: Path) -> dict[str, Tensor]:
    """Errors: WeightsRefused; what a header says is checked against the size of the file before anything is read."""
    if file.with_name(f"{file.name}.index.json").exists():
        raise WeightsRefused(f"{file.parent} holds its weights in parts: expected one {file.name}")
    _expect_file(file)
    try:
        with safe_open(str(file), "pt") as opened:
            names = list(opened.keys())
            for name in names:
                kind = opened.get_slice(name).get_dtype()
                if kind not in DTYPES:
                    raise WeightsRefused(
                        f"{file}: {one_paragraph(name)[:100]}: expected floating-point numbers "
                        f"({', '.join(DTYPES)}), given {kind}"
                    )
            return {name: opened.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, *UNREADABLE) as error:
        if isinstance(error, WeightsRefused):
            raise
        raise WeightsRefused(f"{file} is no file of safetensors, or it is damaged: {one_line(error)}") from None


def _expect_file(file: Path, most: int | None = None) -> None:
    """Errors: WeightsRefused where there is none, it is no regular file, or one of more than `most` bytes."""
    try:
        facts = file.stat()
    except OSError as error:
        raise WeightsRefused(f"{file} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(facts.st_mode):
        raise WeightsRefused(f"{file} is no regular file")
    if most is not None and facts.st_size > most:
        raise WeightsRefused(f"{file} has {facts.st_size} bytes: expected at most {most}")
