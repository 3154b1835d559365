"""Which generation a checkpoint of the public code is of, and what a rotary network leaves aside."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastjepa.config import Settings
from fastjepa.fit import TABLES, Networks
from fastjepa.interop.weights import (
    META_LICENCE,
    META_LICENCE_ID,
    ROTARY_LICENCE,
    ROTARY_LICENCE_ID,
    WeightsRefused,
)

# Entries that only one relative of V-JEPA 2 has, by a part of their names, and what it is.
RELATIVES = {
    "norms_block": "V-JEPA 2.1",
    "video_mod_embed": "V-JEPA 2.1",
    "patch_embed_img": "V-JEPA 2.1",
    "action_encoder": "the action-conditioned V-JEPA 2-AC",
}


def refuse_relatives(path: Path, networks: Mapping[str, Mapping[Any, Any]]) -> None:
    """Errors: WeightsRefused, which names the model, for V-JEPA 2.1 and 2-AC: networks of other parts."""
    for network, state in networks.items():
        for part, model in RELATIVES.items():
            key = next((str(key) for key in state if part in str(key).split(".")), None)
            if key is not None:
                raise WeightsRefused(
                    f"{path} holds {model} ({network}.{key[:100]}), which this version cannot read: expected V-JEPA "
                    "or V-JEPA 2"
                )


def is_second(path: Path, networks: Networks) -> bool:
    """Whether these networks are of V-JEPA 2: rotary, with or without position tables that nothing reads.

    The scripts of V-JEPA 2 save the tables that they do not use. Then the mask tokens tell: they allot some for each
    data set and train those of the first ones alone; more than two of them in a file that ends in .pt, as those of the
    second generation do. A table without a predictor tells nothing, and is taken for one that is read.
    """
    if not any(TABLES[name] in state for name, state in networks.items() if name != "predictor"):
        return True
    tokens = mask_tokens(networks.get("predictor", {}))
    return trained_first_only(tokens) or (path.suffix == ".pt" and len(tokens) > 2)


def without_tables(networks: Networks) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The networks less their position tables, and the names of these ("encoder.pos_embed")."""
    left = [f"{name}.{TABLES[name]}" for name, state in networks.items() if TABLES[name] in state]
    return {
        name: {key: tensor for key, tensor in state.items() if key != TABLES[name]} for name, state in networks.items()
    }, left


def mask_tokens(predictor: Mapping[str, Tensor]) -> list[Tensor]:
    """The mask tokens [1, 1, P] of a predictor's state dict, in the order of their numbers."""
    names = [key for key in predictor if key.startswith("mask_tokens.")]
    return [predictor[key] for key in sorted(names, key=lambda key: (len(key), key))]


def trained_first_only(tokens: list[Tensor]) -> bool:
    """Whether only mask token number 0 was ever trained: all others still are what they began as, zeros."""
    return len(tokens) > 1 and bool(tokens[0].any()) and not any(token.any() for token in tokens[1:])


def licence(second: bool) -> tuple[str, str]:
    """(sentence, id) of the published weights of a generation."""
    return (ROTARY_LICENCE, ROTARY_LICENCE_ID) if second else (META_LICENCE, META_LICENCE_ID)


def other_mask_token(settings: Settings, networks: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Says that transformers' predictor reads a mask token that the run did not train; empty where that is not so.

    Its VJEPA2Model reads number 1, or number 0 where that is the only one.
    """
    tokens = mask_tokens(networks.get("predictor", {}))
    if settings.model.positions != "rope_v2" or not settings.compat.mask_token_by_length or len(tokens) < 2:
        return ""
    return (
        "the run trained mask token 0 alone (compat.mask_token_by_length), and transformers' predictor reads number 1: "
        "features are those of the run, predictions are not"
    )
