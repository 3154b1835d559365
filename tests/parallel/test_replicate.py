"""DDP: processes that share a batch train as one process with all of it."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from fastjepa.parallel import replicate
from tests.parallel import stepping
from tests.parallel.stepping import Case, assert_same, gap, replace, train, train_in
from tests.processes import run_processes

DOUBLE, HALF = torch.float64, torch.bfloat16
CASES = {
    "float64": Case(dtype=DOUBLE, steps=50, clip_grad=0.1),
    "float32": Case(steps=50, clip_grad=0.1),
    "noised": Case(noised=True),
    "ragged": Case(truncation="none"),
    "regulariser": Case(jepa={"reg_coeff": 0.1}),
    "recomputed": Case(recompute=2),
    "positions": Case(more={"ema_positions": True}),
    "kernels": Case(pieces="reference", kernels="reference", widths=(64, 32)),
}


@pytest.fixture(scope="module")
def alone():
    torch.set_num_threads(1)
    parts = {f"half in {parts}": Case(half=HALF, parts=parts) for parts in (2, 4)}
    kernels = {f"half in {parts}, kernels": Case(half=HALF, parts=parts, kernels="reference") for parts in (2, 4)}
    return {name: train(case) for name, case in (CASES | parts | kernels).items()}


@pytest.fixture(scope="module")
def in_two():
    accumulated = {
        "float32 in parts": replace(CASES["float32"], parts=2, steps=10),
        "float64 in parts": replace(CASES["float64"], parts=3, steps=3),
        "half": Case(half=HALF),
        "half in parts": Case(half=HALF, parts=2),
        "half, kernels": Case(half=HALF, kernels="reference"),
        "half in parts, kernels": Case(half=HALF, parts=2, kernels="reference"),
    }
    cases = {name: replace(case, kind="ddp") for name, case in (CASES | accumulated).items()}
    return train_in(2, cases)


def test_two_processes_are_one_with_all_clips_in_float64(alone, in_two):
    """Over 50 steps, clipped ones among them."""
    found = gap(in_two[0]["float64"], alone["float64"])
    assert found["losses"] <= 1e-12
    assert found["norms"] <= 1e-12
    assert found["weights"] <= 1e-12
    assert found["moments"] <= 1e-11
    norms = [encoder**2 + predictor**2 for _, encoder, predictor, *_ in alone["float64"].steps]
    assert min(norms) > 0.1**2, "so small a limit clips every step"


def test_two_processes_are_one_with_all_clips_in_float32(alone, in_two):
    found = gap(in_two[0]["float32"], alone["float32"])
    assert found["losses"] <= 1e-5
    assert found["norms"] <= 1e-4
    assert found["weights"] <= 1e-3


@pytest.mark.parametrize("name", list(CASES)[2:])
def test_two_processes_are_one_with_all_clips_whatever_is_trained(alone, in_two, name):
    found = gap(in_two[0][name], alone[name])
    assert found["losses"] <= 1e-6
    assert found["norms"] <= 1e-5
    assert found["weights"] <= 1e-4
    assert found["moments"] <= 1e-4


def test_all_processes_hold_the_same_to_the_bit(in_two):
    for name, first in in_two[0].items():
        second = in_two[1][name]
        assert [step[:3] for step in first.steps] == [step[:3] for step in second.steps], name
        assert all(first.tensors[key].equal(value) for key, value in second.tensors.items()), name


def test_micro_batches_are_exchanged_once_and_as_their_mean(alone, in_two):
    for ours, theirs in zip(in_two[0]["float32 in parts"].steps, alone["float32"].steps):
        assert ours == pytest.approx(theirs, rel=1e-5)
    first = replace(CASES["float64"], steps=3)
    assert_same(in_two[0]["float64 in parts"], train(first), 1e-11)


@pytest.mark.parametrize("kernels", ["", ", kernels"])
def test_two_processes_round_as_one_with_two_micro_batches(alone, in_two, kernels):
    """Gradients of bfloat16 copies are averaged in float32: (a + b) / 2 is a / 2 + b / 2 to the bit."""
    assert_same(in_two[0][f"half{kernels}"], alone[f"half in 2{kernels}"], 0.0)


@pytest.mark.parametrize("kernels", ["", ", kernels"])
def test_micro_batches_of_two_processes_round_as_those_of_one(alone, in_two, kernels):
    """The same four bfloat16 gradients are summed in float32, in another order."""
    assert_same(in_two[0][f"half in parts{kernels}"], alone[f"half in 4{kernels}"], 1e-6)


# -- the order of sums ------------------------------------------------------------------------------------------------


def resumed(cases: dict[str, Case]) -> list[tuple[str, stepping.Trained, stepping.Trained]]:
    """(name, four steps more after two, the same ones by a pass made anew from what the two have left)."""
    # So that the few weights of a test fall into several buckets, as those of a real model do.
    replicate.DistributedDataParallel = partial(replicate.DistributedDataParallel, bucket_cap_mb=0.02)
    dist.init_process_group("gloo")
    found = []
    for name, case in cases.items():
        straight, begun = train(case), train(replace(case, steps=2))
        rest = train(replace(case, first=2, steps=4, state=begun.tensors))
        found.append((name, straight, replace(rest, steps=begun.steps + rest.steps)))
    return found


def test_processes_that_begin_anew_sum_in_the_order_of_those_that_went_on():
    """DDP sorts its buckets anew after its first pass, and three numbers have more than one sum."""
    case = Case(kind="ddp", widths=(48, 24), steps=6)
    for name, straight, again in run_processes(resumed, 3, {"float32": case, "half": replace(case, half=HALF)})[0]:
        assert again.steps == straight.steps, name
        assert all(again.tensors[key].equal(value) for key, value in straight.tensors.items()), name
