"""transformers' V-JEPA 2 by our names: entries of its state dict, and of its config.json.

E encoder width, P predictor width, M mask tokens. Queries, keys and values lie in three entries there and in one here;
the mask tokens in one entry [M, 1, 1, P] there and in M entries [1, 1, P] here. Values stay the same to the bit.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.config import Settings
from fastjepa.interop.passport import one_paragraph
from fastjepa.interop.weights import WeightsRefused
from fastjepa.models import AttentiveClassifier
from fastjepa.models.vision_transformer import SIZES

MODEL_TYPE = "vjepa2"
MODEL, CLASSIFIER = "VJEPA2Model", "VJEPA2ForVideoClassification"
WRAPPED = "vjepa2."  # how the classification model names the networks inside it
RATE = 4.0  # frames/s of the clips that the published models were trained with
EPS, PREDICTOR_RATIO = 1e-6, 4.0
MASK_TOKENS = "predictor.embeddings.mask_tokens"

# Layers by (our network, our name, their names); * is a number. Where they have several, ours are joined in this order.
_BLOCK = (
    ("norm1", ("norm1",)),
    ("attn.qkv", ("attention.query", "attention.key", "attention.value")),
    ("attn.proj", ("attention.proj",)),
    ("norm2", ("norm2",)),
    ("mlp.fc1", ("mlp.fc1",)),
    ("mlp.fc2", ("mlp.fc2",)),
)
_POOLER_BLOCK = (
    ("norm1", ("layer_norm1",)),
    ("attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("attn.proj", ("self_attn.out_proj",)),
    ("norm2", ("layer_norm2",)),
    ("mlp.fc1", ("mlp.fc1",)),
    ("mlp.fc2", ("mlp.fc2",)),
)
_CROSS = (
    ("norm1", ("layer_norm1",)),
    ("xattn.q", ("cross_attn.q_proj",)),
    ("xattn.kv", ("cross_attn.k_proj", "cross_attn.v_proj")),
    ("norm2", ("layer_norm2",)),
    ("mlp.fc1", ("mlp.fc1",)),
    ("mlp.fc2", ("mlp.fc2",)),
)


def _inside(
    network: str, ours: str, theirs: str, layers: tuple[tuple[str, tuple[str, ...]], ...]
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for name, names in layers:
        yield network, f"{ours}.{name}", tuple(f"{theirs}.{one}" for one in names)


LAYERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("encoder", "patch_embed.proj", ("encoder.embeddings.patch_embeddings.proj",)),
    *_inside("encoder", "blocks.*", "encoder.layer.*", _BLOCK),
    ("encoder", "norm", ("encoder.layernorm",)),
    ("predictor", "predictor_embed", ("predictor.embeddings.predictor_embeddings",)),
    *_inside("predictor", "predictor_blocks.*", "predictor.layer.*", _BLOCK),
    ("predictor", "predictor_norm", ("predictor.layernorm",)),
    ("predictor", "predictor_proj", ("predictor.proj",)),
    *_inside("classifier", "pooler.cross_attention_block", "pooler.cross_attention_layer", _CROSS),
    *_inside("classifier", "pooler.blocks.*", "pooler.self_attention_layers.*", _POOLER_BLOCK),
    ("classifier", "linear", ("classifier",)),
)
_OURS = {(network, ours): theirs for network, ours, theirs in LAYERS}
_THEIRS = {name: (network, ours, theirs) for network, ours, theirs in LAYERS for name in theirs}


def to_transformers(networks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """State dicts of `encoder`, and where there are some `predictor` and `classifier`, as the one of transformers.

    The names are those of its VJEPA2Model, or with a classifier of its VJEPA2ForVideoClassification. Errors:
    WeightsRefused for an entry that these have no place for.
    """
    found: dict[str, Tensor] = {}
    inside = WRAPPED if "classifier" in networks else ""
    for network, state in networks.items():
        before = "" if network == "classifier" else inside
        tokens: dict[int, Tensor] = {}
        for key, tensor in state.items():
            if network == "predictor" and (token := re.fullmatch(r"mask_tokens\.(\d+)", key)):
                tokens[int(token[1])] = tensor
                continue
            if network == "classifier" and key == "pooler.query_tokens":
                found[key] = tensor
                continue
            layer, number, kind = _split(key)
            theirs = _OURS.get((network, layer))
            if theirs is None or kind is None or tensor.shape[0] % len(theirs):
                raise WeightsRefused(f"{network}.{one_paragraph(key)[:100]} has no place in transformers' V-JEPA 2")
            for name, part in zip(theirs, tensor.chunk(len(theirs))):
                found[f"{before}{name.replace('*', number)}.{kind}"] = part
        if tokens:
            found[before + MASK_TOKENS] = torch.stack([tokens[index] for index in sorted(tokens)])
    return found


def from_transformers(state: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    """The networks in a state dict of transformers, by our names: `encoder`, and `predictor` and `classifier` if there.

    Errors: WeightsRefused, which begins with `where`, for an entry that is none of them, or where parts are missing.
    """
    networks: dict[str, dict[str, Tensor]] = {}
    apart: dict[tuple[str, str], dict[int, Tensor]] = {}
    for given, tensor in state.items():
        key = given.removeprefix(WRAPPED)
        if given != key and key in state:
            raise WeightsRefused(f"{where} holds {key} twice, with and without {WRAPPED!r} before its name")
        if key == MASK_TOKENS:
            if tensor.ndim != 4:
                raise WeightsRefused(f"{where}: {key}: expected [M, 1, 1, P], given {list(tensor.shape)}")
            tokens = {f"mask_tokens.{number}": token for number, token in enumerate(tensor)}
            networks.setdefault("predictor", {}).update(tokens)
            continue
        if key == "pooler.query_tokens":
            networks.setdefault("classifier", {})[key] = tensor
            continue
        layer, number, kind = _split(key)
        if layer not in _THEIRS or kind is None:
            raise WeightsRefused(f"{where}: {one_paragraph(given)[:100]} is no entry of a V-JEPA 2 model")
        network, ours, theirs = _THEIRS[layer]
        name = f"{ours.replace('*', number)}.{kind}"
        if len(theirs) == 1:
            networks.setdefault(network, {})[name] = tensor
        else:
            apart.setdefault((network, name), {})[theirs.index(layer)] = tensor
    for (network, name), parts in apart.items():
        layer, number, kind = _split(name)
        theirs = _OURS[network, layer]
        missing = [f"{one.replace('*', number)}.{kind}" for i, one in enumerate(theirs) if i not in parts]
        if missing:
            raise WeightsRefused(f"{where} has no {' and no '.join(missing)}, but what belongs to it")
        shapes = [list(parts[i].shape) for i in range(len(theirs))]
        kinds = {part.dtype for part in parts.values()}
        if any(shape != shapes[0] for shape in shapes) or len(kinds) > 1 or not shapes[0]:
            names = ", ".join(one.replace("*", number) for one in theirs)
            raise WeightsRefused(
                f"{where}: {names}: expected {kind} of one shape and precision, given "
                f"{', '.join(map(str, shapes))} in {', '.join(sorted(map(str, kinds)))}"
            )
        networks.setdefault(network, {})[name] = torch.cat([parts[i] for i in range(len(theirs))])
    return networks


def _split(key: str) -> tuple[str, str, str | None]:
    """(layer with * for its number, the number, weight or bias or None)."""
    layer, _, kind = key.rpartition(".")
    if kind not in ("weight", "bias"):
        return key, "", None
    number = re.search(r"\.(\d+)(?=\.|$)", layer)
    if number is None:
        return layer, "", kind
    return f"{layer[: number.start(1)]}*{layer[number.end(1) :]}", number[1], kind


# The default of every entry that is read: transformers need not write what has its default.
DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "crop_size": 256,
    "frames_per_clip": 64,
    "tubelet_size": 2,
    "hidden_size": 1024,
    "in_chans": 3,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "drop_path_rate": 0.0,
    "mlp_ratio": 4.0,
    "layer_norm_eps": EPS,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "num_pooler_layers": 3,
    "pred_hidden_size": 384,
    "pred_num_attention_heads": 12,
    "pred_num_hidden_layers": 12,
    "pred_num_mask_tokens": 10,
    "pred_zero_init_mask_tokens": True,
    "pred_mlp_ratio": PREDICTOR_RATIO,
}
_FIXED = {"in_chans": 3, "layer_norm_eps": EPS, "qkv_bias": True, "hidden_act": "gelu", "pred_mlp_ratio": 4.0}


def with_defaults(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries of config.json that tell what to build, all of them. Errors: WeightsRefused for another kind."""
    read = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    for key, default in DEFAULTS.items():
        value, number = read[key], isinstance(default, int | float) and not isinstance(default, bool)
        fits = type(value) in ((int, float) if isinstance(default, float) else (int,)) if number else True
        if not fits or (isinstance(default, bool) and not isinstance(value, bool)):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise WeightsRefused(f"{where}: {key}: expected {kind}, given {one_paragraph(repr(value))[:60]}")
        least = 0 if isinstance(default, float) or key == "pred_num_mask_tokens" else 1
        if number and not least <= value <= 10**6:
            raise WeightsRefused(f"{where}: {key}: expected {least} to 1000000, given {value}")
    for key in ("hidden_size", "pred_hidden_size"):
        heads = key.replace("hidden_size", "num_attention_heads")
        if read[key] % read[heads]:
            raise WeightsRefused(f"{where}: {key} {read[key]} is no multiple of {heads} {read[heads]}")
    return read


def encoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of VisionTransformer, from a config with all its entries."""
    return {
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["mlp_ratio"],
        "drop_path_rate": config["drop_path_rate"],
        **_shared(config),
    }


def predictor_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of VisionTransformerPredictor, from a config with all its entries."""
    return {
        "embed_dim": config["hidden_size"],
        "predictor_embed_dim": config["pred_hidden_size"],
        "depth": config["pred_num_hidden_layers"],
        "num_heads": config["pred_num_attention_heads"],
        "mlp_ratio": config["pred_mlp_ratio"],
        "use_mask_tokens": True,
        "num_mask_tokens": config["pred_num_mask_tokens"],
        "zero_init_mask_tokens": config["pred_zero_init_mask_tokens"],
        **_shared(config),
    }


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "img_size": config["crop_size"],
        "patch_size": config["patch_size"],
        "num_frames": config["frames_per_clip"],
        "tubelet_size": config["tubelet_size"],
        "qkv_bias": config["qkv_bias"],
        "init_std": config["initializer_range"],
        "norm_layer": partial(nn.LayerNorm, eps=config["layer_norm_eps"]),
        "use_rope": True,
        "rope_style": "v2",
    }


def build_classifier(config: Mapping[str, Any], classes: int) -> AttentiveClassifier:
    """The pooler and the linear layer of VJEPA2ForVideoClassification: tokens [B, N, E] -> logits [B, classes]."""
    return AttentiveClassifier(
        config["hidden_size"],
        config["num_attention_heads"],
        config["mlp_ratio"],
        depth=config["num_pooler_layers"] + 1,
        norm_layer=partial(nn.LayerNorm, eps=config["layer_norm_eps"]),
        init_std=config["initializer_range"],
        qkv_bias=True,
        num_classes=classes,
        blocks_first=True,
    )


