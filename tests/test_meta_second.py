"""Files of V-JEPA 2's training script in and out: told from the first generation, begun from, written, opened."""

import json
from pathlib import Path

import pytest
import torch

from fastjepa import configfile
from fastjepa.build import build_encoder, build_jepa
from fastjepa.exits import Exit
from fastjepa.features import embed
from fastjepa.fit import NETWORKS, state_of
from fastjepa.handover import hand_over
from fastjepa.interop import PREFIX, WeightsRefused, load_meta_checkpoint, load_weights, read_weights
from fastjepa.interop.generation import mask_tokens
from fastjepa.interop.meta import licence_of_file
from fastjepa.jepa import JEPA
from fastjepa.opened import open_encoder
from fastjepa.start import start

# What makes the tiny recipe one of the second generation, and shorter.
SECOND = (
    "model.positions=rope_v2", "model.predictor_dim=24", "model.predictor_heads=3", "optim.steps=4",
    "optim.warmup_steps=1", "checkpoint.every=2",
)  # fmt: skip
TOKENS = 10  # of the published predictors


@pytest.fixture
def settings(recipe, tmp_path):
    return lambda *overrides: configfile.load(recipe, [f"log.folder={tmp_path / 'runs'}", *SECOND, *overrides])


def networks_of(settings, tokens=TOKENS):
    """Networks with values everywhere, and as many mask tokens, of which number 0 alone is no zeros."""
    jepa = build_jepa(settings())
    generator = torch.Generator().manual_seed(1)
    networks = {
        name: {key: t + 0.1 * torch.randn(t.shape, generator=generator) for key, t in state.items()}
        for name, state in state_of(jepa).items()
    }
    predictor = {key: t for key, t in networks["predictor"].items() if not key.startswith("mask_tokens.")}
    mine = {f"mask_tokens.{n}": torch.zeros(1, 1, 24) for n in range(tokens)}
    mine["mask_tokens.0"] = networks["predictor"]["mask_tokens.0"]
    networks["predictor"] = mine | predictor
    return networks


def save(path, networks, tables=False, **more):
    """What the second-generation script saves, with the tables that it does not use if asked for."""
    networks = {name: dict(state) for name, state in networks.items()}
    if tables:
        for name, state in networks.items():
            key, width = ("predictor_pos_embed", 24) if name == "predictor" else ("pos_embed", 64)
            state[key] = torch.zeros(1, 32, width)
    content = {name: {PREFIX + key: t for key, t in state.items()} for name, state in networks.items()}
    facts = {"opt": {"state": {}, "param_groups": []}, "scaler": None, "epoch": 9, "loss": 0.5}
    torch.save({**content, **facts, **more}, path)
    return path


@pytest.fixture
def networks(settings):
    return networks_of(settings)


@pytest.fixture
def file(networks, tmp_path):
    return save(tmp_path / "vitl.pt", networks)


def assert_same(got, want):
    assert {name: sorted(state) for name, state in got.items()} == {n: sorted(state) for n, state in want.items()}
    for name, state in want.items():
        assert [key for key, tensor in state.items() if not torch.equal(got[name][key], tensor)] == []


# Which generation


@pytest.mark.parametrize(
    ("name", "tables", "tokens", "trained", "second"),
    [
        ("a.pth.tar", False, 2, "all", True),
        ("a.pt", True, 10, "all", True),
        ("a.pt", True, 10, "first", True),
        ("a.pth.tar", True, 10, "first", True),
        ("a.pth.tar", True, 2, "all", False),
        ("a.pth.tar", True, 4, "all", False),
        ("a.pt", True, 2, "all", False),
        ("a.pt", True, 2, "first", True),
    ],
)
def test_a_file_is_told_by_its_content(settings, tmp_path, name, tables, tokens, trained, second):
    networks = networks_of(settings, tokens)
    if trained == "all":
        networks["predictor"] |= {f"mask_tokens.{n}": torch.ones(1, 1, 24) for n in range(tokens)}
    path = save(tmp_path / name, networks, tables)
    loaded = load_meta_checkpoint(path)
    assert ("second-generation" in loaded.description) == second
    assert loaded.licence_id == ("mit" if second else "cc-by-nc-4.0") == licence_of_file(path)[1]
    if second:
        assert_same(loaded.networks, networks)
        assert ("encoder.pos_embed" in str(loaded.ignored)) == tables
    else:
        assert "pos_embed" in loaded.networks["encoder"]


