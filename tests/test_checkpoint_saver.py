"""A save in a thread holds the state of the moment it was asked for, and whatever becomes of it is told."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from fastjepa.checkpoint import Outcome, Saver, load, newest, snapshot, verify, write
from tests.checkpoints import TRAINER, assert_bitwise, content, names, quiet, seed_found, tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]  # fmt: skip


@pytest.fixture
def saver(tmp_path):
    with Saver(tmp_path, keep=3, keep_every=0, say=quiet) as saver:
        yield saver


@pytest.fixture
def gate(monkeypatch):
    """No save begins to write before this is set."""
    gate, begin = threading.Event(), write._begin

    def gated(*arguments):
        assert gate.wait(60)
        return begin(*arguments)

    monkeypatch.setattr(write, "_begin", gated)
    yield gate
    gate.set()


# The snapshot


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_changes_after_begin_does_not_leak_in(saver, gate, tmp_path, dtype):
    values = torch.arange(24).reshape(4, 6) % 2 if dtype == torch.bool else torch.arange(24).reshape(4, 6)
    live = {
        "matrix": values.to(dtype),
        "transposed": values.to(dtype).T,
        "cut": values.to(dtype)[1:3, ::2],
        "number": torch.ones((), dtype=dtype),
        "empty": torch.ones(0, 3, dtype=dtype),
    }
    want = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in live.items()}
    trainer = {"scaler": {"scale": 2.0}}
    assert saver.begin(1, live, trainer) is None
    for tensor in live.values():
        tensor.zero_() if dtype != torch.bool else tensor.logical_not_()
    trainer["scaler"]["scale"] = 1.0
    live["number"] = torch.full((), 7)
    gate.set()
    assert saver.wait() == Outcome(1, None)
    back = {name: torch.empty_like(tensor) for name, tensor in want.items()}
    found = newest(tmp_path, quiet)
    load(found, back)
    assert_bitwise(back, want)
    assert found.trainer["scaler"] == {"scale": 2.0}


@pytest.mark.parametrize("slab", [1, 700, 1 << 30])
def test_buffers_are_used_again_and_hold_every_state_in_turn(saver, tmp_path, monkeypatch, slab):
    monkeypatch.setattr(snapshot, "SLAB_BYTES", slab)
    places = []
    for step in (1, 2, 3):
        saver.begin(step, tensors(step), TRAINER)
        places.append({name: part.data_ptr() for name, part in saver._snapshot.parts().items()})
        assert saver.wait() == Outcome(step, None)
        assert seed_found(tmp_path) == step
    assert places[0] == places[1] == places[2]
    slabs = {part.untyped_storage().data_ptr() for part in saver._snapshot.parts().values()}
    assert len(slabs) == {1: 6, 700: 4, 1 << 30: 1}[slab]


def test_another_state_gets_other_buffers(saver, tmp_path):
    saver.begin(1, tensors(1), TRAINER)
    other = {"a": torch.arange(3), "b": torch.ones(2, 2)}
    saver.begin(2, other, TRAINER)
    saver.wait()
    back = {name: torch.zeros_like(tensor) for name, tensor in other.items()}
    load(newest(tmp_path, quiet), back)
    assert_bitwise(back, other)
    assert_bitwise(content(verify(tmp_path / "step-0000001")), tensors(1))


def test_a_snapshot_does_not_keep_a_graph(saver, gate):
    weight = torch.ones(3, requires_grad=True)
    saver.begin(1, {"a": weight * 2}, {})
    assert not any(part.requires_grad for part in saver._snapshot.parts().values())


# One at a time


def test_begin_returns_while_nothing_is_written_and_waits_for_the_save_before(saver, gate, tmp_path):
    saver.begin(1, tensors(1), TRAINER)
    assert names(tmp_path) == []
    assert saver.finished() is None
    threading.Timer(0.2, gate.set).start()
    assert saver.begin(2, tensors(2), TRAINER) == Outcome(1, None)
    assert "step-0000001" in names(tmp_path)
    assert saver.wait() == Outcome(2, None)


def test_an_outcome_is_told_once(saver, gate):
    assert saver.finished() is None
    assert saver.wait() is None
    saver.begin(1, tensors(1), TRAINER)
    assert saver.finished() is None
    gate.set()
    while (outcome := saver.finished()) is None:
        time.sleep(0.001)
    assert outcome == Outcome(1, None)
    assert saver.finished() is None
    assert saver.wait() is None
    assert saver.begin(2, tensors(2), TRAINER) is None


# Failures


TAKE = {
    "finished": lambda saver: (saver._thread.join(), saver.finished())[1],
    "wait": Saver.wait,
    "begin": lambda saver: saver.begin(9, tensors(9), TRAINER),
}


@pytest.mark.parametrize("by", TAKE)
def test_a_failure_in_the_thread_is_an_outcome_and_the_next_save_works(saver, tmp_path, monkeypatch, by):
    saver.begin(1, tensors(1), TRAINER)
    saver.wait()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write, "_commit", full)
        saver.begin(2, tensors(2), TRAINER)
        saver._thread.join()
    outcome = TAKE[by](saver)
    reason = f"the checkpoint of step 2 could not be written to {tmp_path}: [Errno 28] No space left on device"
    assert outcome == Outcome(2, reason)
    if by == "begin":
        assert saver.wait() == Outcome(9, None)
        return
    assert names(tmp_path) == ["latest", "step-0000001"]
    assert seed_found(tmp_path) == 1
    saver.begin(3, tensors(3), TRAINER)
    assert saver.wait() == Outcome(3, None)
    assert seed_found(tmp_path) == 3


@pytest.mark.parametrize("by", TAKE)
def test_a_bug_in_the_thread_is_raised_to_whoever_asks_once(saver, tmp_path, monkeypatch, by):
    with monkeypatch.context() as patch:
        patch.setattr(write, "_commit", lambda *arguments: [][0])
        saver.begin(2, tensors(2), TRAINER)
        saver._thread.join()
    with pytest.raises(IndexError):
        TAKE[by](saver)
    assert names(tmp_path) == []
    assert saver.wait() is None
    assert saver.begin(3, tensors(3), TRAINER) is None
    assert saver.wait() == Outcome(3, None)


def test_a_state_that_is_not_json_is_a_mistake_at_once(saver):
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.begin(1, tensors(1), {"what": object()})
    assert saver.wait() is None


def test_a_host_without_memory_for_the_copy_is_a_failed_save(saver, monkeypatch):
    def lacking(*arguments, **names):
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_buffers", lacking)
        saver.begin(1, tensors(1), TRAINER)
        assert saver.wait().error.endswith("no host memory for a copy of the state (can't allocate memory)")
    saver.begin(2, tensors(2), TRAINER)
    assert saver.wait() == Outcome(2, None)


def test_what_a_save_has_to_say_is_said_by_the_caller(tmp_path, monkeypatch):
    said = []
    saver = Saver(tmp_path, keep=1, keep_every=0, say=lambda line: said.append((line, threading.current_thread())))
    saver.begin(1, tensors(1), TRAINER)
    saver.wait()

    remove = write.files.remove

    def refuse(path):
        if path.name == "step-0000001":
            raise OSError("busy")
        remove(path)

    monkeypatch.setattr(write.files, "remove", refuse)
    saver.begin(2, tensors(2), TRAINER)
    saver._thread.join()
    assert said == []
    assert saver.wait() == Outcome(2, None)
    assert said == [
        ("warning: the old checkpoint step-0000001 could not be removed: busy", threading.main_thread()),
    ]


# The end


def test_leaving_the_context_waits_and_says_what_failed(tmp_path, gate, monkeypatch):
    said = []
    with Saver(tmp_path, keep=3, keep_every=0, say=said.append) as saver:
        saver.begin(1, tensors(1), TRAINER)
        threading.Timer(0.2, gate.set).start()
    assert seed_found(tmp_path) == 1
    with Saver(tmp_path / "latest" / "manifest.json", keep=3, keep_every=0, say=said.append) as saver:
        saver.begin(2, tensors(2), TRAINER)
    assert len(said) == 1
    assert said[0].startswith("warning: the checkpoint of step 2 could not be written to ")


def test_an_interpreter_that_ends_without_waiting_leaves_a_whole_checkpoint(tmp_path):
    code = f"""
