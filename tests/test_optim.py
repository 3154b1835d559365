"""Parameter groups, and the optimizer pass with its skipped steps."""

import math

import pytest
import torch

from fastjepa.jepa import JEPA
from fastjepa.models import VisionTransformer, vit_predictor
from fastjepa.optim import OptimizerPass, parameter_groups
from fastjepa.schedules import Schedule

GRID = {"img_size": 32, "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "uniform_power": True}
RECIPE = {
    "lr": 6.25e-4, "start_lr": 2e-4, "final_lr": 1e-6, "weight_decay": 0.04, "final_weight_decay": 0.4,
    "momentum": 0.998, "final_momentum": 1.0,
}  # fmt: skip
SHORT = Schedule(100, 10, **{**RECIPE, "lr": 1e-2, "start_lr": 5e-3, "momentum": 0.9})


def make(**arguments):
    torch.manual_seed(0)
    sizes = {**GRID, "embed_dim": 24, "depth": 1, "num_heads": 2, "init_std": 0.2}
    jepa = JEPA(
        VisionTransformer(**sizes), vit_predictor(**sizes, predictor_embed_dim=12, use_mask_tokens=True), loss_exp=2.0
    )
    return jepa, OptimizerPass(jepa, SHORT, **arguments)


def batch(number):
    generator = torch.Generator().manual_seed(number)
    order = torch.stack([torch.randperm(32, generator=generator) for _ in range(4)])
    masks = [[order[:, :9], order[:, :5]], [order[:, 20:], order[:, 16:]]]
    return torch.randn(4, 3, 4, 32, 32, generator=generator), *masks


def train(update, steps, numbers=None):
    """One training step for each number; the numbers name the batches."""
    for step, number in zip(steps, numbers or steps):
        loss = update.jepa(*batch(number)).loss
        update.backward(loss)
        update.step(step, loss.detach())


def everything(update):
    """Weights, target encoder, moments, step counts, counters: copied."""
    state = {**update.jepa.state_dict(), **update.state()}
    return {name: value.clone() for name, value in state.items()}


def assert_same(got, want, but=()):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert name in but or torch.equal(got[name], value), name


COUNTERS = ("optim.skipped", "optim.skipped_in_a_row")


# Parameter groups


def test_groups_are_encoder_and_predictor_with_decay_and_then_without():
    jepa, _ = make()
    names = {id(p): name for name, p in jepa.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in parameter_groups(jepa)]
    assert [{name.split(".")[0] for name in group} for group in groups] == [{"encoder"}, {"predictor"}] * 2
    for name, p in jepa.named_parameters():
        found = [number for number, group in enumerate(groups) if name in group]
        if name.startswith("target_encoder") or name.endswith("pos_embed"):
            assert found == []
        else:
            decayed = p.ndim > 1 and not name.endswith("bias")
            assert found == [(0 if decayed else 2) + name.startswith("predictor")]
    assert {"predictor.mask_tokens.0", "predictor.mask_tokens.1"} <= set(groups[1])


def test_a_bias_of_more_dimensions_is_not_decayed():
    jepa, _ = make()
    jepa.encoder.register_parameter("row_bias", torch.nn.Parameter(torch.zeros(2, 2)))
    assert any(p is jepa.encoder.row_bias for p in parameter_groups(jepa)[2]["params"])


def test_learning_rate_and_decay_of_a_step_reach_the_groups():
    _, update = make()
    for group in update.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 9.0
    train(update, [37])
    assert [group["lr"] for group in update.optimizer.param_groups] == [SHORT.lr_at(37)] * 4
    decay = SHORT.weight_decay_at(37)
    assert [group["weight_decay"] for group in update.optimizer.param_groups] == [decay, decay, 0.0, 0.0]


# The step


def test_a_step_is_adamw_and_then_the_moving_average():
    # A large epsilon keeps the key biases, whose gradients are only rounding, out of the comparison.
    jepa, update = make(betas=(0.8, 0.95), eps=1e-3)
    twin, _ = make()
    plain = torch.optim.AdamW(parameter_groups(twin), betas=(0.8, 0.95), eps=1e-3)
    for step in range(3):
        train(update, [step])
        for group in plain.param_groups:
            group["lr"] = SHORT.lr_at(step)
            group["weight_decay"] = SHORT.weight_decay_at(step) if group["decayed"] else 0.0
        twin(*batch(step)).loss.backward()
        plain.step()
        plain.zero_grad()
        twin.update_target(SHORT.momentum_at(step))
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(jepa.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in jepa.parameters())


@pytest.mark.parametrize("averaged", [False, True])
def test_the_position_table_is_averaged_on_request(averaged):
    jepa, update = make(ema_positions=averaged)
    jepa.target_encoder.pos_embed += 1.0
    train(update, [0])
    distance = (jepa.target_encoder.pos_embed - jepa.encoder.pos_embed).mean().item()
    assert distance == pytest.approx(SHORT.momentum_at(0) if averaged else 1.0, rel=1e-5)


def test_norms_are_those_of_the_unclipped_gradients():
    jepa, update = make(clip_grad=1e-3)
    loss = jepa(*batch(0)).loss
    update.backward(loss)
    squares = [
        sum(p.grad.square().sum().item() for p in network.parameters() if p.grad is not None)
        for network in (jepa.encoder, jepa.predictor)
    ]
    norms = update.step(0, loss.detach())
    assert norms.encoder.item() == pytest.approx(squares[0] ** 0.5, rel=1e-5)
    assert norms.predictor.item() == pytest.approx(squares[1] ** 0.5, rel=1e-5)
    assert norms.total.item() == pytest.approx(sum(squares) ** 0.5, rel=1e-5)


def clipped_norms(step, **arguments):
    """(norms before clipping, norms of encoder, predictor and both as the optimizer sees them)."""
    jepa, update = make(**arguments)
    seen = []
    update.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(
            torch.nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None]).item()
            for part in (jepa.encoder, jepa.predictor, jepa)
        )
    )
    loss = jepa(*batch(0)).loss
    update.backward(loss)
    norms = update.step(step, loss.detach())
    return [norm.item() for norm in (norms.encoder, norms.predictor, norms.total)], seen


