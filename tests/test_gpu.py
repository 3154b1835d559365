"""What only a GPU can show: whole steps in every precision, the fused optimizer, pinned batches, resume."""

import json

import pytest
import torch

from fastjepa.exits import Exit

pytestmark = pytest.mark.gpu


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_every_name_of_the_device_works(run, device):
    code, folder = run(f"runtime.device={device}", "runtime.stop_at=2")
    assert code == Exit.DONE
    assert len(losses(folder)) == 2


@pytest.mark.parametrize("truncation", ["group", "random", "none"])
@pytest.mark.parametrize("execution", ["packed", "reference"])
@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-4), ("bfloat16", 0.02), ("float16", 0.02)])
def test_losses_follow_those_of_the_cpu(run, dtype, rel, execution, truncation):
    settings = (f"mask.truncation={truncation}", "mask.group=2", f"runtime.execution={execution}", "runtime.stop_at=4")
    _, cpu = run(*settings, "optim.dtype=float32", folder="cpu")
    code, gpu = run(*settings, f"optim.dtype={dtype}", "runtime.device=cuda", "data.workers=2", folder="gpu")
    assert code == Exit.DONE
    for one, other in zip(losses(cpu), losses(gpu), strict=True):
        assert other == pytest.approx(one, rel=rel)


def test_a_deterministic_run_continues_bitwise(run):
    settings = ("runtime.device=cuda", "runtime.deterministic=true", "optim.dtype=bfloat16")
    try:
        _, whole = run(*settings, folder="whole")
        run(*settings, "runtime.stop_at=4", folder="parts")
        _, parts = run(*settings, folder="parts")
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(parts) == losses(whole)


def test_a_step_that_is_not_finite_changes_nothing(run):
    code, folder = run(
        "runtime.device=cuda", "optim.lr=1e30", "optim.start_lr=1e30", "optim.warmup_steps=0", "optim.clip_grad=null"
    )
    assert code == Exit.NON_FINITE
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
