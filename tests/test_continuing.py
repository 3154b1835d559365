"""From one phase of a recipe to the next: longer clips, larger frames, and the state of the optimizer."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file

from fastjepa import checkpoint, configfile
from fastjepa.build import build_jepa
from fastjepa.exits import Exit
from fastjepa.fit import state_of
from fastjepa.handover import hand_over
from fastjepa.interop import Weights, load_weights, read_weights
from fastjepa.loop import Trainer
from fastjepa.opened import open_encoder
from fastjepa.start import start

# What makes the tiny recipe a first phase of the second generation.
FIRST = (
    "model.positions=rope_v2", "model.init_std=0.02", "mask.truncation=group", "optim.steps=4", "optim.start_lr=1e-4",
    "optim.decay=constant", "checkpoint.every=2", "compat.mask_token_by_length=true",
)  # fmt: skip
COOL_DOWN = (
    "optim.steps=6", "optim.warmup_steps=0", "optim.decay=linear", "compat.ipe_scale=1.25",
    "data.frames=8", "data.crop=48",
)  # fmt: skip
TABLES = ("encoder.pos_embed", "target_encoder.pos_embed", "predictor.predictor_pos_embed")


@pytest.fixture
def load(recipe):
    """Settings of the first phase, and what the second changes: later ones take the place of earlier ones."""

    def settings(*overrides):
        given = {text.partition("=")[0]: text for text in (*FIRST, *overrides)}
        return configfile.load(recipe, list(given.values()))

    return settings


@pytest.fixture
def run(load, tmp_path):
    """Train in this process; returns (exit code, the run folder or None)."""

    def go(folder, *overrides):
        code = start(load(f"log.folder={tmp_path / folder}", *overrides), "tiny")
        found = list((tmp_path / folder).glob("tiny-*"))
        return code, found[0] if found else None

    return go


@pytest.fixture
def cool_down(run):
    """The second phase, from this run."""
    return lambda folder, source, *more: run(folder, f"init.from={source}", "init.optimizer=true", *COOL_DOWN, *more)


@pytest.fixture
def begun(monkeypatch):
    """Runs end before their first step; the trainers that they had built."""
    trainers = []

    def look(self, *_):
        trainers.append(self)
        return Exit.DONE

    def stop():
        monkeypatch.setattr(Trainer, "_steps", look)
        return trainers

    return stop


def stored(folder):
    """The tensors of the newest checkpoint of a run."""
    (*_, newest) = sorted((folder / "checkpoints").glob("step-*"))
    return {k: v for shard in newest.glob("*.safetensors") for k, v in load_file(shard).items()}


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"].hex(), row["lr"]) for row in lines]


def unlike(got, want):
    assert got.keys() == want.keys()
    return [key for key in want if not torch.equal(got[key], want[key])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cool_down_begins_with_weights_target_moments_and_loss_scale(
    run, cool_down, begun, dtype, capsys, monkeypatch
):
    # Whether torch's own first scale is too large hangs on how its release rounds.
    scale = inspect.signature(torch.amp.GradScaler).parameters["init_scale"].default
    larger = tuple(4 * scale if value == scale else value for value in torch.amp.GradScaler.__init__.__defaults__)
    monkeypatch.setattr(torch.amp.GradScaler.__init__, "__defaults__", larger)
    _, first = run("first", f"optim.dtype={dtype}")
    want = stored(first)
    assert any(want[key].abs().max() > 0 for key in want if ".exp_avg_sq." in key)
    trainers = begun()
    capsys.readouterr()
    code, _ = cool_down("second", first, f"optim.dtype={dtype}")
    assert code == Exit.DONE
    got = trainers[0].update.tensors()
    skipped = float(want["optim.skipped"])
    assert (skipped > 0) == (dtype == "float16"), "its first scale of the loss is too large"
    assert set(unlike(got, want)) == ({"optim.skipped"} if skipped else set())
    assert got["optim.skipped"] == 0
    assert {float(value) for key, value in want.items() if key.startswith("optim.step.")} == {4.0 - skipped}
    newest = checkpoint.newest(first / "checkpoints", print)
    if dtype == "float16":
        assert trainers[0].scaler.state_dict() == newest.trainer["scaler"]
        assert newest.trainer["scaler"]["scale"] < torch.amp.GradScaler("cpu").get_scale()
    said = capsys.readouterr().out
    assert "from 4 frames of 32 px to 8 frames of 48 px, 144 tokens a clip: rotary positions need no other" in said
    assert f"optimizer  moments and step counts are those of {newest.folder}, step 4\n" in said
    assert "the optimizer starts anew" not in said


def test_rotary_weights_with_the_same_clips_or_of_unknown_ones_are_taken_as_they_are(run, load):
    _, first = run("first")
    weights = read_weights(first)
    assert f"{'':11}positions are rotary, clips as in that run" in load_weights(build_jepa(load()), weights)
    unknown = Weights(first, "of somebody", weights.networks, [], "theirs")
    jepa = build_jepa(load(*COOL_DOWN))
    line = f"{'':11}positions are rotary: the file does not tell its clips, now 8 frames of 48 px, 144 tokens a clip"
    assert line in load_weights(jepa, unknown)
    assert unlike(dict(jepa.encoder.state_dict()), weights.networks["encoder"]) == []


def test_without_the_setting_the_optimizer_starts_anew(run, cool_down, begun, capsys):
    _, first = run("first")
    trainers = begun()
    capsys.readouterr()
    cool_down("second", first, "init.optimizer=false")
    state = trainers[0].update.state()
    assert not any(tensor.any() for tensor in state.values())
    assert "the optimizer starts anew" in capsys.readouterr().out


def test_a_chain_of_both_phases_resumes_to_the_bit(run, cool_down):
    _, first = run("first")
    _, whole = cool_down("whole", first)
    _, cut = cool_down("cut", first, "runtime.stop_at=3")
    first.rename(first.with_name("gone"))
    code, again = cool_down("cut", first)
    assert (code, again) == (Exit.DONE, cut)
    assert rows(cut) == rows(whole)
    assert [step for step, _, _ in rows(whole)] == [1, 2, 3, 4, 5, 6]
    assert unlike(stored(cut), stored(whole)) == []
    trained = {float(value) for key, value in stored(whole).items() if key.startswith("optim.step.")}
    assert trained == {10.0}, "four steps of the first phase and six of the second"
    tokens = [key for key in stored(whole) if "predictor.mask_tokens" in key and key.startswith("optim.step.")]
    assert tokens == ["optim.step.predictor.mask_tokens.0"], "with one length the other token is never read"
    # T = int(1.25 * 6) = 7: a line that is cut off after six of seven steps.
    assert [lr for _, _, lr in rows(whole)] == pytest.approx([1e-3 + n / 7 * (1e-6 - 1e-3) for n in range(1, 7)])
    _, anew = cool_down("anew", first.with_name("gone"), "init.optimizer=false")
    assert rows(anew)[0][1] == rows(whole)[0][1], "the first loss is that of the weights alone"
    assert rows(anew)[1:] != rows(whole)[1:]


def test_a_cool_down_that_was_killed_before_its_first_checkpoint_takes_the_optimizer_again(run, cool_down):
    _, first = run("first")
    _, folder = cool_down("second", first)
    before = stored(folder)
    for path in (folder / "checkpoints").iterdir():
        path.unlink() if path.is_symlink() else path.rename(folder / f"old-{path.name}")
    assert cool_down("second", first) == (Exit.DONE, folder)
    assert unlike(stored(folder), before) == []


def test_position_tables_are_made_for_the_new_grid(run, cool_down, begun, load, capsys):
    _, first = run("first", "model.positions=table")
    trainers = begun()
    capsys.readouterr()
    code, _ = cool_down("second", first, "model.positions=table")
    assert code == Exit.DONE
    drawn = build_jepa(load("model.positions=table", *COOL_DOWN)).state_dict()
    want = {**stored(first), **{key: drawn[key] for key in TABLES}}
    assert drawn["encoder.pos_embed"].shape == (1, 144, 64)
    assert unlike(trainers[0].update.tensors(), want) == []
    said = capsys.readouterr().out
    assert (
        "from 4 frames of 32 px to 8 frames of 48 px, 144 tokens a clip: position tables are made for them; the file's "
        "are equal to the settings' within 0\n" in said
    )


def test_tables_of_as_many_tokens_in_another_grid_are_made_too(run, begun, load, capsys):
    _, first = run("first", "model.positions=table", "data.frames=8", "mask.sets=[{num_blocks: 2}]")
    trainers = begun()
    wider = ("model.positions=table", "data.frames=16", "data.tubelet=4", "data.crop=32", "mask.sets=[{num_blocks: 2}]")
    assert run("tubelet", f"init.from={first}", *wider)[0] == Exit.WRONG_INPUT
    flatter = ("model.positions=table", "data.frames=2", "data.crop=64", "mask.sets=[{num_blocks: 2}]")
    capsys.readouterr()
    assert run("second", f"init.from={first}", *flatter)[0] == Exit.DONE
    encoder = trainers[0].jepa.encoder
    assert torch.equal(encoder.pos_embed, build_jepa(load(*flatter)).encoder.pos_embed)
    assert not torch.equal(encoder.pos_embed, stored(first)["encoder.pos_embed"])
    assert "from 8 frames of 32 px to 2 frames of 64 px, 64 tokens a clip" in capsys.readouterr().out


def test_a_table_of_another_make_is_said_where_it_cannot_be_taken(run, cool_down, begun, capsys):
    _, first = run("first", "model.positions=table", "model.uniform_power=false")
    begun()
    capsys.readouterr()
    cool_down("second", first, "model.positions=table")
    assert "from the settings': is model.uniform_power right?" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "own"), [("rope_v2", "rope"), ("rope", "rope_v2"), ("rope", "table")])
def test_weights_of_other_positions_are_refused(run, cool_down, capsys, given, own):
    _, first = run("first", f"model.positions={given}")
    capsys.readouterr()
    assert cool_down("second", first, f"model.positions={own}") == (Exit.WRONG_INPUT, None)
    said = capsys.readouterr().err
    assert f"\n  model.positions: the file was trained with {given}, the settings have {own}\n" in said


def test_the_optimizer_of_weights_that_have_none_is_refused(run, cool_down, load, tmp_path, capsys):
    jepa = build_jepa(load("model.positions=table"))
    networks = {
        name: {f"module.backbone.{key}": t.clone() for key, t in state.items()}
        for name, state in state_of(jepa).items()
    }
    file = tmp_path / "weights.pth.tar"
    torch.save({**networks, "opt": None, "scaler": None, "epoch": 3}, file)
    assert cool_down("second", file, "model.positions=table") == (Exit.WRONG_INPUT, None)
    assert capsys.readouterr().err == (
        f"init.from: {file} has no optimizer state that a run can go on with: expected a run folder of fastjepa "
        "or a checkpoint in one, or init.optimizer=false, given weights alone (a first-generation V-JEPA checkpoint, "
        "of epoch 3)\n"
    )


def test_a_mask_token_that_was_never_trained_begins_with_moments_of_zero(run, cool_down, begun, capsys):
    _, first = run("first", "runtime.stop_at=3")
    capsys.readouterr()
    trainers = begun()
    assert cool_down("second", first, "compat.mask_token_by_length=false")[0] == Exit.DONE
    said = capsys.readouterr().out
    assert said.count("optimizer  that run did not train mask_tokens.1: moments of zero\n") == 1
    state = trainers[0].update.state()
    for number, steps in (("0", 3), ("1", 0)):
        assert state[f"optim.step.predictor.mask_tokens.{number}"] == steps
        assert bool(state[f"optim.exp_avg.predictor.mask_tokens.{number}"].any()) == (steps > 0)


def test_moments_that_do_not_fit_are_refused_before_there_is_a_run_folder(run, cool_down, capsys, monkeypatch):
    _, first = run("first", "runtime.stop_at=3")
    capsys.readouterr()
    plain = checkpoint.entries
    lost, other = "optim.exp_avg.encoder.norm.weight", "optim.step.predictor.mask_tokens.0"

    def damaged(found):
        kept = {**plain(found), other: ((2,), torch.float64)}
        del kept[lost]
        return kept

    monkeypatch.setattr(checkpoint, "entries", damaged)
    assert cool_down("second", first) == (Exit.WRONG_INPUT, None)
    said = capsys.readouterr().err
    assert said.startswith("init.optimizer: expected false, or a run that trained the same weights, given ")
    assert f"{lost} is missing" in said
    assert f"{other} is torch.float64 [2] instead of torch.float32 []" in said


def test_an_export_of_a_cool_down_is_read_again(run, cool_down, tmp_path):
    _, first = run("first", "model.positions=table")
    _, folder = cool_down("second", first, "model.positions=table")
    hand_over(folder, tmp_path / "out", everything=True)
    assert "- learning rate 0.001 -> 0.000144, linear (0 steps of" in (tmp_path / "out" / "README.md").read_text()
    hand_over(first, tmp_path / "before", everything=True)
    assert "- learning rate 0.0001 -> 0.001, constant (2 steps" in (tmp_path / "before" / "README.md").read_text()
    opened = open_encoder(tmp_path / "out")
    assert (opened.settings.data.frames, opened.settings.data.crop) == (8, 48)
