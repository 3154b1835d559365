"""FSDP2: processes that hold a part of each weight train as those that hold all."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fastjepa.parallel import shard
from tests import small_jepa
from tests.parallel.stepping import Case, build, gap, replace, train_in
from tests.processes import run_processes

HALF = torch.bfloat16
# Shards of whole vectors: in others the last few numbers are computed by other instructions, which round otherwise.
WIDE = (64, 32)
BITWISE = {
    "float32": Case(steps=50, clip_grad=None, widths=WIDE),
    "half": Case(half=HALF, clip_grad=None, widths=WIDE),
}
CLOSE = {
    "in parts": Case(parts=2, clip_grad=None),
    "clipped": Case(steps=10, clip_grad=0.05, widths=WIDE),
    "half, clipped": Case(half=HALF, clip_grad=0.05, widths=WIDE),
    "half in parts": Case(half=HALF, parts=2, clip_grad=0.05, widths=WIDE),
    "clipped per network": Case(clip_grad=0.05, more={"clip_per_network": True}),
    "noised": Case(noised=True),
    "ragged": Case(truncation="none"),
    "regulariser": Case(jepa={"reg_coeff": 0.1}),
    "deep": Case(jepa={"levels": (0, 1), "dense": True}),
    "half, deep": Case(half=HALF, jepa={"levels": (0, 1), "dense": True}, widths=WIDE),
    "recomputed": Case(recompute=2),
    "half, recomputed": Case(recompute=2, half=HALF),
    "positions": Case(more={"ema_positions": True}),
    "kernels": Case(pieces="reference", kernels="reference", widths=WIDE),
}


def both(cases):
    return {f"{kind} {name}": replace(case, kind=kind) for name, case in cases.items() for kind in ("ddp", "fsdp2")}


@pytest.fixture(scope="module")
def in_two():
    return train_in(2, both(BITWISE | CLOSE))


@pytest.mark.parametrize("name", BITWISE)
def test_shards_give_to_the_bit_what_replicas_give(in_two, name):
    """The norms of gradients, which only logs read here, are summed in another order."""
    found = gap(in_two[0][f"fsdp2 {name}"], in_two[0][f"ddp {name}"])
    assert found.pop("norms") <= 1e-6
    assert found == {"losses": 0.0, "weights": 0.0, "moments": 0.0}


@pytest.mark.parametrize("name", CLOSE)
def test_shards_give_what_replicas_give(in_two, name):
    found = gap(in_two[0][f"fsdp2 {name}"], in_two[0][f"ddp {name}"])
    assert found["losses"] <= 1e-6
    assert found["norms"] <= 1e-5
    assert found["weights"] <= 1e-4
    assert found["moments"] <= 1e-4


def test_all_processes_learn_the_same_of_a_step(in_two):
    for name, first in in_two[0].items():
        assert [step[:3] for step in first.steps] == [step[:3] for step in in_two[1][name].steps], name


@pytest.mark.parametrize("name", [*BITWISE, *CLOSE])
def test_each_process_holds_about_half_of_what_replicas_hold(in_two, name):
    for rank in (0, 1):
        part = in_two[rank][f"fsdp2 {name}"].held / in_two[rank][f"ddp {name}"].held
        assert 0.45 < part < 0.6, "a table of positions with one row lies in one process"


def test_shards_need_not_be_equal():
    """Widths that three do not divide: 25 rows are 9, 9 and 7, and a mask token lies in one process."""
    cases = both({"odd": Case(widths=(20, 14), clip_grad=0.05), "odd half": Case(widths=(20, 14), half=HALF)})
    found = train_in(3, cases)
    for name in ("odd", "odd half"):
        assert max(gap(found[0][f"fsdp2 {name}"], found[0][f"ddp {name}"]).values()) <= 1e-3, name
        held = [one[f"fsdp2 {name}"].held / found[0][f"ddp {name}"].held for one in found]
        assert max(held) < 0.5, held


# -- when weights are gathered ----------------------------------------------------------------------------------------


def gathered() -> dict:
    """Names of what is whole: while each block runs, and after each kind of pass."""
    dist.init_process_group("gloo")
    exchange, update = build(Case(kind="fsdp2", half=HALF))
    jepa, seen = exchange.jepa, {"running": [], "dtypes": set(), "idle": {}}
    inner = jepa.operations._block

    def block(number, block, after, *rest):
        seen["running"].append({name[: name.index("blocks.") + 8] for name in whole_blocks()})
        seen["dtypes"].add((block.mlp.fc1.weight.dtype, block.norm2.weight.dtype, after.weight.dtype))
        return inner(number, block, after, *rest)

    def whole_ones():
        return [name for name, parameter in jepa.named_parameters() if not isinstance(parameter, DTensor)]

    def whole_blocks():
        return [name for name in whole_ones() if "blocks." in name and "norm" not in name]

    jepa.operations._block = block
    context, target = small_jepa.masks(2)
    clips = small_jepa.clips(2).float()
    with torch.autocast("cpu", torch.bfloat16):
        seen["idle"]["made"] = whole_ones()
        loss = exchange.loss(clips, context, target).loss
        seen["idle"]["forward"] = whole_ones()
        exchange.loss(clips, context, target, look=True)
        seen["idle"]["look"] = whole_ones()
    update.backward(loss)
    seen["idle"]["backward"] = whole_ones()
    update.step(0, loss.detach())
    seen["idle"]["step"] = whole_ones()
    seen["gradients"] = [name for name, parameter in jepa.named_parameters() if parameter.grad is not None]
    return seen


def test_a_block_is_whole_while_it_runs_and_nothing_is_between_passes():
    for seen in run_processes(gathered, 2):
        # A pass: the target encoder's, the encoder's, the predictor's, whose last blocks go another way.
        assert len(seen["running"]) >= 5
        for whole in seen["running"]:
            assert len(whole) == 1, f"one block at a time, not {whole}"
        assert seen["dtypes"] == {(HALF, torch.float32, torch.float32)}, "norms keep float32, as they do in one process"
        assert seen["idle"] == {name: [] for name in ("made", "forward", "look", "backward", "step")}
        assert seen["gradients"] == []


def target_state() -> tuple:
    dist.init_process_group("gloo")
    case = Case(kind="fsdp2", steps=2)
    exchange, _ = build(case)
    found = exchange.target_state()
    return found, {name: t.full_tensor() for name, t in exchange.jepa.target_encoder.state_dict().items()}


def test_the_whole_target_encoder_is_given_to_the_first_process_alone():
    (first, wanted), (second, _) = run_processes(target_state, 2)
    assert first.keys() == wanted.keys()
    assert all(first[name].equal(value) for name, value in wanted.items())
    assert second == {}


def test_a_jepa_that_cannot_run_a_block_within_a_call_is_refused():
    with pytest.raises(ValueError, match=r"^FSDP2 takes a JEPA whose operations can run a block within a call"):
        shard.Sharded(small_jepa.make("reference"), torch.device("cpu"), torch.float32)