def test_one_encoder_without_a_table_is_of_the_second_generation(networks, tmp_path):
    """A table beside no mask tokens may be one that is read: nothing tells, so nothing is guessed."""
    path = save(tmp_path / "vitl.pt", {"encoder": networks["encoder"]})
    assert_same(load_meta_checkpoint(path).networks, {"encoder": networks["encoder"]})
    path = save(tmp_path / "table.pt", {"encoder": networks["encoder"]}, tables=True)
    with pytest.raises(WeightsRefused, match="it has no predictor, target_encoder"):
        load_meta_checkpoint(path)
    path = save(tmp_path / "vitl.pth.tar", {"encoder": networks["encoder"]}, tables=True)
    with pytest.raises(WeightsRefused, match="it has no predictor, target_encoder"):
        load_meta_checkpoint(path)


# A run begins from it


def test_every_set_begins_with_the_one_trained_token(settings, networks, file):
    jepa = build_jepa(settings())
    report = load_weights(jepa, load_meta_checkpoint(file))
    said = "           mask tokens: the file has 10, and number 0 alone was trained: all 2 begin with it"
    assert report.count(said) == 1
    for token in jepa.predictor.mask_tokens:
        assert torch.equal(token, networks["predictor"]["mask_tokens.0"])
    for name in ("encoder", "target_encoder"):
        assert_same({name: state_of(jepa)[name]}, {name: networks[name]})


def test_with_tokens_by_length_only_the_first_is_asked(settings, networks, file):
    jepa = build_jepa(settings("compat.mask_token_by_length=true"))
    load_weights(jepa, load_meta_checkpoint(file))
    assert torch.equal(jepa.predictor.mask_tokens[0], networks["predictor"]["mask_tokens.0"])
    assert not jepa.predictor.mask_tokens[1].any()


def test_trained_tokens_go_by_number_and_repeat(settings, networks, tmp_path):
    networks["predictor"] = {k: t for k, t in networks["predictor"].items() if not k.startswith("mask_tokens.")}
    networks["predictor"] |= {f"mask_tokens.{n}": torch.full((1, 1, 24), n + 1.0) for n in range(3)}
    path = save(tmp_path / "a.pt", networks)
    for sets in (2, 3, 5):
        wanted = f"mask.sets=[{', '.join(['{num_blocks: 2}'] * sets)}]"
        jepa = build_jepa(settings(wanted))
        report = "\n".join(load_weights(jepa, load_meta_checkpoint(path)))
        assert [t.mean().item() for t in jepa.predictor.mask_tokens] == [1.0, 2.0, 3.0, 1.0, 2.0][:sets]
        assert ("mask tokens: the file has 3" in report) == (sets != 3)
        assert ("counted around" in report) == (sets == 5)


