"""What the layout of the public code can hold, and what is said where other code would compute other things."""

import pytest
import torch

from fastjepa.__main__ import main
from fastjepa.build import build_jepa
from fastjepa.config import Settings, flat
from fastjepa.exits import Exit
from fastjepa.fit import NETWORKS, state_of
from fastjepa.handover import hand_over
from fastjepa.interop import PREFIX, Weights, WeightsRefused, read_weights
from fastjepa.interop.meta import write_meta_checkpoint
from fastjepa.opened import open_encoder, settings_of

MODEL = {"name": "vit_nano", "positions": "rope_v2", "predictor_dim": 32, "predictor_heads": 4, "predictor_depth": 1}
DATA = {"frames": 4, "tubelet": 2, "patch": 8, "crop": 32}


def made(compat=None, **model):
    """Settings, and the networks that they build, of which the two encoders differ."""
    settings = Settings.model_validate({"model": MODEL | model, "data": DATA, "compat": compat or {}})
    networks = state_of(build_jepa(settings))
    networks["target_encoder"] = {key: tensor * 1.01 for key, tensor in networks["target_encoder"].items()}
    return settings, networks


def written(path, compat=None, **model):
    """A file in the public layout of a run with these settings; returns its networks."""
    settings, networks = made(compat, **model)
    weights = Weights(path, "a run", networks, [], "yours", (2, 4), flat(settings), 7)
    write_meta_checkpoint(weights, settings, path)
    return networks


@pytest.mark.parametrize(
    ("mlp", "options"),
    [
        ("gelu", "the public code evaluates this file"),
        ("swiglu", "the public code of V-JEPA 2, told use_silu: true and wide_silu: true, evaluates this file"),
        ("swiglu_full", "the public code of V-JEPA 2, told use_silu: true and wide_silu: false, evaluates this file"),
    ],
)
def test_gated_layers_go_into_the_public_layout_and_back_and_the_public_code_must_be_told(tmp_path, mlp, options):
    networks = written(tmp_path / "a.pt", mlp=mlp)
    (note,) = [line for line in hand_over(tmp_path / "a.pt", tmp_path / "b.pt", "meta") if line.startswith("note")]
    assert note.startswith(f"note       {options} (checkpoint_key")
    read = read_weights(tmp_path / "b.pt")
    assert settings_of(read).model.mlp == mlp
    for name in NETWORKS:
        assert read.networks[name].keys() == networks[name].keys()
        assert all(torch.equal(read.networks[name][key], tensor) for key, tensor in networks[name].items())


@pytest.mark.parametrize(
    "model", [{"mlp": "swiglu"}, {"predictor_mlp": "swiglu"}, {"targets": "noised"}], ids=lambda m: next(iter(m))
)
def test_import_refuses_what_transformers_cannot_be_and_says_what_takes_it(tmp_path, capsys, model):
    file = tmp_path / "a.pt"
    networks = written(file, **model)
    assert main(["import", str(file), str(tmp_path / "no")]) == Exit.WRONG_INPUT
    err = capsys.readouterr().err
    ((key, value),) = model.items()
    assert err.startswith(f"{file}: model.{key}={value}: transformers' V-JEPA 2 is not this network")
    assert err.endswith("(embed, probe and init.from take it as it is)\n")
    opened = open_encoder(file).encoder
    assert torch.equal(opened.state_dict()["norm.weight"], networks["target_encoder"]["norm.weight"])


def test_a_scale_that_the_public_code_would_ignore_is_refused(tmp_path):
    with pytest.raises(WeightsRefused, match=r"by model\.qk_scale=0\.5, which the fused attention of the public code"):
        written(tmp_path / "a.pt", qk_scale=0.5)
    assert not (tmp_path / "a.pt").exists()
    written(tmp_path / "a.pt", compat={"sdpa_ignores_scale": True}, qk_scale=0.5)
    assert settings_of(read_weights(tmp_path / "a.pt")).model.qk_scale == 0.5


@pytest.mark.parametrize("kind", ["one mask set", "position tables"])
def test_where_transformers_reads_the_trained_mask_token_or_none_nothing_is_said(tmp_path, kind):
    by_length = {"mask_token_by_length": True}
    settings, networks = made(by_length, positions="table" if kind == "position tables" else "rope_v2")
    if kind == "one mask set":
        networks["predictor"].pop("mask_tokens.1")
    weights = Weights(tmp_path, "a run", networks, [], "yours", (2, 4), flat(settings), 7)
    write_meta_checkpoint(weights, settings, tmp_path / "a.pt")
    report = hand_over(tmp_path / "a.pt", tmp_path / "out", everything=True)
    assert not [line for line in report if "mask token 0 alone" in line]
    assert "mask token 0 alone" not in (tmp_path / "out" / "README.md").read_text()


def test_an_encoder_alone_makes_no_file_of_the_public_layout(tmp_path):
    networks = written(tmp_path / "a.pt")
    content = {"target_encoder": {PREFIX + key: tensor for key, tensor in networks["target_encoder"].items()}}
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(
        WeightsRefused, match=r"b\.pt has no predictor: a file in the layout of the public code needs an"
    ):
        hand_over(tmp_path / "b.pt", tmp_path / "c.pt", "meta")
    assert not (tmp_path / "c.pt").exists()
