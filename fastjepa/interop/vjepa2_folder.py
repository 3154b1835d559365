"""Folders that transformers' own classes load: VJEPA2Model and VJEPA2ForVideoClassification, read and written.

```
OUT/
  config.json                    as transformers has it, and under `fastjepa` what travels with the weights
  model.safetensors              one encoder, the predictor, and the classifier if there is one, by transformers' names
  pretraining.safetensors        the other encoder by our names, where it differs and was asked for
  video_preprocessor_config.json size, mean, deviation
  README.md                      the model card
```
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.config import Settings
from fastjepa.configfile import SettingsError, restore
from fastjepa.fit import NETWORKS
from fastjepa.interop.files import CARD, CONFIG, MODEL, MORE, read_config, tensors, tensors_in_parts
from fastjepa.interop.passport import Passport, one_paragraph
from fastjepa.interop.vjepa2 import (
    CLASSIFIER,
    DEFAULTS,
    MODEL_TYPE,
    build_classifier,
    config_of,
    encoder_arguments,
    from_transformers,
    predictor_arguments,
    settings_of_config,
    to_transformers,
    with_defaults,
)
from fastjepa.interop.vjepa2 import MODEL as MODEL_CLASS
from fastjepa.interop.weights import ROTARY_LICENCE, ROTARY_LICENCE_ID, Weights, WeightsRefused
from fastjepa.models import AttentiveClassifier, VisionTransformer, VisionTransformerPredictor

LONGEST_CARD = 1_000_000  # characters that are looked at
# Entries that say nothing of the networks' shapes, or that transformers writes anew.
NOT_KEPT = ("architectures", "dtype", "torch_dtype", "fastjepa", "_name_or_path")


@dataclass(frozen=True)
class VJEPA2Weights(Weights):
    """Weights of such a folder. `config` is its config.json; `classifier` the entries of an AttentiveClassifier."""

    config: dict[str, Any] = field(default_factory=dict)
    classifier: dict[str, Tensor] | None = None


def load_vjepa2_folder(path: str | Path) -> VJEPA2Weights:
    """The networks of a folder of transformers, by our names, in the precision of its files.

    A single encoder is the target encoder, where nothing says otherwise. Nothing in the folder is executed. Errors:
    WeightsRefused with one sentence.
    """
    path = Path(path).expanduser()
    where = str(path / CONFIG)
    given = read_config(path)
    config = with_defaults(given, where)
    passport = Passport.from_content(path / CONFIG, given["fastjepa"]) if "fastjepa" in given else None
    name = "target_encoder"
    if passport is not None:
        name = given["fastjepa"].get("network")
        if name not in ("target_encoder", "encoder"):
            raise WeightsRefused(
                f"{where}: fastjepa.network: expected target_encoder or encoder, given {one_paragraph(repr(name))[:60]}"
            )
        settings = passport.settings
        _agree(where, config, settings)
    else:
        settings = settings_of_config(config, where)
    found = from_transformers(tensors_in_parts(path / MODEL), str(path / MODEL))
    _fit(path, config, found)
    classifier, predictor, encoder = found.get("classifier"), found.get("predictor"), found["encoder"]
    other = "encoder" if name == "target_encoder" else "target_encoder"
    networks, held = {name: encoder}, f"the {name.replace('_', ' ')} only"
    if (path / MORE).exists():
        second = {}
        for key, tensor in tensors(path / MORE).items():
            if not key.startswith(f"{other}."):
                raise WeightsRefused(
                    f"{path / MORE}: expected keys that begin with {other}., given {one_paragraph(key)[:100]!r}"
                )
            second[key.removeprefix(f"{other}.")] = tensor
        _expect(path / MORE, VisionTransformer, encoder_arguments(config), second, other)
        networks[other] = second
    if predictor is not None:
        networks["predictor"] = predictor
        held = "all three networks" if len(networks) == len(NETWORKS) else f"the {name.replace('_', ' ')} and predictor"
    if classifier is not None:
        held += f", and a classifier of {len(classifier['linear.weight'])} classes"
    heads = config["num_attention_heads"], config["pred_num_attention_heads"]
    licence, licence_id = (passport.licence, passport.licence_id) if passport else _licence(path)
    about = "a V-JEPA 2 model in the layout of transformers" if passport is None else passport.description
    return VJEPA2Weights(
        path,
        f"{about}, as a folder with {held}",
        {one: networks[one] for one in NETWORKS if one in networks},
        [],
        licence,
        # Of a folder that was made of shapes alone the heads are a guess.
        None if passport is not None and passport.shapes_only else heads,
        settings,
        passport.step if passport else None,
        licence_id,
        passport.public if passport else {},
        config={key: value for key, value in given.items() if key not in NOT_KEPT},
        classifier=classifier,
    )


def load_classifier(path: str | Path) -> AttentiveClassifier:
    """The classifier of a folder of VJEPA2ForVideoClassification, float32, in evaluation mode, on the CPU.

    It takes the tokens of the folder's encoder (`fastjepa.opened.open_encoder`): [B, N, E] -> logits [B, classes], in
    the order of `id2label` in config.json. Errors: WeightsRefused where there is none.
    """
    weights = load_vjepa2_folder(path)
    if weights.classifier is None:
        raise WeightsRefused(f"{weights.path} holds no classifier: expected a folder of {CLASSIFIER}")
    config = with_defaults(weights.config, str(weights.path / CONFIG))
    classifier = build_classifier(config, len(weights.classifier["linear.weight"]))
    classifier.load_state_dict(weights.classifier)
    return classifier.float().eval()


def licence_of_vjepa2_folder(path: Path) -> tuple[str, str]:
    """(sentence, id), from config.json and the card alone. Errors: WeightsRefused."""
    given = read_config(path)
    if "fastjepa" not in given:
        return _licence(path)
    passport = Passport.from_content(path / CONFIG, given["fastjepa"])
    return passport.licence, passport.licence_id


def content_of(weights: Weights, settings: Settings, network: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json without what travels along, model.safetensors) for a folder of this encoder and what belongs to it.

    Errors: WeightsRefused where transformers' V-JEPA 2 cannot be these networks.
    """
    parts = {"encoder": weights.networks[network]}
    if "predictor" in weights.networks:
        parts["predictor"] = weights.networks["predictor"]
    tokens = sum(key.startswith("mask_tokens.") for key in parts.get("predictor", {}))
    try:
        config = config_of(settings, tokens if "predictor" in parts else DEFAULTS["pred_num_mask_tokens"])
    except WeightsRefused as error:
        raise WeightsRefused(f"{weights.path}: {error} (embed, probe and init.from take it as it is)") from None
    if isinstance(weights, VJEPA2Weights):
        config = weights.config  # as it came, with the names of its classes
        if weights.classifier is not None:
            kinds = {tensor.dtype for tensor in parts["encoder"].values()}
            kind = kinds.pop() if len(kinds) == 1 else None  # an export may have converted the networks
            parts["classifier"] = {key: t if kind is None else t.to(kind) for key, t in weights.classifier.items()}
    architecture = CLASSIFIER if "classifier" in parts else MODEL_CLASS
    state = to_transformers(parts)
    dtype = str(parts["encoder"]["norm.weight"].dtype).removeprefix("torch.")
    return {"architectures": [architecture], "model_type": MODEL_TYPE, **config, "dtype": dtype}, state


