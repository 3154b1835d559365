"""Which checkpoints stay: the newest, the milestones, and always one that is intact."""

import random
import shutil
from contextlib import suppress

import pytest

from fastjepa import configfile
from fastjepa.checkpoint import CheckpointError, newest, save, verify
from tests.checkpoints import names, quiet, seed_found, tensors


def steps(root):
    return [int(name.removeprefix("step-")) for name in names(root) if name.startswith("step-")]


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("keep_every", [0, 3, 4])
def test_the_newest_and_the_milestones_stay(tmp_path, keep, keep_every):
    for step in range(1, 11):
        save(tmp_path, step, tensors(step), {}, keep, quiet, keep_every=keep_every)
        milestones = {n for n in range(1, step + 1) if keep_every and n % keep_every == 0}
        others = [n for n in range(1, step + 1) if n not in milestones]
        assert steps(tmp_path) == sorted(milestones | set(others[-keep:]))
        assert seed_found(tmp_path) == step


def test_a_milestone_stays_when_they_are_asked_for_no_longer_only_while_it_is_new(tmp_path):
    for step in (2, 4):
        save(tmp_path, step, tensors(step), {}, 1, quiet, keep_every=2)
    save(tmp_path, 5, tensors(5), {}, 1, quiet)
    assert steps(tmp_path) == [5]


def test_the_first_step_is_a_milestone_too(tmp_path):
    for step in (0, 1, 2):
        save(tmp_path, step, tensors(step), {}, 1, quiet, keep_every=10)
    assert steps(tmp_path) == [0, 2]


def cut_short(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def without_manifest(folder):
    (folder / "manifest.json").unlink()


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [cut_short, without_manifest, emptied])
def test_what_is_evidently_damaged_pushes_no_intact_one_out(tmp_path, damage):
    for step in (1, 2, 3):
        save(tmp_path, step, tensors(step), {}, 3, quiet)
    for step in (2, 3):
        damage(tmp_path / f"step-{step:07d}")
    save(tmp_path, 4, tensors(4), {}, 2, quiet)
    assert steps(tmp_path) == [1, 2, 3, 4]  # what is damaged is put aside by the next start, which says so
    save(tmp_path, 5, tensors(5), {}, 2, quiet)
    assert steps(tmp_path) == [4, 5]


def test_whatever_happens_to_others_after_a_save_one_is_intact(tmp_path):
    rng = random.Random(0)
    for step in range(1, 40):
        keep, keep_every = rng.choice([1, 2, 3]), rng.choice([0, 0, 5])
        number = rng.choice([step, step, max(1, step - 2)])
        save(tmp_path, number, tensors(step), {}, keep, quiet, keep_every=keep_every)
        intact = []
        for folder in tmp_path.glob("step-*"):
            try:
                intact.append(verify(folder).step)
            except CheckpointError:
                continue
        assert intact
        if rng.random() < 0.4:
            rng.choice([cut_short, without_manifest, emptied])(tmp_path / f"step-{rng.choice(intact):07d}")
        if rng.random() < 0.1:
            with suppress(CheckpointError):  # none may be left
                newest(tmp_path, lambda line: None)


def test_milestones_are_a_setting_that_a_resume_may_change(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("checkpoint: {keep_every: 1000}")
    assert configfile.load(path, []).checkpoint.keep_every == 1000
    assert configfile.load(path, ["checkpoint.keep_every=0"]).checkpoint.keep_every == 0
    with pytest.raises(ValueError, match=r"checkpoint.keep_every: expected a whole number .* given -1"):
        configfile.load(path, ["checkpoint.keep_every=-1"])
