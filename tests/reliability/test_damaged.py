"""C6, C7: the program with damaged checkpoints. It falls back by one and says so, or stops in a sentence."""

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import pytest

from fastjepa import checkpoint
from fastjepa.exits import Exit
from tests.reliability.harness import Lab, assert_none_lost

BEGUN = 6
NEWEST = f"step-{BEGUN:07d}"
SETTINGS = ("optim.steps=8", "optim.warmup_steps=2", "checkpoint.every=2", "checkpoint.keep=3")
# What a start may write before it finds that nothing can be resumed: what it was asked, when, and how it ended.
DESCRIPTION = {"config.yaml", "env.json", "command.txt", "train.log", "status.json", ".lock"}


@pytest.fixture(scope="module")
def begun(server, tmp_path_factory, unbroken):
    """The folder of runs with one run of some steps and three checkpoints."""
    lab = Lab(server, tmp_path_factory.mktemp("begun"), unbroken)
    lab.run("runs", *SETTINGS, f"runtime.stop_at={BEGUN}")
    return lab.folder / "runs"


@pytest.fixture
def checkpoints(lab, begun):
    """The folder of checkpoints of a copy of that run."""
    shutil.copytree(begun, lab.folder / "runs", symlinks=True)
    return lab.path("runs") / "checkpoints"


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :]


def sign(folder, **others):
    """Write the manifest anew, as someone would who wants the content to be believed."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    facts = {n: {"bytes": (folder / n).stat().st_size, "crc32": zlib.crc32((folder / n).read_bytes())} for n in names}
    (folder / "manifest.json").write_text(json.dumps({**facts, **others}))


def replaced(path, make):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


DAMAGE = {
    "shard cut short": lambda f: edit(shard(f), lambda d: d[:-9]),
    "shard cut in half": lambda f: edit(shard(f), lambda d: d[: len(d) // 2]),
    "shard empty": lambda f: edit(shard(f), lambda d: b""),
    "shard of zeros": lambda f: edit(shard(f), lambda d: bytes(len(d))),
    "bit of a weight": lambda f: edit(shard(f), lambda d: flip(d, len(d) - 100)),
    "bit of the header": lambda f: edit(shard(f), lambda d: flip(d, 40)),
    "shard missing": lambda f: shard(f).unlink(),
    "shard a link": lambda f: (shard(f).rename(f.parent.parent / "moved"), shard_link(f)),
    "foreign shard": lambda f: (f / "foreign.safetensors").write_bytes(shard(f).read_bytes()),
    "shard of the step before": lambda f: shutil.copy(shard(f.parent / f"step-{BEGUN - 2:07d}"), shard(f)),
    "trainer.json of another step": lambda f: edit(f / "trainer.json", lambda d: d.replace(b'"step": 6', b'"step": 9')),
    "trainer.json missing": lambda f: (f / "trainer.json").unlink(),
    "manifest missing": lambda f: (f / "manifest.json").unlink(),
    "manifest cut short": lambda f: edit(f / "manifest.json", lambda d: d[: len(d) // 2]),
    "manifest of a pickle": lambda f: (f / "manifest.json").write_bytes(pickle.dumps({})),
    "manifest names a file above": lambda f: sign(f, **{"../../train.log": {"bytes": 1, "crc32": 1}}),
    "folder empty": lambda f: replaced(f, Path.mkdir),
    "folder a file": lambda f: replaced(f, Path.touch),
}


def shard_link(folder):
    name = next(name for name in json.loads((folder / "manifest.json").read_text()) if name.endswith(".safetensors"))
    (folder / name).symlink_to(folder.parent.parent / "moved")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_said_put_aside_and_costs_two_steps(lab, checkpoints, kind):
    DAMAGE[kind](checkpoints / NEWEST)
    before = content(checkpoints / NEWEST)
    child = lab.run("runs", *SETTINGS)
    (warning,) = [line for line in child.out.splitlines() if "warning" in line]
    assert warning.startswith(f"warning: checkpoint {NEWEST} is damaged (")
    assert warning.endswith(f"it was put aside as corrupt-{NEWEST}")
    assert f"step {BEGUN - 2}\n" in child.out
    assert child.err == ""
    assert content(checkpoints / f"corrupt-{NEWEST}") == before
    assert_none_lost(lab.rows("runs"), lab.whole(*SETTINGS))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["shard cut short", "manifest missing", "folder empty"])
def test_where_all_are_damaged_the_run_stops_in_a_sentence_and_writes_nothing(lab, checkpoints, kind, again):
    """Neither a first nor a second try begins from nothing."""
    for folder in sorted(checkpoints.glob("step-*")):
        DAMAGE[kind](folder)
    if again:
        lab.run("runs", *SETTINGS, code=Exit.WRONG_INPUT)
    before = {name.replace("corrupt-", ""): value for name, value in content(lab.folder / "runs").items()}
    child = lab.run("runs", *SETTINGS, code=Exit.WRONG_INPUT)
    (sentence,) = [line for line in child.said().splitlines() if line.startswith("stopped")]
    assert "none of the 3 checkpoints" in sentence
    assert "resume=never" in sentence
    after = {name.replace("corrupt-", ""): value for name, value in content(lab.folder / "runs").items()}
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {
        f"{lab.path('runs').name}/{name}" for name in DESCRIPTION
    }


def test_a_checkpoint_of_another_model_is_refused_with_the_difference(lab, checkpoints):
    """Signed, so that nothing says that it is damaged."""
    lab.run("others", *SETTINGS, "model.predictor_dim=32", "runtime.stop_at=6")
    other = lab.path("others") / "checkpoints" / NEWEST
    replaced(checkpoints / NEWEST, lambda path: shutil.copytree(other, path))
    before = content(checkpoints)
    child = lab.run("runs", *SETTINGS, code=Exit.WRONG_INPUT)
    (sentence,) = [line for line in child.said().splitlines() if line.startswith("stopped")]
    assert "does not fit the model" in sentence
    assert "instead of" in sentence
    assert content(checkpoints) == before


def test_a_damaged_one_before_an_intact_newest_is_not_looked_at(lab, checkpoints):
    DAMAGE["shard cut short"](checkpoints / f"step-{BEGUN - 2:07d}")
    child = lab.run("runs", *SETTINGS)
    assert "warning" not in child.out
    assert_none_lost(lab.rows("runs"), lab.whole(*SETTINGS))
    assert checkpoint.verify(checkpoints / "latest").step == 8


def content(root):
    """Name -> bytes, or where a link leads, of all that lies below, or of the file itself."""
    return {
        os.path.relpath(path, root): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in (root.rglob("*") if root.is_dir() else [root])
    }
