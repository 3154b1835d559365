"""Folders of transformers' V-JEPA 2: read, trained on, and written so that its own classes load them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastjepa.__main__ import main
from fastjepa.build import build_jepa
from fastjepa.config import Compat, Mask, Settings, flat
from fastjepa.exits import Exit
from fastjepa.features import embed
from fastjepa.fit import NETWORKS, state_of
from fastjepa.handover import hand_over
from fastjepa.interop import Weights, WeightsRefused, load_classifier, load_weights, read_weights
from fastjepa.interop.meta import write_meta_checkpoint
from fastjepa.interop.writing import write_folder
from fastjepa.opened import open_encoder, settings_of

transformers = pytest.importorskip("transformers", reason="the peer of these tests is transformers' V-JEPA 2")
NANO = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "pred_hidden_size": 32,
    "pred_num_attention_heads": 4,
    "pred_num_hidden_layers": 1,
    "pred_num_mask_tokens": 2,
    "crop_size": 32,
    "patch_size": 8,
    "frames_per_clip": 4,
    "num_pooler_layers": 2,
    "initializer_range": 0.04,
    "attention_dropout": 0.25,  # of the training of others: kept, and nothing here reads it
}
SETTINGS = Settings.model_validate(
    {
        "model": {
            "name": "vit_nano",
            "positions": "rope_v2",
            "predictor_dim": 32,
            "predictor_heads": 4,
            "predictor_depth": 1,
        },
        "data": {"frames": 4, "tubelet": 2, "patch": 8, "crop": 32},
    }
)
BOTH = pytest.mark.parametrize("cls", ["VJEPA2Model", "VJEPA2ForVideoClassification"])
CLASSES = ["ball", "hoop", "rope"]


def made(cls="VJEPA2Model"):
    """A model of transformers whose every entry is drawn."""
    config = transformers.VJEPA2Config(
        **NANO, id2label=dict(enumerate(CLASSES)), label2id={name: number for number, name in enumerate(CLASSES)}
    )
    torch.manual_seed(5)
    model = getattr(transformers, cls)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def saved(folder, cls="VJEPA2Model", **how):
    model = made(cls)
    model.save_pretrained(folder, **how)
    return model


def reread(folder, cls):
    """What transformers makes of a folder. Nothing in it is missing or left over."""
    model, told = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def own(tmp_path, **changes):
    """Weights of a run of these settings whose two encoders differ."""
    settings = SETTINGS.model_copy(update={"model": SETTINGS.model.model_copy(update=changes)})
    networks = state_of(build_jepa(settings))
    networks["target_encoder"] = {key: tensor * 1.01 for key, tensor in networks["target_encoder"].items()}
    heads = (2, settings.model.predictor_heads or 2)
    return settings, Weights(tmp_path, "a run", networks, [], "yours", heads, flat(settings), 7)


# Both directions


@BOTH
@pytest.mark.parametrize("part", ["5GB", "20KB"])
def test_from_transformers_and_back_to_the_bit(tmp_path, capsys, cls, part):
    model = saved(tmp_path / "theirs", cls, max_shard_size=part)
    assert (tmp_path / "theirs" / "model.safetensors").exists() == (part == "5GB")
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == Exit.DONE
    said = capsys.readouterr().out
    assert "MIT" in said
    assert "as a folder with the target encoder and predictor" in said
    assert ("a classifier of 3 classes" in said) == (cls != "VJEPA2Model")
    assert not (tmp_path / "ours" / "pretraining.safetensors").exists()
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "again")]) == Exit.DONE
    again = reread(tmp_path / "again", cls)
    assert_equal(again.state_dict(), model.state_dict())
    told, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "theirs"))
    del told["fastjepa"]
    assert told == expected
    card = (tmp_path / "again" / "README.md").read_text()
    assert "license: mit" in card
    assert "Trained elsewhere" in card


@pytest.mark.parametrize("network", ["target_encoder", "encoder"])
def test_a_run_becomes_a_folder_that_transformers_loads_and_comes_back_to_the_bit(tmp_path, network):
    settings, weights = own(tmp_path)
    write_folder(weights, settings, tmp_path / "out", network, everything=True)
    model = reread(tmp_path / "out", "VJEPA2Model")
    assert isinstance(transformers.AutoModel.from_pretrained(tmp_path / "out"), transformers.VJEPA2Model)
    again = read_weights(tmp_path / "out")
    assert again.networks.keys() == weights.networks.keys()
    for name in NETWORKS:
        assert_equal(again.networks[name], weights.networks[name])
    assert settings_of(again) == settings
    assert (again.step, again.licence, again.heads) == (7, "yours", (2, 4))
    video = torch.randn(2, 3, 4, 32, 32)
    opened = open_encoder(tmp_path / "out", network)
    expected = model(video.transpose(1, 2), skip_predictor=True).last_hidden_state
    assert (opened.encoder(video) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert_equal(opened.encoder.state_dict(), weights.networks[network])
    assert "fastjepa.transformers_model" not in (tmp_path / "out" / "README.md").read_text()
    # And what transformers saves again still has the settings of the run, with one encoder.
    model.save_pretrained(tmp_path / "saved")
    one = read_weights(tmp_path / "saved")
    assert settings_of(one) == settings
    assert one.networks.keys() == {network, "predictor"}
    assert_equal(one.networks[network], weights.networks[network])


def test_by_way_of_the_public_layout_nothing_changes(tmp_path):
    settings, weights = own(tmp_path)
    write_folder(weights, settings, tmp_path / "straight", "target_encoder", everything=True)
    hand_over(tmp_path / "straight", tmp_path / "public.pt", "meta")
    hand_over(tmp_path / "public.pt", tmp_path / "around", everything=True)
    for name in ("model.safetensors", "pretraining.safetensors"):
        assert_equal(load_file(tmp_path / "around" / name), load_file(tmp_path / "straight" / name))
    assert settings_of(read_weights(tmp_path / "around")) == settings


def test_the_one_encoder_of_a_folder_is_written_as_both_in_the_public_layout(tmp_path):
    saved(tmp_path / "theirs")
    report = hand_over(tmp_path / "theirs", tmp_path / "public.pt", "meta")
    assert "note       one encoder in what was read: it is written as the encoder, too" in report
    read, theirs = (read_weights(tmp_path / name).networks for name in ("public.pt", "theirs"))
    assert_equal(read["encoder"], theirs["target_encoder"])
    assert_equal(read["target_encoder"], theirs["target_encoder"])
    assert_equal(read["predictor"], theirs["predictor"])
    whole = hand_over(tmp_path / "public.pt", tmp_path / "again.pt", "meta")
    assert not [line for line in whole if "one encoder" in line]


def test_that_transformers_reads_another_mask_token_than_was_trained_is_said(tmp_path):
    for by_length in (False, True):
        settings, weights = own(tmp_path)
        settings = settings.model_copy(update={"compat": Compat(mask_token_by_length=by_length)})
        file = tmp_path / f"{by_length}.pt"
        write_meta_checkpoint(replace(weights, settings=flat(settings)), settings, file)
        said = [line for line in hand_over(file, tmp_path / str(by_length)) if "mask token" in line]
        assert [line.partition(" (")[0] for line in said] == (
            ["note       the run trained mask token 0 alone"] if by_length else []
        )
        card = (tmp_path / str(by_length) / "README.md").read_text()
        assert (
            "The run trained mask token 0 alone (compat.mask_token_by_length), and transformers'" in card
        ) == by_length
    predictor = {key: t for key, t in weights.networks["predictor"].items() if key != "mask_tokens.1"}
    networks = weights.networks | {"predictor": predictor}
    one = settings.model_copy(update={"mask": Mask(sets=SETTINGS.mask.sets[:1])})
    write_meta_checkpoint(replace(weights, settings=flat(one), networks=networks), one, tmp_path / "one.pt")
    assert not [line for line in hand_over(tmp_path / "one.pt", tmp_path / "one") if "mask token" in line]


def test_values_are_converted_where_that_is_asked_for(tmp_path):
    saved(tmp_path / "theirs", "VJEPA2ForVideoClassification")
    hand_over(tmp_path / "theirs", tmp_path / "half", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_without_a_predictor_is_an_encoder(tmp_path):
    model = saved(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if key.startswith("encoder.")}, file)
    hand_over(tmp_path / "theirs", tmp_path / "ours", everything=None)
    weights = read_weights(tmp_path / "ours")
    assert list(weights.networks) == ["target_encoder"]
    video = torch.randn(1, 3, 4, 32, 32)
    expected = model(video.transpose(1, 2), skip_predictor=True).last_hidden_state
    assert (open_encoder(tmp_path / "ours").encoder(video) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_classifier_of_a_folder_gives_the_logits_of_transformers(tmp_path):
    model = saved(tmp_path / "theirs", "VJEPA2ForVideoClassification")
    video = torch.randn(2, 3, 4, 32, 32)
    expected = model(video.transpose(1, 2)).logits
    found = load_classifier(tmp_path / "theirs")(open_encoder(tmp_path / "theirs").encoder(video))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    saved(tmp_path / "plain")
    with pytest.raises(WeightsRefused, match="holds no classifier: expected a folder of VJEPA2ForVideoClassification"):
        load_classifier(tmp_path / "plain")


# Whose they are


@pytest.mark.parametrize(
    ("card", "licence", "name"),
    [
        (None, "published weights of this layout are Meta's V-JEPA 2 weights: MIT", "mit"),
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n", "apache-2.0, as the model card of theirs says", "apache-2.0"),
        ("---\nlicense: 'cc-by-nc-4.0' # no\n---\n", "cc-by-nc-4.0, as the model card of theirs says", "cc-by-nc-4.0"),
        ("---\nlicense: [a, b]\n---\n", "[a, b], as the model card of theirs says", "other"),
        ("# license: gpl\n", "published weights of this layout are Meta's V-JEPA 2 weights: MIT", "mit"),
    ],
)  # fmt: skip
def test_the_licence_is_that_of_the_card(tmp_path, card, licence, name):
    saved(tmp_path / "theirs")
    if card is not None:
        (tmp_path / "theirs" / "README.md").write_text(card)
    weights = read_weights(tmp_path / "theirs")
    assert (weights.licence, weights.licence_id) == (licence, name)
    hand_over(tmp_path / "theirs", tmp_path / "ours")
    assert read_weights(tmp_path / "ours").licence == licence


# Trained on


def test_a_run_begins_from_the_networks_of_a_folder(tmp_path):
    saved(tmp_path / "theirs")
    jepa = build_jepa(SETTINGS)
    weights = read_weights(tmp_path / "theirs")
    report = "\n".join(load_weights(jepa, weights))
    assert "one encoder in the file: encoder and target encoder both begin with its target encoder" in report
    assert "heads: 2 in the encoder, 4 in the predictor, as in that run" in report
    for name, source in zip(NETWORKS, ("target_encoder", "predictor", "target_encoder")):
        assert_equal(state_of(jepa)[name], weights.networks[source])
    assert jepa.encoder.norm.weight.data_ptr() != jepa.target_encoder.norm.weight.data_ptr()


def test_mask_tokens_that_were_never_trained_are_not_taken(tmp_path):
    model = made()
    tokens = torch.zeros(10, 1, 1, 32)
    tokens[0] = 0.5
    model.predictor.embeddings.mask_tokens = torch.nn.Parameter(tokens)
    model.config.pred_num_mask_tokens = 10
    model.save_pretrained(tmp_path / "theirs")
    jepa = build_jepa(SETTINGS)
    report = load_weights(jepa, read_weights(tmp_path / "theirs"))
    assert any("the file has 10, and number 0 alone was trained: all 2 begin with it" in line for line in report)
    assert all((token == 0.5).all() for token in jepa.predictor.mask_tokens)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": "rope"}, "model.positions: the file was trained with rope_v2, the settings have rope"),
        ({"predictor_heads": 2}, "model.predictor_heads: the file was trained with 4, the settings have 2"),
        ({"predictor_depth": 2}, "model.predictor_depth: the file has a predictor of 1 blocks, the settings 2"),
    ],
)
def test_other_settings_are_named(tmp_path, changes, words):
    saved(tmp_path / "theirs")
    hand_over(tmp_path / "theirs", tmp_path / "ours", everything=None)
    settings, _ = own(tmp_path, **changes)
    for folder in ("theirs", "ours"):
        with pytest.raises(WeightsRefused) as caught:
            load_weights(build_jepa(settings), read_weights(tmp_path / folder))
        assert words in str(caught.value)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


SIZES = ["model.positions=rope_v2", "model.predictor_dim=32", "model.predictor_heads=4"]
STILL = ["optim.lr=0", "optim.start_lr=0", "optim.final_lr=0", "optim.momentum=1.0", "optim.final_momentum=1.0"]


def test_a_run_that_moves_nothing_gives_the_folder_back(run, tmp_path):
    model = saved(tmp_path / "theirs")
    # Rotary positions take other clips than the folder's.
    code, folder = run(f"init.from={tmp_path / 'theirs'}", *SIZES, *STILL, "data.crop=48")
    assert code == Exit.DONE
    hand_over(folder, tmp_path / "after")
    assert_equal(reread(tmp_path / "after", "VJEPA2Model").state_dict(), model.state_dict())
    assert read_weights(tmp_path / "after").licence_id == "mit"


def test_a_run_from_a_folder_trains_and_resumes_exactly(run, tmp_path):
    saved(tmp_path / "theirs")
    begin = [f"init.from={tmp_path / 'theirs'}", *SIZES]
    code, whole = run(*begin, folder="whole")
    assert code == Exit.DONE
    _, still = run(*begin, *STILL, folder="still")
    assert losses(still)[0] == losses(whole)[0]
    assert losses(still)[-1] != losses(whole)[-1]
    hand_over(tmp_path / "theirs", tmp_path / "ours", everything=None)
    _, copied = run(f"init.from={tmp_path / 'ours'}", *SIZES, folder="copied")
    assert losses(copied) == losses(whole)
    run(*begin, "runtime.stop_at=4", folder="parts")
    code, parts = run(*begin, folder="parts")
    assert code == Exit.DONE
    assert losses(parts) == losses(whole)


# Features of videos


def test_features_of_a_clip_are_the_hidden_state_of_transformers(tmp_path, monkeypatch):
    model = saved(tmp_path / "theirs")
    opened = open_encoder(tmp_path / "theirs")
    seen = []
    inner = opened.encoder.forward
    monkeypatch.setattr(opened.encoder, "forward", lambda clips, *more: seen.append(clips) or inner(clips, *more))
    found = embed(
        opened, "synthetic://moving-shapes?videos=2&size=48&frames=40", central=True, pool="tokens", device="cpu"
    )
    assert seen
    expected = model(torch.cat(seen).transpose(1, 2), skip_predictor=True).last_hidden_state
    tokens = torch.as_tensor(found.features).view_as(expected)
    assert (tokens - expected).abs().max() < 1e-4 * expected.abs().max()


def test_embed_and_probe_take_the_folder(tmp_path, capsys):
    saved(tmp_path / "theirs", "VJEPA2ForVideoClassification")
    folder, videos = str(tmp_path / "theirs"), "synthetic://moving-shapes?videos=16&size=48&frames=40"
    assert main(["embed", folder, videos, "--out", str(tmp_path / "f.safetensors"), "--device", "cpu"]) == Exit.DONE
    assert load_file(tmp_path / "f.safetensors")["features"].shape[1] == 64
    how = ["--probe", "knn", "--data", videos, "--no-untrained", "--device", "cpu", "--out", str(tmp_path / "probe")]
    assert main(["probe", folder, *how]) == Exit.DONE
    assert "knn probe" in capsys.readouterr().out


# What is refused


def edited(folder, **changes):
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def entries(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def parted(folder, places):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


DAMAGE = {
    "another activation": (lambda f: edited(f, hidden_act="silu"), "hidden_act: expected gelu, given 'silu'"),
    "no biases": (lambda f: edited(f, qkv_bias=False), "qkv_bias: expected True, given False"),
    "a width in words": (lambda f: edited(f, hidden_size="64"), "hidden_size: expected a number, given '64'"),
    "an endless depth": (lambda f: edited(f, pred_num_hidden_layers=10**9), "pred_num_hidden_layers: expected 1 to"),
    "heads that do not divide": (
        lambda f: edited(f, num_attention_heads=3),
        "hidden_size 64 is no multiple of num_attention_heads 3",
    ),
    "no named size": (lambda f: edited(f, num_attention_heads=4), "with 4 heads and MLPs 256 wide is no named size"),
    "a depth that is not there": (
        lambda f: edited(f, pred_num_hidden_layers=2),
        "does not fit config.json: predictor.predictor_blocks.1.attn.proj.bias: expected [32], given nothing",
    ),
    "the width of the default": (lambda f: edited(f, hidden_size=None), "1024 wide, 3 blocks deep"),
    "a missing layer": (
        lambda f: entries(f, lambda s: s.pop("encoder.layer.2.norm1.weight")),
        "encoder.blocks.2.norm1.weight: expected [64], given nothing",
    ),
    "no encoder": (
        lambda f: entries(f, lambda s: [s.pop(key) for key in list(s) if key.startswith("encoder.")]),
        "holds no encoder",
    ),
    "an entry of something else": (
        lambda f: entries(f, lambda s: s.update({"decoder.weight": torch.zeros(2)})),
        "decoder.weight is no entry of a V-JEPA 2 model",
    ),
    "a place above": (lambda f: parted(f, {"a": "../part.safetensors"}), "expected names of safetensors in this"),
    "no list of parts": (lambda f: parted(f, ["part.safetensors"]), "weight_map: expected names of files"),
    "a part without its entry": (
        lambda f: parted(f, {"a": "part.safetensors", "b": "part.safetensors"}),
        "model.safetensors.index.json lists it there, and it is not",
    ),
    "a part that is away": (lambda f: parted(f, {"a": "gone.safetensors"}), "gone.safetensors cannot be read"),
    "a size that contradicts": (
        lambda f: (hand_over(f, f / "x"), edited(f / "x", crop_size=64), (f / "x").rename(f.with_name("x")),
                   [p.unlink() for p in f.iterdir()], [p.rename(f / p.name) for p in f.with_name("x").iterdir()]),
        "crop_size: its settings make it 32, given 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_sentence(tmp_path, capsys, kind):
    folder = tmp_path / "theirs"
    saved(folder)
    damage, words = DAMAGE[kind]
    damage(folder)
    capsys.readouterr()
    assert main(["export", str(folder), str(tmp_path / "out")]) == Exit.WRONG_INPUT
    err = capsys.readouterr().err
    assert words in err
    assert str(folder) in err
    assert err.count("\n") == 1
    assert len(err) < 700
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": "rope"}, "model.positions=rope: transformers' V-JEPA 2 is not this network"),
        ({"mlp": "swiglu"}, "model.mlp=swiglu: transformers' V-JEPA 2 is not this network"),
        ({"targets": "noised"}, "model.targets=noised: transformers' V-JEPA 2 is not this network"),
        ({"qk_scale": 0.5}, "expected model.qk_scale=null"),
    ],
)
def test_other_networks_are_not_written_as_if_they_were_its(tmp_path, changes, words):
    settings, weights = own(tmp_path, **changes)
    with pytest.raises(WeightsRefused) as caught:
        write_folder(weights, settings, tmp_path / "out", "encoder", everything=False)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}: model.")
    assert not (tmp_path / "out").exists()
