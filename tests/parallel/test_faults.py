"""What is not finite in one process: the step changes nothing in any, and all count it."""

import math

import pytest
import torch
import torch.distributed as dist

from tests.parallel.stepping import Case, Fault, Trained, replace, train
from tests.processes import run_processes

COUNTERS = {"optim.skipped", "optim.skipped_in_a_row"}
FAULTS = [Fault("loss", math.nan, 1, 1), Fault("gradient", math.inf, 0, 1), Fault("input", math.nan, 1, 1)]
WAYS = {
    "ddp": Case(kind="ddp"),
    "ddp, half, kernels": Case(kind="ddp", half=torch.bfloat16, kernels="reference"),
    "fsdp2": Case(kind="fsdp2"),
    "fsdp2, half, kernels": Case(kind="fsdp2", half=torch.bfloat16, kernels="reference"),
}


def train_all() -> dict[tuple[str, int], Trained]:
    dist.init_process_group("gloo")
    return {
        (way, number): train(replace(case, fault=fault))
        for way, case in WAYS.items()
        for number, fault in enumerate(FAULTS)
    }


@pytest.fixture(scope="module")
def trained():
    return run_processes(train_all, 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[fault.where for fault in FAULTS])
def test_a_fault_in_one_process_skips_the_step_in_all(trained, way, number):
    for rank, found in enumerate(trained):
        one = found[way, number]
        before, at_fault, after = one.changed
        assert at_fault == COUNTERS, f"process {rank}"
        assert len(before) > 50
        assert len(after) > 50
        assert "optim.skipped_in_a_row" in after, "a good step ends the row"
        assert one.tensors["optim.skipped"] == 1
        assert all(tensor.isfinite().all() for tensor in one.tensors.values())


@pytest.mark.parametrize("way", WAYS)
def test_all_processes_learn_that_the_loss_is_not_finite(trained, way):
    for found in trained:
        losses = [step[0] for step in found[way, 0].steps]
        assert [math.isfinite(loss) for loss in losses] == [True, False, True]