import pathlib, time, torch
from fastjepa.checkpoint import Saver, write
begin = write._begin
write._begin = lambda *a: (time.sleep(0.3), begin(*a))[1]
Saver(pathlib.Path({str(tmp_path)!r}), keep=2, keep_every=0, say=print).begin(1, {{"a": torch.ones(3)}}, {{}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert verify(tmp_path / "step-0000001").step == 1


def test_a_kill_at_any_moment_leaves_a_checkpoint_of_one_step_whole(tmp_path):
    """In the middle of saves, between them, and while the state of the next step is copied."""
    rng, seen = random.Random(0), set()
    for _ in range(15):
        child = os.fork()
        if child == 0:
            try:
                saver, step = Saver(tmp_path, keep=2, keep_every=0, say=print), seed_found(tmp_path) or 0
                while True:
                    step += 1
                    saver.begin(step, tensors(step), TRAINER)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.005, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        seen.add(seed_found(tmp_path))
    assert len(seen) > 2


# A GPU


@pytest.mark.gpu
def test_on_a_gpu_the_copy_is_of_the_moment_and_the_host_does_not_wait(saver, tmp_path):
    live = {name: tensor.cuda() for name, tensor in tensors(1).items()}
    saver.begin(1, live, TRAINER)
    saver.wait()
    assert all(part.is_pinned() for part in saver._snapshot.parts().values())
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 2048
    for name, tensor in tensors(2).items():
        live[name].copy_(tensor)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        saver.begin(2, live, TRAINER)
        for tensor in live.values():
            tensor.zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert saver.wait() == Outcome(2, None)
    assert seed_found(tmp_path) == 2
