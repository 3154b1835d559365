"""The first signal is noted, the second ends the process; devices, precision and determinism are what was asked for."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch

import fastjepa
from fastjepa import parallel
from fastjepa.config import Runtime
from fastjepa.exits import Exit
from fastjepa.signals import WATCHED, Interrupted, Interrupts

# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_the_process_goes_on(number):
    with Interrupts() as interrupts:
        interrupts.begin()
        assert interrupts.received is None
        os.kill(os.getpid(), number)
        assert interrupts.received == number.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_there_is_anything_to_save_a_signal_leaves(number):
    with pytest.raises(Interrupted, match=number.name), Interrupts():
        os.kill(os.getpid(), number)


def test_before_there_is_anything_to_save_ctrl_c_is_what_it_always_is():
    with pytest.raises(KeyboardInterrupt), Interrupts():
        os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_of_before_come_back():
    def own(number, frame):
        raise AssertionError("not in this test")

    before = {number: signal.signal(number, own) for number in WATCHED}
    try:
        with suppress(RuntimeError), Interrupts():
            assert all(signal.getsignal(number) is not own for number in WATCHED)
            raise RuntimeError
        assert all(signal.getsignal(number) is own for number in WATCHED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_after_another_notes_its_own_signal():
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with Interrupts() as interrupts:
            interrupts.begin()
            os.kill(os.getpid(), number)
        assert interrupts.received == number.name


PROCESS = """
import atexit, sys
from fastjepa.signals import Interrupts
atexit.register(print, "cleaned up")
with Interrupts() as interrupts:
    interrupts.begin()
    try:
        while True:
            print(interrupts.received, flush=True)
            sys.stdin.readline()
    finally:
        print("left the loop")
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGINT)],
)
def test_a_second_signal_ends_the_process_at_once(first, second):
    environment = {**os.environ, "PYTHONPATH": str(Path(fastjepa.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout.readline() == "None\n"
            process.send_signal(first)
            said = "None\n"
            while said == "None\n":  # the signal may arrive a little after the next line
                process.stdin.write("\n")
                process.stdin.flush()
                said = process.stdout.readline()
            assert said == f"{first.name}\n"
            process.send_signal(second)
            assert process.wait(timeout=60) == Exit.SECOND_INTERRUPT == 130
            assert process.stdout.read() == ""
        finally:
            process.kill()


# Devices


@pytest.fixture(autouse=True)
def _process_state(monkeypatch):
    """What set_up changes in the process is put back."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    for name in ("WORLD_SIZE", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # so that it is taken away again, whatever the test sets
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, as far as choosing one is concerned."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Pretend")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_a_gpu_where_there_is_none_is_refused_in_a_sentence(no_gpu, name):
    with pytest.raises(ValueError, match=rf"^runtime\.device: expected .*, given {name}: no GPU found$"):
        parallel.set_up(Runtime(device=name))


def test_a_gpu_beyond_the_last_is_refused_in_a_sentence(two_gpus):
    with pytest.raises(ValueError, match=r"^runtime\.device: this machine has 2 GPUs, given cuda:2$"):
        parallel.set_up(Runtime(device="cuda:2"))
    assert two_gpus == []


def test_auto_takes_the_cpu_where_there_is_no_gpu_and_says_why(no_gpu):
    device, reason = parallel.set_up(Runtime(threads=1))
    assert device == torch.device("cpu")
    assert reason == "1 threads, no GPU found"


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("auto", "cuda:1", "NVIDIA Pretend"),
        ("cuda", "cuda:0", "asked for: NVIDIA Pretend"),
        ("cuda:1", "cuda:1", "asked for: NVIDIA Pretend"),
    ],
)
def test_a_gpu_is_taken_and_made_the_current_one(two_gpus, name, device, reason):
    assert parallel.set_up(Runtime(device=name)) == (torch.device(device), reason)
    assert two_gpus == [torch.device(device)]


def test_the_cpu_can_be_asked_for_beside_a_gpu(two_gpus):
    device, reason = parallel.set_up(Runtime(device="cpu", threads=1))
    assert device == torch.device("cpu")
    assert reason == "asked for: 1 threads"
    assert two_gpus == []


def test_threads_are_those_asked_for_and_else_left_alone():
    parallel.set_up(Runtime(device="cpu", threads=2))
    assert torch.get_num_threads() == 2
    parallel.set_up(Runtime(device="cpu"))
    assert torch.get_num_threads() == 2


def test_determinism_is_a_setting():
    torch.backends.cudnn.benchmark = True
    parallel.set_up(Runtime(device="cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    parallel.set_up(Runtime(device="cpu", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_workspace_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    parallel.set_up(Runtime(device="cpu", deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


# Precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_matrix_products_run_in_the_dtype_that_was_asked_for_and_weights_stay(dtype):
    layer = torch.nn.Linear(8, 4)
    with parallel.autocast(torch.device("cpu"), dtype):
        out = layer(torch.ones(2, 8))
    assert out.dtype == getattr(torch, dtype)
    assert layer.weight.dtype == torch.float32
    assert layer(torch.ones(2, 8)).dtype == torch.float32


def test_float32_needs_no_autocast():
    assert isinstance(parallel.autocast(torch.device("cpu"), "float32"), nullcontext)


def test_only_float16_has_a_loss_scaler():
    cpu = torch.device("cpu")
    assert parallel.gradient_scaler(cpu, "bfloat16") is None
    assert parallel.gradient_scaler(cpu, "float32") is None
    scaler = parallel.gradient_scaler(cpu, "float16")
    assert scaler.is_enabled()
    assert scaler.scale(torch.ones(())).item() > 1


def test_waiting_for_the_cpu_does_nothing(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    parallel.synchronise(torch.device("cpu"))
    assert waited == []
    parallel.synchronise(torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")]