def settings_of_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Dotted settings that build these networks. Errors: WeightsRefused for networks that no setting builds."""
    for key, value in _FIXED.items():
        if config[key] != value:
            raise WeightsRefused(
                f"{where}: {key}: expected {value}, given {one_paragraph(repr(config[key]))[:60]}: no model of this "
                "library is built so"
            )
    shape = (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"])
    hidden = int(config["hidden_size"] * config["mlp_ratio"])
    name = next(
        (
            name
            for name, size in SIZES.items()
            if (size["embed_dim"], size["depth"], size["num_heads"]) == shape
            and int(size["embed_dim"] * size["mlp_ratio"]) == hidden
            and size.get("patch_size", config["patch_size"]) == config["patch_size"]
        ),
        None,
    )
    if name is None:
        raise WeightsRefused(
            f"{where}: an encoder {shape[0]} wide, {shape[1]} blocks deep, with {shape[2]} heads and "
            f"MLPs {hidden} wide is no named size: expected one of {', '.join(SIZES)}"
        )
    return {
        "model.name": name,
        "model.positions": "rope_v2",
        "model.drop_path": float(config["drop_path_rate"]),
        "model.predictor_dim": config["pred_hidden_size"],
        "model.predictor_depth": config["pred_num_hidden_layers"],
        "model.predictor_heads": config["pred_num_attention_heads"],
        "model.init_std": float(config["initializer_range"]),
        "model.zero_init_mask_tokens": config["pred_zero_init_mask_tokens"],
        "data.frames": config["frames_per_clip"],
        "data.fps": RATE,
        "data.crop": config["crop_size"],
        "data.patch": config["patch_size"],
        "data.tubelet": config["tubelet_size"],
    }


def config_of(settings: Settings, mask_tokens: int) -> dict[str, Any]:
    """The entries of config.json for networks of these settings: the inverse of `settings_of_config`.

    Errors: WeightsRefused where transformers' V-JEPA 2 cannot be what the settings build.
    """
    model, data, size = settings.model, settings.data, SIZES[settings.model.name]
    for key, given, expected, why in (
        ("model.positions", model.positions, "rope_v2", "it turns queries and keys by other angles"),
        ("model.mlp", model.mlp, "gelu", "its feed-forward layers have no gate"),
        ("model.predictor_mlp", model.predictor_mlp, "gelu", "its feed-forward layers have no gate"),
        ("model.targets", model.targets, "mask_tokens", "its predictor reads mask tokens"),
        ("model.qk_scale", model.qk_scale, None, "it scales attention scores by the width of a head"),
    ):
        if given != expected:
            raise WeightsRefused(
                f"{key}={given}: transformers' V-JEPA 2 is not this network ({why}); expected {key}="
                f"{'null' if expected is None else expected}"
            )
    return {
        **DEFAULTS,
        "patch_size": data.patch,
        "crop_size": data.crop,
        "frames_per_clip": data.frames,
        "tubelet_size": data.tubelet,
        "hidden_size": size["embed_dim"],
        "num_attention_heads": size["num_heads"],
        "num_hidden_layers": size["depth"],
        "drop_path_rate": model.drop_path,
        "mlp_ratio": size["mlp_ratio"],
        "initializer_range": model.init_std,
        "pred_hidden_size": model.predictor_dim,
        "pred_num_attention_heads": model.predictor_heads or size["num_heads"],
        "pred_num_hidden_layers": model.predictor_depth,
        "pred_num_mask_tokens": mask_tokens,
        "pred_zero_init_mask_tokens": model.zero_init_mask_tokens,
    }