def test_clipping_jointly_keeps_the_proportion_of_the_networks():
    (encoder, predictor, total), seen = clipped_norms(0, clip_grad=1e-2)
    assert total > 1e-2
    assert seen[2] == pytest.approx(1e-2, rel=1e-3)
    assert seen[0] / seen[1] == pytest.approx(encoder / predictor, rel=1e-4)


def test_clipping_per_network_gives_each_its_own_limit():
    _, seen = clipped_norms(0, clip_grad=1e-2, clip_per_network=True)
    assert seen[:2] == pytest.approx([1e-2, 1e-2], rel=1e-3)


@pytest.mark.parametrize(
    ("step", "arguments"), [(4, {"clip_grad": 1e-2, "clip_from_step": 5}), (9, {}), (0, {"clip_grad": 1e3})]
)
def test_before_the_first_clipped_step_without_a_limit_and_below_it_nothing_is_clipped(step, arguments):
    before, seen = clipped_norms(step, **arguments)
    assert seen == pytest.approx(before, rel=1e-6)
    if "clip_from_step" in arguments:
        assert clipped_norms(5, **arguments)[1][2] == pytest.approx(1e-2, rel=1e-3)


# Steps that are not finite


def spoil(jepa, where, value):
    network = {"encoder": jepa.encoder, "predictor": jepa.predictor}[where]
    next(p for p in network.parameters() if p.grad is not None and p.ndim > 1).grad.view(-1)[3] = value


