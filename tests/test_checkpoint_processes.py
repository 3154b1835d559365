"""Checkpoints of several processes: saved by any number, loaded by any number, and one that fails fails them all."""

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fastjepa.checkpoint import CheckpointError, SaveFailed, Saver, load, newest, save, write
from tests.checkpoints import TRAINER, assert_bitwise, names, quiet, seed_found, tensors
from tests.processes import run_processes

PLAIN = ("optimizer.step", "optimizer.scale", "optimizer.counts")  # what no wrapper shards
KINDS = ("plain", "sharded")


def made(kind: str, seed: int) -> dict[str, torch.Tensor]:
    """The same state in every process: whole, or in uneven shards (21 rows, 33, and 3 by 3 or 4 processes)."""
    whole = tensors(seed)
    if kind == "plain":
        return whole
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: tensor if name in PLAIN else distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()
    }


def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def group_of_all() -> dist.ProcessGroup:
    dist.init_process_group("gloo")
    return dist.new_group(backend="gloo")


def save_here(root: Path, kind: str, step: int = 1) -> list[str]:
    write.FILE_BYTES = 1500
    group, said = group_of_all(), []
    assert save(root, step, made(kind, step), TRAINER, 2, said.append, group=group) == root / f"step-{step:07d}"
    assert said == []
    return names(root / f"step-{step:07d}")


def load_here(root: Path) -> int:
    group = group_of_all()
    found = newest(root, quiet, group)
    assert found.folder == root / f"step-{found.step:07d}"
    assert {key: found.trainer[key] for key in TRAINER} == TRAINER
    for kind in KINDS:
        live = made(kind, 99)
        places = {name: (t.to_local() if isinstance(t, DTensor) else t).data_ptr() for name, t in live.items()}
        load(found, live, group)
        assert_bitwise(whole(live), tensors(found.step))
        assert places == {name: (t.to_local() if isinstance(t, DTensor) else t).data_ptr() for name, t in live.items()}
    return found.step


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_processes_save_any_number_loads_bitwise(tmp_path, kind):
    listed = run_processes(save_here, 2, tmp_path, kind)
    assert listed[0] == listed[1]
    assert {name[:11] for name in listed[0] if name.endswith(".safetensors")} == {"shard-00001", "shard-00002"}
    assert seed_found(tmp_path) == 1  # by this process, without a group
    for world in (1, 2, 3, 4):
        assert run_processes(load_here, world, tmp_path) == [1] * world


def test_what_one_process_saves_two_load_sharded(tmp_path):
    save(tmp_path, 1, tensors(1), TRAINER, 2, quiet)
    assert run_processes(load_here, 2, tmp_path) == [1, 1]


