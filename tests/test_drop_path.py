"""Stochastic depth in both executions: who skips what, how the rest is scaled, and that a run continues exactly."""

import json
from copy import deepcopy

import pytest
import torch

from fastjepa.exits import Exit
from fastjepa.fused import Fused
from fastjepa.models.layers import DropPath
from fastjepa.models.operations import LIBRARY
from fastjepa.models.packing import encode_sets
from fastjepa.pieces import build_operations
from tests.small_jepa import assert_same, clips, gradients, make, masks

CPU = torch.device("cpu")
WIDTHS = (32, 48)
RATE = 0.4
OPERATIONS = {
    "library": LIBRARY,
    "calls": build_operations("library", "auto", CPU)[0],
    "fused": Fused("reference"),
}


def encoded(jepa, sets, operations, seed=0):
    """Features of the kept tokens, [R, E], with the draws of a seed."""
    torch.manual_seed(seed)
    patches = [operations.cut(jepa.encoder, clips(4))]
    return encode_sets(jepa.encoder, patches, [sets], operations)


def drawn(monkeypatch, *scales):
    """Hand in what the encoder's last block draws, half by half; blocks before it have a rate of 0."""
    left = list(scales)
    monkeypatch.setattr(DropPath, "scales", lambda self, clips, like: left.pop(0).to(like))


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_of_a_clip_share_its_draw_and_what_is_kept_is_scaled(name, monkeypatch):
    jepa = make(widths=WIDTHS, drop_path=RATE)
    context, _ = masks(4)
    # Two mask sets of four clips each: eight draws for each half of the block.
    attention = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1]) / (1 - RATE)
    feed_forward = torch.tensor([0, 1, 0, 1, 1, 1, 0, 0]) / (1 - RATE)
    drawn(monkeypatch, attention, feed_forward)
    got = encoded(jepa, context, OPERATIONS[name])
    parts = got.split([index.numel() for index in context])
    network = jepa.encoder
    for number, (index, rows) in enumerate(zip(context, parts)):
        tokens = network.embed(clips(4)).gather(1, index.unsqueeze(-1).expand(-1, -1, WIDTHS[0]))
        first, last = network.blocks
        tokens = first(tokens)
        here = slice(4 * number, 4 * number + 4)
        tokens = tokens + attention[here, None, None] * last.attn(last.norm1(tokens))
        tokens = tokens + feed_forward[here, None, None] * last.mlp(last.norm2(tokens))
        torch.testing.assert_close(rows, network.norm(tokens).flatten(0, 1), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_branches_of_half_precision_are_scaled_exactly_and_rounded_once(dtype):
    rows = torch.randn(64, 24, dtype=dtype)
    path = DropPath(RATE).train()
    torch.manual_seed(0)
    scales = path.scales(64, rows)
    assert scales.dtype == torch.float32
    assert set(scales.tolist()) == {0.0, float(torch.tensor(1.0) / torch.tensor(1 - RATE))}
    expected = (rows.double() * scales.double().unsqueeze(1)).float().to(dtype)
    torch.manual_seed(0)
    assert torch.equal(path(rows), expected)
    residual = torch.randn(64, 24)
    _, total = LIBRARY.add_norm(torch.nn.LayerNorm(24), rows, None, residual, torch.nn.Dropout(0.0), scale=scales)
    assert total.dtype == torch.float32
    assert torch.equal(total, residual + expected)


@pytest.mark.parametrize("execution", ["packed", "reference"])
@pytest.mark.parametrize("truncation", ["group", "none"])
def test_evaluation_leaves_nothing_out_and_the_target_encoder_never_does(execution, truncation):
    sets = masks(4, group=2, truncation=truncation)
    plain = make(execution, widths=WIDTHS)
    jepa = make(execution, widths=WIDTHS, drop_path=RATE)
    jepa.load_state_dict(plain.state_dict())
    expected = plain(clips(4), *sets, collect=True)
    out = jepa(clips(4), *sets, collect=True)
    assert out.loss != expected.loss
    for ours, theirs in zip(out.targets, expected.targets):
        assert torch.equal(ours, theirs)
    jepa.eval()
    assert torch.equal(jepa(clips(4), *sets).loss, expected.loss)


@pytest.mark.parametrize("name", ["library", "fused"])
def test_the_mean_over_draws_tends_to_the_branch_that_is_always_kept(name):
    """Of the block before the norm: what each row gains, on average, is its whole branch."""
    jepa = make(widths=WIDTHS, drop_path=RATE)
    context, _ = masks(4)
    last = jepa.encoder.blocks[1]
    with torch.no_grad():
        last.mlp.fc2.weight.zero_()  # one branch, which is then linear in its draw
        last.mlp.fc2.bias.zero_()
        seen = []
        jepa.encoder.norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        operations = LIBRARY
        if name == "fused":
            operations = Fused("reference")
            plain = operations.add_norm
            operations.add_norm = lambda norm, *rest, **named: keep(seen, norm, plain(norm, *rest, **named), jepa)
        jepa.eval()
        encoded(jepa, context, operations)
        whole = seen.pop()
        jepa.train()
        for seed in range(400):
            encoded(jepa, context, operations, seed)
    spread = torch.stack(seen).std(0)
    error = torch.stack(seen).mean(0) - whole
    assert spread.max() > 0
    assert error.abs().max() < 5 * spread.max() / 400**0.5


def keep(seen, norm, result, jepa):
    if norm is jepa.encoder.norm:
        seen.append(result[1])
    return result


@pytest.mark.parametrize("name", ["calls", "fused"])
def test_recomputed_blocks_see_the_same_draws(name):
    kernels = "library" if name == "calls" else "reference"
    found = []
    for count in (0, 2):
        operations = build_operations(kernels, "auto", CPU)[0]
        operations.run_blocks_by(None, count)
        jepa = make(widths=WIDTHS, drop_path=RATE, operations=operations)
        torch.manual_seed(3)
        loss = jepa(clips(4), *masks(4)).loss
        loss.backward()
        found.append((loss, gradients(jepa)))
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[1][1], found[0][1], rel=1e-12)


def test_recomputed_blocks_of_the_reference_execution_do_too():
    plain = make("reference", widths=WIDTHS, rotary="v2", drop_path=RATE)
    again = deepcopy(plain)
    again.encoder.recomputed = again.predictor.recomputed = 9
    kept = []
    for jepa in (plain, again):
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = jepa(clips(4), *masks(4)).loss
        kept.append(None)
        loss.backward()
    assert_same(gradients(again), gradients(plain), rel=1e-12)
    first, second = kept[: kept.index(None)], kept[kept.index(None) + 1 : -1]
    assert 2 * sum(second) < sum(first)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "more", [("data.batch_size=4",), ("runtime.execution=reference",)], ids=["packed", "reference"]
)
def test_a_run_that_stopped_equals_an_uninterrupted_one_bit_for_bit(run, more):
    more = ("model.drop_path=0.2", "optim.steps=4", "log.every=1", "log.images=false", *more)
    _, whole = run(*more, folder="whole")
    code, _ = run(*more, "runtime.stop_at=2", folder="parts")
    assert code == Exit.DONE
    torch.rand(7)  # a new process would be elsewhere in torch's numbers
    _, parts = run(*more, folder="parts")
    assert losses(parts) == losses(whole)
    _, other = run(*more, "model.drop_path=0", folder="other")
    assert losses(other) != losses(whole)
