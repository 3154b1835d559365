"""What shapes tell of rotary networks: the size with its heads, the feed-forward layer, and what a run must change."""

from pathlib import Path

import pytest
import torch

from fastjepa import configfile
from fastjepa.build import build_jepa
from fastjepa.config import Settings
from fastjepa.fit import architecture, heads_of, settings_to_change, state_of
from fastjepa.interop import Weights
from fastjepa.opened import settings_of

ROOT = Path(__file__).parents[1]


def jepa(**model):
    full = {"positions": "rope_v2", "predictor_heads": 12, **model}
    with torch.device("meta"):
        return build_jepa(Settings.model_validate({"model": full, "data": {"crop": 256, "frames": 16}}))


@pytest.mark.parametrize(
    ("name", "heads", "entries"),
    [("vit_large", 16, 292), ("vit_huge", 16, 388), ("vit_giant_xformers", 22, 484)],
)
def test_the_published_sizes_are_known_by_their_shapes(name, heads, entries):
    networks = state_of(jepa(name=name))
    assert len(networks["encoder"]) == entries
    found = architecture(networks)
    assert (found.rotary, found.tokens, found.gated) == (True, None, False)
    assert found.settings() == {
        "model.name": name,
        "model.positions": "rope_v2",
        "model.mlp": "gelu",
        "model.predictor_mlp": "gelu",
        "model.predictor_dim": 384,
        "model.predictor_depth": 12,
        "model.predictor_heads": 12,
        "data.patch": 16,
        "data.tubelet": 2,
    }


@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "swiglu_full"])
@pytest.mark.parametrize("predictor_mlp", ["gelu", "swiglu", "swiglu_full"])
def test_gated_layers_are_known(mlp, predictor_mlp):
    told = architecture(state_of(jepa(name="vit_large", mlp=mlp, predictor_mlp=predictor_mlp))).settings()
    assert (told["model.name"], told["model.mlp"]) == ("vit_large", mlp)
    assert told["model.predictor_mlp"] == predictor_mlp


def test_with_a_table_the_giant_is_that_of_the_first_generation():
    found = architecture(state_of(jepa(name="vit_giant", positions="table", predictor_heads=None)))
    assert (found.name, found.rotary) == ("vit_giant", False)
    assert "model.positions" not in found.settings()


def test_one_encoder_alone_is_enough():
    networks = state_of(jepa(name="vit_large"))
    found = architecture({"target_encoder": networks["target_encoder"]})
    assert (found.name, found.predictor_dim, found.mask_tokens) == ("vit_large", None, 0)
    assert "model.predictor_dim" not in found.settings()


def test_what_a_run_must_change():
    file = state_of(jepa(name="vit_giant_xformers"))
    assert list(settings_to_change(jepa(name="vit_giant_xformers"), file, None)) == []
    assert list(settings_to_change(jepa(name="vit_giant"), file, None)) == [
        "model.name: published networks of this size have 22 heads (vit_giant_xformers), the settings 16"
    ]
    wrong = jepa(name="vit_giant_xformers", predictor_heads=16, predictor_depth=11)
    assert list(settings_to_change(wrong, file, None)) == [
        "model.predictor_depth: the file has a predictor of 12 blocks, the settings 11",
        "model.predictor_heads: published predictors of this width have 12, the settings 16",
    ]
    gated = jepa(name="vit_giant_xformers", predictor_mlp="swiglu_full")
    assert list(settings_to_change(gated, file, None)) == [
        "model.predictor_mlp: the feed-forward layer of the file is not gated (gelu), that of the settings is gated "
        "(swiglu or swiglu_full)"
    ]


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("vjepa2_vitl", "vit_large"),
        ("vjepa2_vitl_cooldown", "vit_large"),
        ("vjepa2_vith", "vit_huge"),
        ("vjepa2_vith_cooldown", "vit_huge"),
        ("vjepa2_vitg", "vit_giant_xformers"),
        ("vjepa2_vitg_cooldown", "vit_giant_xformers"),
        ("vjepa2_vitg_384_cooldown", "vit_giant_xformers"),
    ],
)
def test_the_recipes_take_the_published_files(recipe, name):
    """By shapes: 10 mask tokens in the file are no obstacle, and its settings are found without a recipe."""
    with torch.device("meta"):
        own = build_jepa(configfile.load(ROOT / "configs" / f"{recipe}.yaml"))
        file = state_of(own)
        file["predictor"] |= {f"mask_tokens.{n}": torch.zeros(1, 1, 384) for n in range(10)}
    assert len(file["predictor"]) == 160
    assert list(settings_to_change(own, file, None)) == []
    told = settings_of(Weights(Path("a.pt"), "", file, [], ""))
    assert told.model.name == name
    assert (told.model.positions, told.model.predictor_heads, told.data.crop) == ("rope_v2", 12, 256)
    with torch.device("meta"):
        assert heads_of(build_jepa(told)) == heads_of(own)