@pytest.mark.parametrize("held", ["encoder", "target_encoder"])
def test_of_one_encoder_both_begin(settings, networks, tmp_path, held):
    path = save(tmp_path / "a.pt", {held: networks[held], "predictor": networks["predictor"]})
    jepa = build_jepa(settings())
    report = "\n".join(load_weights(jepa, load_meta_checkpoint(path)))
    assert f"one encoder in the file: encoder and target encoder both begin with its {held.replace('_', ' ')}" in report
    assert_same({n: state_of(jepa)[n] for n in ("encoder", "target_encoder")},
                dict.fromkeys(("encoder", "target_encoder"), networks[held]))  # fmt: skip
    path = save(tmp_path / "b.pt", {held: networks[held]})
    with pytest.raises(WeightsRefused, match=r"b\.pt has no predictor: a run begins with an encoder and a predictor"):
        load_weights(jepa, load_meta_checkpoint(path))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.positions=rope", "model.positions: the file was trained with rope_v2, the settings have rope"),
        ("model.positions=table", "model.positions: the file was trained with rope_v2, the settings have table"),
        ("model.name=vit_tiny", "model.name: the file has an encoder 64 wide, 3 blocks deep, with MLPs 256 wide"),
        ("model.predictor_depth=2", "model.predictor_depth: the file has a predictor of 1 blocks, the settings 2"),
        ("model.mlp=swiglu", "model.mlp: the feed-forward layer of the file is not gated"),
        ("data.patch=16", "data.patch: the file has patches of 8 pixels, the settings 16"),
        ("model.targets=noised", "model.targets: the file's predictor has 10 mask tokens"),
    ],
)
def test_settings_that_differ_are_named_and_nothing_is_copied(settings, file, override, words):
    jepa = build_jepa(settings(override))
    before = {key: tensor.clone() for key, tensor in jepa.state_dict().items()}
    with pytest.raises(WeightsRefused) as caught:
        load_weights(jepa, load_meta_checkpoint(file))
    assert words in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in jepa.state_dict().items())


def test_the_first_generation_is_refused_by_rotary_settings(settings, tmp_path):
    networks = state_of(build_jepa(settings("model.positions=table")))
    path = save(tmp_path / "a.pth.tar", networks)
    with pytest.raises(WeightsRefused, match="positions: the file was trained with table, the settings have rope_v2"):
        load_weights(build_jepa(settings()), load_meta_checkpoint(path))


def trained(settings, *overrides):
    """(exit code, the folder of the run) of a run in this process."""
    given = settings(*overrides)
    code = start(given, "tiny")
    (folder,) = Path(given.log.folder).glob("tiny-*")
    return code, folder


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_from_a_file_with_its_loss_and_resumes_exactly(settings, file, tmp_path, capsys):
    """In one command, with longer and larger clips than anything in the file; the file is read once."""
    clips = ["data.frames=8", "data.crop=40"]
    jepa = build_jepa(settings(*clips))
    load_weights(jepa, load_meta_checkpoint(file))
    seen = []

    def spy(self, *arguments, **named):
        out = forward(self, *arguments, **named)
        seen.append(([a.clone() if isinstance(a, torch.Tensor) else a for a in arguments], out.loss.item()))
        return out

    forward = JEPA.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JEPA, "forward", spy)
        code, whole = trained(settings, f"init.from={file}", *clips, f"log.folder={tmp_path / 'whole'}")
    assert code == Exit.DONE
    said = capsys.readouterr().out
    assert "a second-generation V-JEPA checkpoint (V-JEPA 2), of epoch 9" in said
    assert said.count("MIT") == 1
    assert "positions are rotary: the file does not tell its clips, now 8 frames of 40 px, 100 tokens a clip" in said
    with torch.no_grad():
        alone = jepa(*seen[0][0]).loss.item()
    assert seen[0][1] == pytest.approx(alone, rel=1e-5)
    assert losses(whole)[0] == pytest.approx(alone, rel=1e-5)
    parts = [f"init.from={file}", *clips, f"log.folder={tmp_path / 'parts'}"]
    assert trained(settings, *parts, "runtime.stop_at=2")[0] != Exit.WRONG_INPUT
    file.unlink()
    code, again = trained(settings, *parts)
    assert code == Exit.DONE
    assert losses(again) == losses(whole)
    assert_same(read_weights(again).networks, read_weights(whole).networks)


def test_the_licence_follows_a_file_that_is_gone(settings, file, tmp_path):
    _, folder = trained(settings, f"init.from={file}")
    assert read_weights(folder).licence_id == "mit"
    file.unlink()
    assert read_weights(folder).licence_id == "mit"


# Written, taken in, opened