def _agree(where: str, config: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Errors: WeightsRefused where config.json and the settings that travel along build different networks."""
    try:
        settings = restore(stored, f"{where}: fastjepa.settings")
    except SettingsError as error:
        raise WeightsRefused(f"{where} has settings that this version does not take: {error.mistakes[0]}") from None
    try:
        expected = config_of(settings, config["pred_num_mask_tokens"])
    except WeightsRefused as error:
        raise WeightsRefused(f"{where}: fastjepa.settings: {error}") from None
    for key, value in expected.items():
        given = config[key]
        if key == "mlp_ratio":  # a ratio of 48/11 may have been written with fewer digits
            value, given = int(config["hidden_size"] * value), int(config["hidden_size"] * given)
        if key != "num_pooler_layers" and given != value:
            raise WeightsRefused(f"{where}: {key}: its settings make it {expected[key]}, given {config[key]}")


def _fit(path: Path, config: Mapping[str, Any], networks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Errors: WeightsRefused where the entries are not those that config.json tells of."""
    file = path / MODEL
    if "encoder" not in networks:
        raise WeightsRefused(f"{file} holds no encoder")
    _expect(file, VisionTransformer, encoder_arguments(config), networks["encoder"], "encoder")
    if "predictor" in networks:
        _expect(file, VisionTransformerPredictor, predictor_arguments(config), networks["predictor"], "predictor")
    if "classifier" in networks:
        state = networks["classifier"]
        classes = len(state["linear.weight"]) if "linear.weight" in state else 0
        labels = config.get("id2label")
        arguments = {"config": config, "classes": max(classes, 1)}
        _expect(file, build_classifier, arguments, state, "classifier")
        if isinstance(labels, Mapping) and len(labels) != classes:
            raise WeightsRefused(f"{path / CONFIG}: id2label: expected {classes} labels, given {len(labels)}")


def _expect(file: Path, build: Any, arguments: Mapping[str, Any], state: Mapping[str, Tensor], what: str) -> None:
    try:
        with torch.device("meta"):
            network: nn.Module = build(**arguments)
    except ValueError as error:
        raise WeightsRefused(f"{file.with_name(CONFIG)}: no {what.replace('_', ' ')} is built so: {error}") from None
    expected = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    given = {key: list(tensor.shape) for key, tensor in state.items()}
    unlike = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
    if unlike:
        key = unlike[0]
        raise WeightsRefused(
            f"{file} does not fit {CONFIG}: {what}.{one_paragraph(key)[:100]}: expected "
            f"{expected.get(key, 'nothing')}, given {given.get(key, 'nothing')}"
            + (f", and {len(unlike) - 1} more" if len(unlike) > 1 else "")
        )


def _licence(path: Path) -> tuple[str, str]:
    """What the model card names, or that of the published weights."""
    try:
        with (path / CARD).open(encoding="utf-8") as file:
            text = file.read(LONGEST_CARD)
    except (OSError, UnicodeDecodeError):
        return ROTARY_LICENCE, ROTARY_LICENCE_ID
    front = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
    line = re.search(r"(?m)^license:[ \t]*(.*?)[ \t]*(?:#.*)?$", front)
    named = "" if line is None else line[1].strip("\"'")
    if line is None or named == ROTARY_LICENCE_ID:
        return ROTARY_LICENCE, ROTARY_LICENCE_ID
    # What is not one plain name is left for a person to read.
    known = named if re.fullmatch(r"[\w.+-]+", named) else "other"
    return f"{one_paragraph(named)[:100] or known}, as the model card of {path.name} says", known
