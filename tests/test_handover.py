"""Weights handed over and taken in: to the bit, with their licence, and refused in a sentence where they do not fit."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastjepa import config
from fastjepa.__main__ import main
from fastjepa.build import build_jepa
from fastjepa.config import Settings
from fastjepa.exits import Exit
from fastjepa.fit import NETWORKS, state_of
from fastjepa.handover import hand_over
from fastjepa.interop import PREFIX, Weights, WeightsRefused, load_meta_checkpoint, load_own_checkpoint, read_weights
from fastjepa.interop.writing import write_folder
from fastjepa.opened import open_encoder

SETTINGS = Settings.model_validate(
    {
        "model": {"name": "vit_nano", "predictor_dim": 32, "predictor_depth": 1},
        "data": {"frames": 16, "tubelet": 2, "patch": 16, "crop": 32},
    }
)
FACTS = {"epoch": 7, "loss": 0.123456789, "batch_size": 24, "world_size": 2, "lr": 6.25e-4}


def networks(dtype=torch.float32):
    state = state_of(build_jepa(SETTINGS))
    state["target_encoder"] = {key: tensor + 0.25 for key, tensor in state["target_encoder"].items()}
    return {name: {key: t.to(dtype) for key, t in part.items()} for name, part in state.items()}


def published(path, dtype=torch.float32):
    """A checkpoint in the public layout; returns its networks."""
    made = networks(dtype)
    content = {name: {PREFIX + k: t for k, t in state.items()} for name, state in made.items()}
    torch.save({**content, "opt": None, "scaler": None, **FACTS}, path)
    return made


def assert_same(given, expected):
    assert given.keys() == expected.keys()
    for name, state in expected.items():
        assert given[name].keys() == state.keys()
        for key, tensor in state.items():
            assert given[name][key].dtype == tensor.dtype, key
            assert torch.equal(given[name][key], tensor), key


@pytest.fixture
def folder(tmp_path):
    """An exported folder with all three networks."""
    published(tmp_path / "a.pth.tar")
    hand_over(tmp_path / "a.pth.tar", tmp_path / "folder", everything=None)
    return tmp_path / "folder"


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", ["target_encoder", "encoder"])
def test_published_weights_come_back_to_the_bit(tmp_path, capsys, dtype, network):
    made = published(tmp_path / "a.pth.tar", dtype)
    assert main(["import", str(tmp_path / "a.pth.tar"), str(tmp_path / "in"), "--network", network]) == Exit.DONE
    out = capsys.readouterr().out
    assert "CC BY-NC 4.0, for non-commercial use only" in out
    assert "predictor into predictor: all of its" in out
    assert_same(read_weights(tmp_path / "in").networks, made)
    assert_same({"one": load_file(tmp_path / "in" / "model.safetensors")}, {"one": made[network]})
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "b.pth.tar"), "--format", "meta"]) == Exit.DONE
    assert "cannot go on training" in capsys.readouterr().out
    back = load_meta_checkpoint(tmp_path / "b.pth.tar")
    assert_same(back.networks, made)
    assert back.facts == FACTS
    assert (back.licence_id, back.heads) == ("cc-by-nc-4.0", None)
    content = torch.load(tmp_path / "b.pth.tar")  # as the public code reads it, but for `weights_only`
    assert all(key.startswith("module.backbone.") for name in NETWORKS for key in content[name])


def test_a_run_begins_from_an_exported_run_and_keeps_its_weights(run, tmp_path):
    _, first = run("optim.steps=2")
    made = load_own_checkpoint(first).networks
    report = hand_over(first, tmp_path / "all", everything=True, licence="Apache-2.0")
    assert any("apache-2.0, named at export" in line for line in report)
    assert_same(read_weights(tmp_path / "all").networks, made)
    still = ["optim.lr=0", "optim.start_lr=0", "optim.final_lr=0", "optim.momentum=1.0"]
    code, second = run(f"init.from={tmp_path / 'all'}", "optim.steps=1", "optim.warmup_steps=0", *still, folder="again")
    assert code == Exit.DONE
    assert_same(load_own_checkpoint(second).networks, made)
    assert load_own_checkpoint(second).licence_id == "apache-2.0"
    hand_over(second, tmp_path / "meta.pth.tar", "meta")
    assert_same(load_meta_checkpoint(tmp_path / "meta.pth.tar").networks, made)
    text = (tmp_path / "all" / "README.md").read_text()
    assert "license: apache-2.0" in text
    assert "synthetic://moving-shapes" in text


def test_other_values_only_where_another_precision_is_asked_for(folder, tmp_path):
    hand_over(folder, tmp_path / "half", dtype="bfloat16")
    kept = read_weights(folder).networks["target_encoder"]
    assert_same(
        read_weights(tmp_path / "half").networks, {"target_encoder": {k: t.bfloat16() for k, t in kept.items()}}
    )
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


# What goes along


def test_the_card_says_what_one_needs_to_know(folder):
    text = (folder / "README.md").read_text()
    front = text.split("---")[1]
    assert "license: cc-by-nc-4.0" in front
    assert "library_name: fastjepa" in front
    assert "open_encoder" in text
    assert "float32 [B, 3, 16, 32, 32]" in text
    assert "no class for V-JEPA of the first generation" in text


def test_no_place_on_somebodys_disk_is_handed_over(run, tmp_path):
    _, folder = run("optim.steps=1", "optim.warmup_steps=0")
    hand_over(folder, tmp_path / "out")
    hand_over(folder, tmp_path / "out.pth.tar", "meta")
    for path in (tmp_path / "out" / "config.json", tmp_path / "out" / "README.md", tmp_path / "out.pth.tar"):
        assert str(tmp_path).encode() not in path.read_bytes()


def test_probes_of_the_run_stand_on_the_card(run, tmp_path):
    _, folder = run("optim.steps=1", "optim.warmup_steps=0")
    (folder / "probe").mkdir(exist_ok=True)
    for step, share in ((1, 0.75), (9, 0.95)):
        result = {"task": "motion", "trained": share, "chance": 0.1}
        content = {"step": step, "probe": "linear", "results": [result]}
        (folder / "probe" / f"step-{step:07d}.json").write_text(json.dumps(content))
    hand_over(folder, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| linear | motion | 75.0% | 10.0% | 1 |" in text
    assert "95.0%" not in text  # of a later step than these weights


def test_the_licence_goes_through_every_generation(run, tmp_path):
    published(tmp_path / "a.pth.tar")
    sizes = ["model.predictor_dim=32", "data.frames=16", "data.crop=32", "data.patch=16"]
    fine = ["mask.sets.0.spatial_scale=[0.5, 0.5]", "mask.sets.1.spatial_scale=[0.3, 0.3]"]
    begin = [*sizes, *fine, "optim.steps=1", "optim.warmup_steps=0"]
    code, first = run(f"init.from={tmp_path / 'a.pth.tar'}", *begin)
    assert code == Exit.DONE
    _, second = run(f"init.from={first}", *begin, folder="second")
    (tmp_path / "a.pth.tar").unlink()  # a file was always one of the public layout
    assert load_own_checkpoint(second).licence_id == "cc-by-nc-4.0"
    hand_over(second, tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert "license: cc-by-nc-4.0" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(WeightsRefused, match=r"carries cc-by-nc-4\.0 from what it was trained from"):
        hand_over(second, tmp_path / "free", licence="mit")


# One encoder


def test_a_folder_of_one_encoder_opens_and_no_run_begins_from_it(folder, tmp_path, run, capsys):
    hand_over(folder, tmp_path / "one", network="encoder")
    opened = open_encoder(tmp_path / "one")
    assert opened.network == "encoder"
    clips = torch.randn(1, 3, 16, 32, 32)
    assert torch.equal(opened.encoder(clips), open_encoder(folder, "encoder").encoder(clips))
    assert not torch.equal(opened.encoder(clips), open_encoder(folder).encoder(clips))
    with pytest.raises(WeightsRefused, match="holds the encoder only, and the target encoder was asked for"):
        open_encoder(tmp_path / "one", "target_encoder")
    assert run(f"init.from={tmp_path / 'one'}") == (Exit.WRONG_INPUT, None)
    assert "has no predictor: a run begins with an encoder and a predictor at least" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "one"), str(tmp_path / "no"), "--all"]) == Exit.WRONG_INPUT
    assert "holds one encoder only" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


# Places that are taken


@pytest.mark.parametrize("format", ["transformers", "meta"])
def test_nothing_is_overwritten_and_nothing_is_left_half(folder, tmp_path, monkeypatch, format):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    with pytest.raises(WeightsRefused, match="is there already, and nothing is overwritten"):
        hand_over(folder, taken, format)
    assert [path.name for path in taken.iterdir()] == ["mine"]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr("fastjepa.interop.writing.save_file", full)
    monkeypatch.setattr("fastjepa.interop.meta.torch.save", full)
    with pytest.raises(OSError, match="No space left"):
        hand_over(folder, tmp_path / "new", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_empty_folder_is_taken(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    hand_over(folder, tmp_path / "empty")
    assert_same({"t": load_file(tmp_path / "empty" / "model.safetensors")}, {"t": networks()["target_encoder"]})


# Damaged and hostile folders


def edited(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def model(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def noted(folder, change):
    edited(folder, lambda content: change(content["fastjepa"]))


def absurd(folder):
    edited(folder, lambda c: (c["fastjepa"]["settings"].update({"data.crop": 10**9}), c.pop("crop_size")))


def lying(folder):
    """A header that promises more than the file has."""
    path = folder / "model.safetensors"
    header = json.dumps({"pos_embed": {"dtype": "F32", "shape": [10**12, 64], "data_offsets": [0, 256 * 10**12]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())


DAMAGE = {
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
    "brackets": (lambda f: (f / "config.json").write_text("[" * 200_000), "is no JSON"),
    "no UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "cannot be read"),
    "a huge config": (lambda f: (f / "config.json").write_text(" " * 5_000_000), "expected at most"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected 'vjepa' or 'vjepa2', given nothing"),
    "second generation": (lambda f: edited(f, lambda c: c.update(model_type="vjepa2")), "V-JEPA 2"),
    "another model": (lambda f: edited(f, lambda c: c.update(model_type="bert")), "or 'vjepa2', given 'bert'"),
    "nothing of ours": (lambda f: edited(f, lambda c: c.pop("fastjepa")), "has no entry fastjepa"),
    "a number for ours": (lambda f: edited(f, lambda c: c.update(fastjepa=3)), "expected a group of values, given 3"),
    "another format": (lambda f: noted(f, lambda c: c.update(format=9)), "has format 9"),
    "another network": (lambda f: noted(f, lambda c: c.update(network="x")), "given 'x'"),
    "no settings": (lambda f: noted(f, lambda c: c.pop("settings")), "fastjepa.settings: expected a group"),
    "a step in words": (lambda f: noted(f, lambda c: c.update(step="two")), "fastjepa.step: expected a"),
    "an unknown setting": (
        lambda f: noted(f, lambda c: c["settings"].update({"model.nmae": 1})),
        "settings that this version does not take",
    ),
    "an absurd size": (absurd, "pos_embed: expected"),
    "a size that contradicts": (lambda f: edited(f, lambda c: c.update(hidden_size=99)), "hidden_size: its settings"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be read"),
    "in parts": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "in parts"),
    "a lying header": (lying, "is no file of safetensors, or it is damaged"),
    "half a file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "is no file of safetensors, or it is damaged",
    ),
    "whole numbers": (
        lambda f: model(f, lambda s: s.update({"norm.bias": s["norm.bias"].long()})),
        "norm.bias: expected floating-point numbers",
    ),
    "a missing key": (lambda f: model(f, lambda s: s.pop("norm.bias")), "norm.bias: expected [64], given nothing"),
    "no table": (lambda f: model(f, lambda s: s.pop("pos_embed")), "has no pos_embed"),
    "a wrong shape": (
        lambda f: model(f, lambda s: s.update({"norm.bias": torch.zeros(3)})),
        "norm.bias: expected [64], given [3]",
    ),
    "an unknown key": (
        lambda f: model(f, lambda s: s.update(extra=torch.zeros(3))),
        "extra: expected nothing, given [3]",
    ),
    "a strange network": (
        lambda f: save_file({"decoder.x": torch.zeros(3)}, f / "pretraining.safetensors"),
        "expected keys that begin with encoder. or predictor.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_sentence(folder, tmp_path, capsys, kind):
    damage, words = DAMAGE[kind]
    damage(folder)
    assert main(["export", str(folder), str(tmp_path / "out")]) == Exit.WRONG_INPUT
    err = capsys.readouterr().err
    assert words in err
    assert str(folder) in err
    assert err.count("\n") == 1
    assert len(err) < 600
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "3", '{"format": 1}', 3])
def test_a_hostile_note_in_a_public_file_is_a_sentence(tmp_path, text):
    published(tmp_path / "a.pth.tar")
    torch.save({**torch.load(tmp_path / "a.pth.tar"), "fastjepa": text}, tmp_path / "a.pth.tar")
    with pytest.raises(WeightsRefused, match="fastjepa") as caught:
        read_weights(tmp_path / "a.pth.tar")
    assert "\n" not in str(caught.value)


def test_memory_that_two_keys_share_is_written_twice(tmp_path):
    made = networks()
    made["encoder"]["norm.bias"] = made["encoder"]["norm.weight"]
    weights = Weights(tmp_path, "shared", made, [], "yours", settings=config.flat(SETTINGS), heads=(2, 2))
    write_folder(weights, SETTINGS, tmp_path / "out", "encoder", everything=True)
    assert_same(read_weights(tmp_path / "out").networks, made)