def test_what_four_processes_save_in_shards_of_which_some_are_empty_two_load(tmp_path):
    run_processes(save_here, 4, tmp_path, "sharded")  # three planes for four processes
    assert seed_found(tmp_path) == 1
    assert run_processes(load_here, 2, tmp_path) == [1, 1]


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    for layer in module:
        fully_shard(layer)
    fully_shard(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    return module, optimizer


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    moments = {
        f"optim.{key}.{name}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    return {**module.state_dict(), **moments}


def fully_sharded(root: Path) -> int:
    group = group_of_all()
    module, optimizer = trained(1)
    state = state_of(module, optimizer)
    want = {name: tensor.clone() for name, tensor in whole(state).items()}
    with Saver(root, keep=2, keep_every=0, say=quiet, group=group) as saver:
        saver.begin(1, state, {})
        module(torch.ones(2, 7)).sum().backward()  # the weights move while they are written
        optimizer.step()
    other, its_optimizer = trained(2)
    load(newest(root, quiet, group), state_of(other, its_optimizer), group)
    assert_bitwise({k: v.contiguous() for k, v in whole(state_of(other, its_optimizer)).items()}, want)
    assert not torch.equal(whole(module.state_dict())["0.weight"], want["0.weight"])
    return sum(isinstance(tensor, DTensor) for tensor in state.values())


def test_a_fully_sharded_module_and_its_moments_are_saved_in_a_thread_and_come_back(tmp_path):
    assert run_processes(fully_sharded, 2, tmp_path) == [12, 12]


# Failures of one of them


def failing(root: Path, rank: int, where: str, threaded: bool) -> str:
    """What each process says when the one of this rank cannot do one thing."""
    group = group_of_all()
    state = made("sharded", 3)

    def refuse(*arguments, **names):
        raise OSError(28, "No space left on this one")

    if dist.get_rank() == rank:
        place = {
            "tensors": (write._Writer, "write_data"),
            "plan": (write._Writer, "prepare_local_plan"),
            "sums": (write.files, "facts"),
            "folder": (write, "_begin"),
            "name": (write, "_commit"),
        }[where]
        before = getattr(*place)
        setattr(*place, refuse)
    if threaded:
        saver = Saver(root, keep=2, keep_every=0, say=quiet, group=group)
        saver.begin(3, state, {})
        sentence = saver.wait().error
    else:
        with pytest.raises(SaveFailed) as caught:
            save(root, 3, state, {}, 2, quiet, group=group)
        sentence = str(caught.value)
    if dist.get_rank() == rank:
        setattr(*place, before)
    dist.barrier()
    if dist.get_rank() == 0:
        assert not [name for name in names(root) if name.startswith(".tmp-")]
    assert newest(root, quiet, group).step == 1
    save(root, 4, state, {}, 2, quiet, group=group)
    assert newest(root, quiet, group).step == 4
    return sentence


@pytest.mark.parametrize(
    ("rank", "where"), [(1, "tensors"), (1, "plan"), (1, "sums"), (0, "tensors"), (0, "folder"), (0, "name")]
)
@pytest.mark.parametrize("threaded", [False, True])
def test_a_process_that_fails_fails_all_with_its_sentence_and_the_last_good_one_stays(tmp_path, rank, where, threaded):
    run_processes(save_here, 1, tmp_path, "plain")
    sentences = run_processes(failing, 2, tmp_path, rank, where, threaded, timeout=60)
    assert sentences[0] == sentences[1]
    assert sentences[0].startswith(f"the checkpoint of step 3 could not be written to {tmp_path}: ")
    assert "No space left on this one" in sentences[0]
    assert "\n" not in sentences[0]


def with_a_bug(root: Path) -> str:
    group = group_of_all()
    if dist.get_rank() == 1:
        write.files.facts = lambda path: {}[path]
    with pytest.raises((KeyError, RuntimeError)) as caught:
        save(root, 3, tensors(3), {}, 2, quiet, group=group)
    return f"{type(caught.value).__name__} {caught.value}"


def test_a_bug_in_one_process_is_raised_there_and_told_elsewhere(tmp_path):
    elsewhere, there = run_processes(with_a_bug, 2, tmp_path, timeout=60)
    assert there.startswith("KeyError")
    assert elsewhere.startswith("RuntimeError process 1 failed: KeyError")


def apart(root: Path) -> str:
    """Each process has a disk of its own where the others have the same path."""
    group = group_of_all()
    write.SECONDS_TO_SEE = 0.1
    with pytest.raises(SaveFailed) as caught:
        save(root / os.environ["RANK"], 3, tensors(3), {}, 2, quiet, group=group)
    return str(caught.value).partition(": ")[2]


def test_processes_without_a_common_disk_are_told_so(tmp_path):
    said = run_processes(apart, 2, tmp_path, timeout=60)
    assert said == ["process 1 does not see the folder that process 0 made: they need one file system"] * 2
    assert [names(tmp_path / rank) for rank in os.listdir(tmp_path)] == [[]]


def damaged(root: Path) -> tuple[list[str], str]:
    group, said = group_of_all(), []
    found = newest(root, said.append, group)
    assert found.step == 1
    shutil.rmtree(root / "step-0000001", ignore_errors=True)
    dist.barrier()
    with pytest.raises(CheckpointError) as caught:
        newest(root, said.append, group)
    return said, str(caught.value)


def test_the_first_process_puts_damaged_ones_aside_and_all_have_its_answer(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, tensors(step), {}, 3, quiet)
    (tmp_path / "step-0000002" / "manifest.json").unlink()
    (first, error), (second, same) = run_processes(damaged, 2, tmp_path)
    assert len(first) == 1
    assert second == []
    assert error == same
    assert "none of the 1 checkpoints" in error


def misfit(root: Path, what: str) -> str:
    group = group_of_all()
    live = made("sharded", 99)
    found = newest(root, quiet, group)
    if what == "model" and dist.get_rank() == 1:
        live["new"] = torch.ones(1)
    if what == "files":
        mine = root / os.environ["RANK"] / "step"
        shutil.copytree(found.folder, mine)
        if dist.get_rank() == 1:
            next(mine.glob("*.safetensors")).unlink()
        found = type(found)(mine, found.step, found.trainer)
    if what == "another":
        mine = root / os.environ["RANK"] / "step"
        shutil.copytree(found.folder, mine)
        if dist.get_rank() == 1:
            (mine / "manifest.json").write_text((mine / "manifest.json").read_text() + "\n")
        found = type(found)(mine, found.step, found.trainer)
    before = whole(live)
    with pytest.raises(CheckpointError) as caught:
        load(found, live, group)
    after = whole(live)
    assert_bitwise({k: after[k] for k in before}, before)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("model", "does not fit the model: new is missing"),
        ("files", "process 1 does not see all of"),
        ("another", "is not the same for all processes: they need one file system"),
    ],
)
def test_what_one_process_cannot_load_none_loads(tmp_path, what, sentence):
    save(tmp_path, 1, tensors(1), {}, 3, quiet)
    said = run_processes(misfit, 2, tmp_path, what, timeout=60)
    assert all(sentence in text for text in said), said


def test_a_shard_that_is_missing_from_a_manifest_that_agrees_is_noticed(tmp_path):
    """Readers of safetensors take what lies there: tensors would come back with a part of them not filled."""
    run_processes(save_here, 2, tmp_path, "sharded")
    folder = tmp_path / "step-0000001"
    next(folder.glob("shard-00001-*")).unlink()
    rest = {
        path.name: {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(rest))
    live = tensors(99)
    with pytest.raises(CheckpointError, match="has a part missing or a part twice"):
        load(newest(tmp_path, quiet), live)
    assert_bitwise(live, tensors(99))
