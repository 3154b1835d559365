"""Checkpoints come back bitwise; a crash or a full disk at any point of a save costs no more than that save."""

import errno
import os
import resource
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch

from fastjepa.checkpoint import SaveFailed, Saver, files, load, newest, save, write
from tests.checkpoints import (
    TRAINER,
    assert_bitwise,
    content,
    in_child,
    names,
    quiet,
    seed_found,
    tensors,
    watch_changes,
)

OLD, NEW, NEXT = 2, 3, 4
STRUCK, UNTOUCHED = 9, 0


@pytest.fixture(autouse=True)
def _several_files(monkeypatch):
    monkeypatch.setattr(write, "FILE_BYTES", 1500)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with two checkpoints, to be copied."""
    root = tmp_path_factory.mktemp("two") / "checkpoints"
    for step in (OLD - 1, OLD):
        save(root, step, tensors(step), TRAINER, 2, quiet)
    return root


# Round trip


def test_every_dtype_and_shape_comes_back_bitwise_over_several_files(root):
    folder = save(root, 12000, tensors(1), TRAINER, 3, quiet)
    assert folder == root / "step-0012000"
    assert len(list(folder.glob("*.safetensors"))) > 2
    found = newest(root, quiet)
    assert (found.folder, found.step) == (folder, 12000)
    assert {key: found.trainer[key] for key in TRAINER} == TRAINER
    assert_bitwise(content(found), tensors(1))


def test_values_that_are_not_finite_and_negative_zero_keep_their_bits(root):
    odd = {"x": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])}
    save(root, 1, odd, {}, 3, quiet)
    live = {"x": torch.zeros(4)}
    load(newest(root, quiet), live)
    assert_bitwise(live, odd)


def test_loading_writes_into_the_live_tensors(root):
    module = torch.nn.Linear(5, 3)
    before = {name: p.data_ptr() for name, p in module.named_parameters()}
    save(root, 1, module.state_dict(), {}, 3, quiet)
    want = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.data.zero_()
    load(newest(root, quiet), module.state_dict())
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == before
    assert_bitwise({name: p.detach() for name, p in module.named_parameters()}, want)


def test_a_saved_checkpoint_does_not_follow_later_changes(root):
    live = tensors(1)
    save(root, 1, live, {}, 3, quiet)
    live["encoder.weight"].zero_()
    assert_bitwise(content(newest(root, quiet)), tensors(1))


@pytest.mark.parametrize("limit", [1, 700, 10**9])
def test_no_file_is_larger_than_the_limit_unless_one_tensor_is(root, monkeypatch, limit):
    monkeypatch.setattr(write, "FILE_BYTES", limit)
    folder = save(root, 1, tensors(1), {}, 3, quiet)
    sizes = {name: tensor.nbytes for name, tensor in tensors(1).items()}
    number = write._files(tensors(1), 1)
    assert len(list(folder.glob("*.safetensors"))) == len(set(number.values()))
    for file in set(number.values()):
        members = [sizes[name] for name in sizes if number[name] == file]
        assert sum(members) <= limit or len(members) == 1
    assert_bitwise(content(newest(root, quiet)), tensors(1))


# Retention


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_latest_points_to_the_last(root, keep):
    for step in range(10, 15):
        save(root, step, tensors(step), {}, keep, quiet)
        kept = [f"step-{n:07d}" for n in range(max(10, step - keep + 1), step + 1)]
        assert names(root) == ["latest", *kept]
        assert (root / "latest").is_symlink()
        assert os.readlink(root / "latest") == f"step-{step:07d}"
    assert_bitwise(content(newest(root, quiet)), tensors(14))


def test_damaged_ones_are_not_counted_and_never_push_out_an_intact_one(root):
    for step in (1, 2, 3):
        save(root, step, tensors(step), {}, 3, quiet)
    for step in (2, 3):
        (root / f"step-{step:07d}" / "manifest.json").unlink()
    assert newest(root, lambda line: None).step == 1
    save(root, 2, tensors(2), {}, 2, quiet)
    assert names(root) == ["corrupt-step-0000002", "corrupt-step-0000003", "latest", "step-0000001", "step-0000002"]


def test_the_one_just_written_is_never_pruned(root):
    """Even where folders of higher steps lie there, of which nothing is known."""
    save(root, 9, tensors(9), {}, 3, quiet)
    (root / "step-0000009" / "manifest.json").write_text("{}")
    save(root, 5, tensors(5), {}, 1, quiet)
    assert names(root) == ["latest", "step-0000005"]


def test_an_old_one_that_cannot_be_removed_is_a_warning(root, monkeypatch):
    said = []
    save(root, 1, tensors(1), {}, 1, quiet)
    monkeypatch.setattr(files, "tidy", lambda root: None)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(OSError("busy")))
    save(root, 2, tensors(2), {}, 1, said.append)
    assert len(said) == 1
    assert "step-0000001" in said[0]
    assert newest(root, quiet).step == 2


def test_the_same_step_saved_twice_holds_the_second_content(root):
    for seed in (1, 2):
        save(root, 7, tensors(seed), {"seed": seed}, 3, quiet)
    assert names(root) == ["latest", "step-0000007"]
    found = newest(root, quiet)
    assert found.trainer["seed"] == 2
    assert_bitwise(content(found), tensors(2))


def test_what_a_killed_save_of_another_step_left_is_taken_away(root):
    (root / ".tmp-step-0000099").mkdir(parents=True)
    (root / ".tmp-step-0000099" / "shard.safetensors").write_bytes(b"half")
    (root / ".tmp-latest").symlink_to("nowhere")
    assert newest(root, quiet) is None
    save(root, 1, tensors(1), {}, 3, quiet)
    assert names(root) == ["latest", "step-0000001"]


def test_everything_is_on_the_disk_before_it_gets_its_name(root, monkeypatch):
    synced, named = set(), []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def watched_rename(path, target):
        inodes = {p.stat().st_ino for p in [path, *path.iterdir()]}
        assert len(inodes) > 5
        assert inodes <= synced
        named.append(target)
        synced.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    folder = save(root, 1, tensors(1), {}, 3, quiet)
    assert named == [folder]
    assert root.stat().st_ino in synced


# A crash or a full disk at every point of a save


def prepare(scenario: str, two_steps: Path, root: Path) -> tuple[int, int, set[int | None]]:
    """(step to save, seed of its content, seeds that may be found when that save does not finish)."""
    if scenario == "first":
        return NEW, NEW, {None, NEW}
    shutil.copytree(two_steps, root, symlinks=True)
    if scenario == "next":
        return NEW, NEW, {OLD, NEW}
    if scenario == "again":
        return OLD, NEW, {OLD, NEW}
    shutil.rmtree(root / f"step-{OLD - 1:07d}")
    return OLD, NEW, {OLD, NEW}


def assert_next_save_works(root: Path) -> None:
    save(root, NEXT, tensors(NEXT), TRAINER, 2, quiet)
    assert seed_found(root) == NEXT
    assert os.readlink(root / "latest") == f"step-{NEXT:07d}"
    assert not [name for name in names(root) if name.startswith(".tmp-")]
    assert len([name for name in names(root) if name.startswith("step-")]) <= 2


SCENARIOS = ["first", "next", "again", "again, the only one"]


def save_here(root: Path, step: int, seed: int) -> None:
    save(root, step, tensors(seed), TRAINER, 2, quiet)


def save_in_a_thread(root: Path, step: int, seed: int) -> None:
    saver = Saver(root, keep=2, keep_every=0, say=quiet)
    saver.begin(step, tensors(seed), TRAINER)
    assert saver.wait().error is None


@pytest.mark.parametrize("way", [save_here, save_in_a_thread])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_crash_at_any_point_leaves_the_old_or_the_new_one(tmp_path, two_steps, scenario, way):
    seen = set()
    for point in count(1):
        root = tmp_path / str(point)
        step, seed, allowed = prepare(scenario, two_steps, root)

        def crash(root=root, step=step, seed=seed, point=point):
            left = point

            def die(event):
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(STRUCK)

            watch_changes(root, die)
            way(root, step, seed)

        code = in_child(crash)
        assert code in (STRUCK, UNTOUCHED)
        result = seed_found(root)
        assert result in allowed, f"crash at point {point}"
        seen.add(result)
        assert scenario == "first" or (root / "latest" / "manifest.json").is_file()
        assert_next_save_works(root)
        if code == UNTOUCHED:
            break
    assert point > 12
    assert seen == allowed


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_full_disk_at_any_point_fails_in_one_sentence_and_costs_nothing(tmp_path, two_steps, scenario, lasting):
    """`lasting`: from that point on nothing can be created any more, but things can be removed and renamed."""
    for point in count(1):
        root = tmp_path / str(point)
        step, seed, allowed = prepare(scenario, two_steps, root)

        def full(root=root, step=step, seed=seed, point=point, allowed=allowed):
            left, raised, armed = point, 0, True

            def refuse(event):
                nonlocal left, raised
                left -= 1
                if armed and (left == 0 or (lasting and left < 0 and event in ("open", "os.mkdir", "os.symlink"))):
                    raised += 1
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            watch_changes(root, refuse)
            said, failure = [], None
            try:
                save(root, step, tensors(seed), TRAINER, 2, said.append)
            except SaveFailed as error:
                failure = str(error)
            armed = False
            if failure is not None:
                assert failure.startswith(f"the checkpoint of step {step} could not be written to {root}: ")
                assert "No space left on device" in failure
                assert "\n" not in failure
                assert said == []
            else:  # only the pruning of an old one may fail without failing the save
                assert seed_found(root) == seed
                assert all("could not be removed" in line for line in said)
                assert len(said) <= 1
            assert not root.exists() or not [name for name in names(root) if name.startswith(".tmp-")]
            assert seed_found(root) in allowed
            assert_next_save_works(root)
            if raised:
                os._exit(STRUCK)

        code = in_child(full)
        assert code in (STRUCK, UNTOUCHED), f"disk full at point {point}"
        if code == UNTOUCHED:
            break
    assert point > 12


@pytest.mark.parametrize("limit", [0, 50, 700, 2000])
def test_a_disk_that_fills_up_inside_a_file_costs_nothing(tmp_path, two_steps, limit):
    root = tmp_path / "checkpoints"
    shutil.copytree(two_steps, root, symlinks=True)

    def full():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(SaveFailed, match=r"^the checkpoint of step 3 could not be written to [^\n]*$"):
                save(root, NEW, tensors(NEW), TRAINER, 2, quiet)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert in_child(full) == UNTOUCHED
    assert names(root) == ["latest", "step-0000001", "step-0000002"]
    assert seed_found(root) == OLD
    assert_next_save_works(root)


def test_a_folder_that_cannot_be_made_is_a_failed_save(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveFailed, match="could not be written"):
        save(tmp_path / "file" / "checkpoints", 1, tensors(1), {}, 3, quiet)
