"""The helper that runs tests in several processes: results by rank, the first failure, no process left behind."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.processes import run_processes


def summed(value: int) -> tuple[int, int, int]:
    dist.init_process_group("gloo")
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total), torch.get_num_threads()


def environment(name: str) -> str | None:
    return os.environ.get(name)


def fails_on_rank_one() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("this one is at fault")
    dist.barrier()


def dies_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def hangs() -> None:
    time.sleep(60)


def test_results_come_by_rank():
    assert run_processes(summed, 3, 10) == [(0, 33, 1), (1, 33, 1), (2, 33, 1)]


def test_the_environment_is_that_of_the_test(monkeypatch):
    monkeypatch.setenv("FASTJEPA_TEST_WORD", "hello")
    assert run_processes(environment, 2, "FASTJEPA_TEST_WORD") == ["hello", "hello"]
    assert run_processes(environment, 2, "LOCAL_RANK") == ["0", "1"]


def test_the_traceback_is_that_of_the_process_that_failed_first():
    with pytest.raises(AssertionError, match=r"(?s)^rank 1:.*ValueError: this one is at fault"):
        run_processes(fails_on_rank_one, 2)


def test_a_process_that_dies_ends_the_others():
    with pytest.raises(AssertionError, match="rank 1 ended with exit code -9"):
        run_processes(dies_on_rank_one, 2)


def test_processes_that_hang_are_ended_and_say_where():
    with pytest.raises(AssertionError, match=r"(?s)2 of 2 processes had not ended after 1 s.*in hangs"):
        run_processes(hangs, 2, timeout=1)