def test_a_run_is_handed_over_and_back_to_the_bit(settings, file, tmp_path):
    _, run = trained(settings, f"init.from={file}")
    stored = read_weights(run).networks
    said = "\n".join(hand_over(run, tmp_path / "out.pt", "meta"))
    assert "cannot go on training" in said
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {f"{PREFIX}{key}" for key in stored["predictor"]} == set(content["predictor"])
    assert content["opt"] is None
    assert not any(key.endswith("pos_embed") for name in NETWORKS for key in content[name])
    back = read_weights(tmp_path / "out.pt")
    assert_same(back.networks, stored)
    assert (back.heads, back.licence_id) == ((2, 3), "mit")
    hand_over(tmp_path / "out.pt", tmp_path / "folder", everything=None)
    assert_same(read_weights(tmp_path / "folder").networks, stored)
    hand_over(tmp_path / "folder", tmp_path / "again.pt", "meta")
    assert_same(read_weights(tmp_path / "again.pt").networks, stored)
    jepa = build_jepa(settings())
    assert "mask tokens" not in "\n".join(load_weights(jepa, read_weights(tmp_path / "again.pt"))[-4:])
    assert_same(state_of(jepa), stored)


def test_the_usual_order_of_angles_is_not_handed_over(settings, tmp_path):
    _, run = trained(settings, "model.positions=rope", "optim.steps=2")
    with pytest.raises(WeightsRefused, match=r"rotary positions in the usual order \(model.positions=rope\)"):
        hand_over(run, tmp_path / "out.pt", "meta")
    assert not (tmp_path / "out.pt").exists()


def test_a_published_file_is_taken_in_whole(settings, networks, file, tmp_path):
    said = "\n".join(hand_over(file, tmp_path / "folder", everything=None))
    assert "licence    published weights of this layout are Meta's V-JEPA 2 weights: MIT" in said
    assert "opt (the optimizer starts anew)" in said
    assert "\nheads      2 in the encoder, 2 in the predictor: as published, for the file does not tell them\n" in said
    taken = read_weights(tmp_path / "folder")
    assert_same(taken.networks, networks)
    assert (taken.licence_id, taken.settings["model.positions"]) == ("mit", "rope_v2")
    assert taken.heads is None  # the file does not tell them
    load_weights(build_jepa(settings()), taken)
    hand_over(tmp_path / "folder", tmp_path / "back.pt", "meta")
    assert_same(load_meta_checkpoint(tmp_path / "back.pt").networks, networks)


def test_of_a_file_with_one_encoder_the_predictor_is_kept(networks, tmp_path):
    path = save(tmp_path / "a.pt", {name: networks[name] for name in ("encoder", "predictor")})
    said = "\n".join(hand_over(path, tmp_path / "folder", everything=None))
    assert "predictor into predictor" in said
    assert "note       one encoder: both of a run that goes on from here begin with it" in said
    taken = read_weights(tmp_path / "folder").networks
    assert_same({n: taken[n] for n in ("encoder", "predictor")}, {n: networks[n] for n in ("encoder", "predictor")})


@pytest.mark.parametrize("crop", [32, 48])
def test_the_target_encoder_is_opened_by_default(settings, networks, file, crop):
    clips = torch.randn(2, 3, 4, crop, crop)
    for network in ("target_encoder", "encoder"):
        own = build_encoder(settings(f"data.crop={crop}")).eval()
        own.load_state_dict(networks[network])
        opened = open_encoder(file, network)
        assert torch.equal(opened.encoder(clips), own(clips))
    assert open_encoder(file).network == "target_encoder"
    data = opened.settings.data
    assert (data.frames, data.crop, data.fps, data.patch) == (64, 256, 4.0, 8)
    assert opened.settings.model.positions == "rope_v2"


def test_features_of_a_video_are_those_of_the_encoder(settings, file, tmp_path):
    _, run = trained(settings, f"init.from={file}")
    hand_over(run, tmp_path / "out.pt", "meta")
    source = "synthetic://moving-shapes?videos=2&size=48&frames=8"
    one, two = (embed(weights, source, pool="tokens").features for weights in (run, tmp_path / "out.pt"))
    assert torch.equal(one, two)
    assert one.abs().max() > 0


def test_mask_tokens_are_in_the_order_of_their_numbers():
    state = {f"mask_tokens.{number}": torch.tensor(number) for number in (10, 2, 0, 1)} | {"norm.bias": torch.ones(1)}
    assert [int(token) for token in mask_tokens(state)] == [0, 1, 2, 10]