@pytest.mark.parametrize("clip", [None, 1e-2])
@pytest.mark.parametrize("where", ["encoder", "predictor", "loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(where, value, clip):
    jepa, update = make(clip_grad=clip, ema_positions=True)
    train(update, [0, 1])
    before = everything(update)
    loss = jepa(*batch(2)).loss
    update.backward(loss)
    if where != "loss":
        spoil(jepa, where, value)
    norms = update.step(2, loss.detach() * (value if where == "loss" else 1.0))
    assert_same(everything(update), before, but=COUNTERS)
    assert (update.skipped.item(), update.skipped_in_a_row.item()) == (1, 1)
    assert all(p.grad is None for p in jepa.parameters())
    assert where == "loss" or not torch.isfinite(norms.total)


def test_the_step_after_a_skipped_one_equals_one_that_never_saw_it():
    (jepa, update), (_, clean) = make(), make()
    train(update, [0, 1])
    train(clean, [0, 1])
    loss = jepa(*batch(7)).loss
    update.backward(loss)
    spoil(jepa, "encoder", math.nan)
    update.step(2, loss.detach())
    train(update, [3])
    train(clean, [3])
    assert_same(everything(update), everything(clean), but=COUNTERS)
    assert (update.skipped.item(), update.skipped_in_a_row.item()) == (1, 0)
    assert clean.skipped.item() == 0


def test_the_first_step_of_all_may_be_skipped():
    (jepa, update), (_, clean) = make(), make()
    for _ in range(2):
        loss = jepa(*batch(7)).loss
        update.backward(loss)
        update.step(0, loss.detach() * math.nan)
    assert (update.skipped.item(), update.skipped_in_a_row.item()) == (2, 2)
    train(update, [2])
    train(clean, [2])
    assert_same(everything(update), everything(clean), but=COUNTERS)


def test_a_bad_step_says_so_on_the_device_and_names_the_gradients_that_were_not_finite():
    jepa, update = make()
    assert update.norms_of_bad_step() == {}
    loss = jepa(*batch(0)).loss
    update.backward(loss)
    assert update.step(0, loss.detach()).bad.item() == 0
    assert set(update.norms_of_bad_step().values()) == {0.0}
    loss = jepa(*batch(1)).loss
    update.backward(loss)
    spoilt = jepa.predictor.predictor_blocks[0].mlp.fc2.bias
    spoilt.grad[2] = math.inf
    want = {name: p.grad.norm().item() for name, p in jepa.named_parameters() if p.grad is not None and p is not spoilt}
    assert update.step(1, loss.detach()).bad.item() == 1
    train(update, [2])  # the next good step does not overwrite what is known
    got = update.norms_of_bad_step()
    assert got.pop("predictor.predictor_blocks.0.mlp.fc2.bias") == math.inf
    assert got == pytest.approx(want, rel=1e-5)
    assert len(got) > 20


def test_the_schedules_know_the_step_only():
    """A step that changes nothing moves no schedule: the later ones are where they would have been."""
    jepa, update = make()
    loss = jepa(*batch(0)).loss
    update.backward(loss)
    update.step(0, loss.detach() * math.nan)
    train(update, [1])
    assert update.optimizer.param_groups[0]["lr"] == SHORT.lr_at(1)
    assert {value.item() for name, value in update.state().items() if name.startswith("optim.step.")} == {1.0}


# float16


def test_a_scaled_step_equals_the_unscaled_one():
    (_, update), (_, plain) = (
        make(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10), clip_grad=0.1),
        make(clip_grad=0.1),
    )
    train(update, range(3))
    train(plain, range(3))
    for name, value in everything(plain).items():
        torch.testing.assert_close(everything(update)[name], value, rtol=1e-5, atol=1e-7)
    assert update.scaler.get_scale() == 2.0**10
    assert update.skipped.item() == 0


def test_the_backward_pass_is_scaled():
    jepa, update = make(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    loss = jepa(*batch(0)).loss
    (plain,) = torch.autograd.grad(loss, jepa.encoder.norm.weight, retain_graph=True)
    update.backward(loss)
    torch.testing.assert_close(jepa.encoder.norm.weight.grad, plain * 2.0**10)


def test_an_overflow_is_skipped_and_halves_the_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    jepa, update = make(scaler=scaler)
    train(update, [0])
    before = everything(update)
    loss = jepa(*batch(1)).loss
    update.backward(loss)
    spoil(jepa, "predictor", math.inf)
    update.step(1, loss.detach())
    assert scaler.get_scale() == 2.0**9
    assert_same(everything(update), before, but=COUNTERS)
    assert update.skipped.item() == 1
    train(update, [2, 3])
    assert scaler.get_scale() == 2.0**10
    assert update.skipped_in_a_row.item() == 0


# State


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_state_copied_into_a_fresh_pass_continues_bitwise(steps_before):
    jepa, update = make(clip_grad=0.1)
    train(update, range(steps_before))
    if steps_before:
        loss = jepa(*batch(9)).loss
        update.backward(loss)
        update.step(steps_before, loss.detach() * math.nan)
    saved = everything(update)
    fresh_jepa, fresh = make(clip_grad=0.1)
    train(fresh, [50])  # so that nothing is right by chance
    live = {**fresh_jepa.state_dict(), **fresh.state()}
    assert live.keys() == saved.keys()
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])
    assert_same(everything(fresh), saved)
    later = range(steps_before + 1, steps_before + 4)
    train(update, later)
    train(fresh, later)
    assert_same(everything(fresh), everything(update))
    assert fresh.skipped.item() == (1 if steps_before else 0)


def test_the_state_names_every_trained_parameter_once():
    jepa, update = make()
    trained = [name for name, p in jepa.named_parameters() if p.requires_grad]
    assert not any(name.startswith("target_encoder") for name in trained)
    want = {f"optim.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in trained}
    assert set(update.state()) == want | set(COUNTERS)
    assert not any(value.any() for value in update.state().values())
    train(update, range(2))
    assert set(update.state()) == want | set(COUNTERS)
    assert {value.item() for name, value in update.state().items() if name.startswith("optim.step.")} == {2.0}
