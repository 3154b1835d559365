"""`init.from`: a new run starts from given weights, says so, and never reads them again."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from fastjepa import checkpoint, config, configfile, evaluation
from fastjepa.build import build_jepa
from fastjepa.config import Init, Settings
from fastjepa.configfile import SettingsError, dump, help_text, load
from fastjepa.exits import Exit
from fastjepa.fit import state_of
from fastjepa.interop import WeightsRefused, load_weights, read_weights
from fastjepa.start import start

ROOT = Path(__file__).parents[1]
SETTINGS = """
model: {name: vit_nano, predictor_depth: 1, predictor_dim: 16}
mask:
  sets:
    - {num_blocks: 3, spatial_scale: [0.3, 0.3], temporal_scale: [0.5, 0.5]}
    - {num_blocks: 2, spatial_scale: [0.6, 0.6], temporal_scale: [0.5, 0.5]}
  truncation: random
  group: 4
data:
  path: synthetic://moving-shapes?videos=48&size=48&frames=8
  frames: 4
  stride: 1
  crop: 32
  patch: 8
  batch_size: 4
  workers: 0
optim: {steps: 6, warmup_steps: 2, global_batch: 4, lr: 1e-3, dtype: float32}
runtime: {threads: 1, device: cpu}
log: {every: 1, images: false}
checkpoint: {every: 3, keep: 2}
eval: {probe: none}
"""
NO_MOVEMENT = ["optim.lr=0", "optim.start_lr=0", "optim.final_lr=0", "optim.momentum=1.0"]
LICENCE = "CC BY-NC 4.0, for non-commercial use only"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path = tmp_path / "tiny.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture
def run(recipe, tmp_path):
    """Train in this process; returns (exit code, the folder that was written last or None)."""

    def go(*overrides, folder="runs"):
        settings = configfile.load(recipe, [f"log.folder={tmp_path / folder}", *overrides])
        code = start(settings, "tiny")
        folders = sorted((tmp_path / folder).glob("tiny-*"), key=lambda p: (p / "train.log").stat().st_mtime_ns)
        return code, folders[-1] if folders else None

    return go


@pytest.fixture
def source(recipe):
    """Networks with values of their own, the target encoder unlike the encoder."""
    jepa = build_jepa(configfile.load(recipe, ["optim.seed=5"]))
    with torch.no_grad():
        for parameter in jepa.target_encoder.parameters():
            parameter.mul_(1.01)
    return jepa


@pytest.fixture
def file(source, tmp_path):
    """A checkpoint of the public layout."""
    networks = {
        name: {f"module.backbone.{key}": t.clone() for key, t in state.items()}
        for name, state in state_of(source).items()
    }
    torch.save({**networks, "opt": None, "scaler": None, "epoch": 3}, tmp_path / "weights.pth.tar")
    return tmp_path / "weights.pth.tar"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    networks = read_weights(folder).networks
    return {f"{name}.{key}": tensor for name, state in networks.items() for key, tensor in state.items()}


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [key for key in want if not torch.equal(got[key], want[key])] == []


def losses(folder: Path) -> list[str]:
    return [json.loads(line)["loss"].hex() for line in (folder / "metrics.jsonl").read_text().splitlines()]


# The setting


def test_the_key_is_from_in_files_overrides_dumps_and_help(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("init: {from: a.pth.tar}")
    assert load(path).init.from_ == "a.pth.tar"
    assert load(path, ["init.from=b c.pt"]).init.from_ == "b c.pt"
    assert load(path, ["init.from=null"]) == Settings()
    assert "from: a.pth.tar" in dump(load(path))
    path.write_text(dump(Settings(init=Init(**{"from": "a.pth.tar"}))))
    assert load(path).init.from_ == "a.pth.tar"
    assert config.flat(load(path))["init.from"] == "a.pth.tar"
    assert "  init.from = null\n" in help_text()


def test_the_name_that_the_code_uses_is_no_key(tmp_path):
    (tmp_path / "run.yaml").write_text("init: {from_: a.pth.tar}")
    with pytest.raises(SettingsError, match=r"unknown key init.from_, nearest valid key: init.from$"):
        load(tmp_path / "run.yaml")


def test_other_weights_are_another_run():
    one, two = (Settings(init=Init(**{"from": name})) for name in "ab")
    assert len({config.identity(s, "data") for s in (Settings(), one, two)}) == 3


# A run


def test_a_run_starts_from_the_weights_of_a_file(run, file, source, capsys):
    code, folder = run(f"init.from={file}", *NO_MOVEMENT)
    assert code == Exit.DONE
    assert_equal(weights_of(folder), source.state_dict())
    said, logged = capsys.readouterr().out, (folder / "train.log").read_text()
    for text in (said, logged):
        assert f"weights    {file}, a first-generation V-JEPA checkpoint, of epoch 3\n" in text
        assert "blocks.0-2.attn.qkv.weight [192, 64], .bias [192]" in text
        assert text.count(LICENCE) == 1


def test_the_weights_are_the_start_and_not_the_end(run, file, source):
    _, folder = run(f"init.from={file}")
    _, other = run(folder="other")
    assert losses(folder) != losses(other)
    moved = weights_of(folder)
    assert not torch.equal(moved["encoder.norm.weight"], source.encoder.norm.weight)


def test_a_resumed_run_does_not_read_the_file_again(run, file, capsys):
    _, whole = run(f"init.from={file}", folder="whole")
    _, parts = run(f"init.from={file}", "runtime.stop_at=2", folder="parts")
    file.unlink()
    capsys.readouterr()
    code, again = run(f"init.from={file}", folder="parts")
    assert (code, again) == (Exit.DONE, parts)
    said = capsys.readouterr().out
    assert f"weights    began as those of {file} (init.from); this run goes on from its own\n" in said
    assert LICENCE not in said
    assert losses(parts) == losses(whole)
    assert_equal(weights_of(parts), weights_of(whole))


def test_a_resume_by_its_path_does_not_read_the_file_again(run, file):
    _, folder = run(f"init.from={file}", "runtime.stop_at=2")
    file.unlink()
    moved = folder.rename(folder.with_name("moved"))
    code, _ = run(f"init.from={file}", f"resume={moved}")
    assert code == Exit.DONE
    assert len(losses(moved)) == 6


def test_a_run_that_was_killed_before_its_first_checkpoint_reads_it_again(run, file, source):
    _, folder = run(f"init.from={file}", *NO_MOVEMENT)
    for path in (folder / "checkpoints").iterdir():
        path.unlink() if path.is_symlink() else path.rename(folder / f"old-{path.name}")
    (folder / "checkpoints" / ".tmp-step-0000003").mkdir()
    code, again = run(f"init.from={file}", *NO_MOVEMENT)
    assert (code, again) == (Exit.DONE, folder)
    assert_equal(weights_of(folder), source.state_dict())
    assert (folder / "train.log").read_text().count(LICENCE) == 2


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_from_the_file(run, file, capsys):
    _, folder = run(f"init.from={file}")
    for shard in (folder / "checkpoints").glob("step-*/shard-*"):
        shard.write_bytes(shard.read_bytes()[:-1])
    file.unlink()
    for _ in range(2):  # the second time they are put aside already
        capsys.readouterr()
        code, _ = run(f"init.from={file}")
        assert code == Exit.WRONG_INPUT
        assert "is intact; start anew with resume=never" in capsys.readouterr().out


def test_a_run_of_its_own_reads_the_file_again(run, file, source):
    _, folder = run(f"init.from={file}", *NO_MOVEMENT)
    code, anew = run(f"init.from={file}", *NO_MOVEMENT, "resume=never")
    assert (code, anew.name) == (Exit.DONE, f"{folder.name}-2")
    assert_equal(weights_of(anew), source.state_dict())


@pytest.mark.parametrize("kind", ["absent", "damaged", "of another size"])
def test_wrong_weights_cost_nothing(run, file, capsys, kind):
    more = ["model.predictor_dim=32"] if kind == "of another size" else []
    if kind == "absent":
        file.unlink()
    elif kind == "damaged":
        file.write_bytes(file.read_bytes()[:-100])
    code, folder = run(f"init.from={file}", *more)
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    error = capsys.readouterr().err
    assert error.startswith(f"init.from: {file}")
    assert error.count("\n") == 1 or kind == "of another size"
    assert ("model.predictor_dim: the file has a predictor 16 wide, the settings 32" in error) == bool(more)


def test_the_untrained_encoder_of_the_probe_is_not_the_loaded_one(run, recipe, file, source, monkeypatch):
    seen = []

    def probe(trained, untrained, *_, **named):
        seen.append([{k: t.clone() for k, t in make().state_dict().items()} for make in (trained, untrained)])
        return {}

    monkeypatch.setattr(evaluation.probe, "probe", probe)
    code, _ = run(f"init.from={file}", "eval.probe=linear", *NO_MOVEMENT)
    assert code == Exit.DONE
    ((trained, untrained),) = seen
    assert_equal(trained, source.target_encoder.state_dict())
    assert_equal(untrained, build_jepa(configfile.load(recipe)).target_encoder.state_dict())


# Runs of our own as the source


@pytest.fixture
def first(run):
    """A finished run of this library."""
    return run(folder="first")[1]


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/latest", "checkpoints/step-0000003"])
def test_a_run_starts_from_a_run_of_our_own(run, first, part, capsys):
    code, folder = run(f"init.from={first / part}", *NO_MOVEMENT, folder="second")
    assert code == Exit.DONE
    step = 3 if part.endswith("3") else 6
    want = weights_of(first / "checkpoints" / f"step-{step:07d}")
    assert_equal(weights_of(folder), want)
    said = capsys.readouterr().out
    assert f"a checkpoint of fastjepa, step {step}\n" in said
    assert "heads: 2 in the encoder, 2 in the predictor, as in that run\n" in said
    assert "licence: yours\n" in said
    assert LICENCE not in said


def test_the_licence_follows_the_weights(run, file, tmp_path, capsys):
    _, second = run(f"init.from={file}", folder="second")
    capsys.readouterr()
    run(f"init.from={second}", folder="third")
    said = capsys.readouterr().out
    assert f"licence: that of what it was trained from ({file.name}): published weights of this layout" in said


def test_a_damaged_checkpoint_of_the_source_is_passed_over_and_left_alone(run, first):
    shard = next((first / "checkpoints" / "step-0000006").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    before = sorted(p.name for p in (first / "checkpoints").iterdir())
    _, folder = run(f"init.from={first}", *NO_MOVEMENT, folder="second")
    assert_equal(weights_of(folder), weights_of(first / "checkpoints" / "step-0000003"))
    assert sorted(p.name for p in (first / "checkpoints").iterdir()) == before


def test_a_source_without_an_intact_checkpoint_is_refused(first, tmp_path):
    for shard in (first / "checkpoints").glob("step-*/shard-*"):
        shard.write_bytes(b"")
    for path, words in (
        (first, "no checkpoint in .* is intact: step-0000006: .* bytes instead of"),
        (first / "checkpoints" / "step-0000003", "is intact"),
        (tmp_path, "has no checkpoint of fastjepa"),
    ):
        with pytest.raises(WeightsRefused, match=rf"^[^\n]*{words}[^\n]*$"):
            read_weights(path)


def test_another_number_of_heads_is_refused_where_the_source_tells_it(run, first, capsys):
    code, folder = run(f"init.from={first}", "model.predictor_heads=4", folder="second")
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    assert "model.predictor_heads: the file was trained with 2, the settings have 4" in capsys.readouterr().err


def test_a_source_with_missing_networks_is_refused(recipe, first, tmp_path, source):
    found = checkpoint.verify(first / "checkpoints" / "step-0000006")
    some = {k: v for k, v in source.state_dict().items() if not k.startswith("predictor.predictor_blocks.0.attn")}
    folder = checkpoint.save(tmp_path / "partial", 1, some, found.trainer, 2, print)
    with pytest.raises(WeightsRefused, match=r"predictor.predictor_blocks.0.attn.qkv.weight: missing, expected"):
        load_weights(build_jepa(configfile.load(recipe)), read_weights(folder))


# The documentation


def test_the_command_of_the_readme_is_valid():
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"\n## Weights\n(.*?)\n## ", readme, re.DOTALL)[1]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    lines = [shlex.split(line.split("#")[0]) for block in blocks for line in block.splitlines()]
    commands = [line for line in lines if line[:3] == ["python", "-m", "fastjepa.train"]]
    assert [configfile.load(ROOT / command[3], command[4:]).init.from_ for command in commands] == ["vitl16", "vitl.pt"]
    assert "CC BY-NC 4.0" in section
