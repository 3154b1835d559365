"""Paths that point beside weights: the sentence says what lies there, or what lies near."""

import pytest
import torch

from fastjepa.interop import WeightsRefused, read_weights


def refusal(path):
    with pytest.raises(WeightsRefused) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_weights_without_a_config(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert "it has weights (*.safetensors) and no config.json, which says of what network" in refusal(tmp_path)


def test_a_folder_of_runs_names_the_newest(run):
    _, first = run("optim.steps=1", "optim.warmup_steps=0")
    _, second = run("optim.steps=1", "optim.warmup_steps=0", "optim.lr=0.5")
    assert refusal(first.parent).endswith(f"has no checkpoint of fastjepa: it holds runs, the newest is {second}")


def test_a_run_without_a_checkpoint_and_a_checkpoint_without_its_manifest(run):
    _, first = run("optim.steps=1", "optim.warmup_steps=0")
    (step,) = (first / "checkpoints").glob("step-*")
    (step / "manifest.json").unlink()
    assert refusal(step).endswith(": it is a checkpoint without its manifest.json, and not whole")
    step.rename(first.parent.parent / "away")
    assert refusal(first).endswith("has no checkpoint of fastjepa: it is a run without a checkpoint so far")
    assert refusal(first.parent).endswith("has no checkpoint of fastjepa")


def test_an_empty_folder_and_one_of_other_things(tmp_path):
    assert refusal(tmp_path).endswith("has no checkpoint of fastjepa: it is empty")
    (tmp_path / "notes.txt").touch()
    assert refusal(tmp_path).endswith("has no checkpoint of fastjepa")


def test_a_name_that_is_almost_right(tmp_path):
    (tmp_path / "tiny-95348a").mkdir()
    assert refusal(tmp_path / "tiny-95348").endswith(f"no such file or folder, nearest: {tmp_path / 'tiny-95348a'}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_folder_of_transformers(tmp_path, name):
    for one in ("config.json", "model.safetensors"):
        (tmp_path / one).touch()
    assert refusal(tmp_path / name).endswith(f"lies in a folder of transformers: expected the folder, {tmp_path}")


def test_what_a_file_without_networks_holds_is_named(tmp_path):
    torch.save({f"blocks.{number}.weight": torch.zeros(2) for number in range(4)}, tmp_path / "a.pt")
    assert refusal(tmp_path / "a.pt").endswith("it holds blocks.0.weight, blocks.1.weight, blocks.2.weight and more")
    torch.save({}, tmp_path / "b.pt")
    assert refusal(tmp_path / "b.pt").endswith("it holds nothing")
