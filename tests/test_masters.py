"""Half-precision copies over float32 masters, and the step in one pass: the same numbers as each by itself."""

import math

import pytest
import torch

from tests.test_optim import batch, make, spoil

WAYS = {
    "torch": {},
    "kernels": {"kernels": "reference"},
    "copies": {"copies": torch.bfloat16},
    "copies, kernels": {"copies": torch.bfloat16, "kernels": "reference"},
}


def train(update, steps, parts=1, dtype=torch.bfloat16):
    """Steps of `parts` micro-batches each, under autocast."""
    for step in steps:
        total = torch.zeros(())
        for part in range(parts):
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                loss = update.jepa(*batch(parts * step + part)).loss / parts
            update.backward(loss)
            total += loss.detach()
        update.step(step, total)


def assert_close(got, want, rtol=2e-5, atol=1e-7):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def copied(update):
    return {name: value.clone() for name, value in update.tensors().items()}


def test_modules_hold_copies_of_matrices_and_nothing_else():
    jepa, update = make(copies=torch.bfloat16)
    for name, value in jepa.state_dict().items():
        matrix = name.endswith("weight") and value.ndim > 1
        assert (value.dtype == torch.bfloat16) == matrix == (name in update.masters), name
    assert {value.dtype for value in update.tensors().values()} == {torch.float32}
    assert len(update.masters) == 16
    assert update.tensors()["predictor.mask_tokens.0"] is not None


@pytest.mark.parametrize("ways", [("copies", "torch"), ("copies, kernels", "kernels")])
def test_copies_give_to_the_bit_what_autocast_makes_of_float32_weights(ways):
    """Autocast rounds the same matrices and widens the same gradients, anew in every pass."""
    with_copies, without = (make(clip_grad=0.1, **WAYS[way])[1] for way in ways)
    for update in (with_copies, without):
        train(update, range(4))
    # Clipping reads gradients before they are widened: the norm is the same to rounding, and so is all that follows.
    assert_close(copied(with_copies), copied(without), rtol=1e-5, atol=1e-6)


def test_without_clipping_they_are_equal_bit_for_bit():
    with_copies, without = (make(**WAYS[way])[1] for way in ("copies", "torch"))
    for update in (with_copies, without):
        train(update, range(4))
    want = copied(without)
    for name, value in copied(with_copies).items():
        assert value.equal(want[name]), name


@pytest.mark.parametrize("per_network", [False, True])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "torch"])
def test_every_way_makes_the_same_steps(way, per_network):
    arguments = {"clip_grad": 1e-2, "clip_per_network": per_network, "ema_positions": True, "eps": 1e-4}
    results = []
    for more in (WAYS[way], WAYS["copies"] if "copies" in way else {}):
        _, update = make(**arguments, **more)
        update.jepa.target_encoder.pos_embed.add_(0.5)
        train(update, range(3), dtype=torch.bfloat16 if "copies" in way else torch.float32)
        results.append(copied(update))
    assert_close(*results)


@pytest.mark.parametrize("way", WAYS)
def test_the_copies_follow_and_the_state_has_one_form(way):
    jepa, update = make(**WAYS[way])
    train(update, range(2))
    for name, master in update.masters.tensors().items():
        assert jepa.state_dict()[name].equal(master.bfloat16()), name
    assert update.tensors().keys() == make()[1].tensors().keys()
    assert all(p.grad is None for p in jepa.parameters())
    assert {value.item() for name, value in update.state().items() if name.startswith("optim.step.")} == {2.0}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(way, value):
    jepa, update = make(clip_grad=1e-2, ema_positions=True, **WAYS[way])
    train(update, range(2))
    before, modules = copied(update), {name: p.clone() for name, p in jepa.state_dict().items()}
    loss = jepa(*batch(2)).loss if "copies" not in way else autocast_loss(jepa, 2)
    update.backward(loss)
    spoil(jepa, "encoder", value)
    update.step(2, loss.detach())
    for got, want in ((update.tensors(), before), (jepa.state_dict(), modules)):
        for name, tensor in want.items():
            assert got[name].equal(tensor) != (name in ("optim.skipped", "optim.skipped_in_a_row")), name
    assert update.skipped.item() == 1


def autocast_loss(jepa, number):
    with torch.autocast("cpu", torch.bfloat16):
        return jepa(*batch(number)).loss


@pytest.mark.parametrize("kernels", [None, "reference"])
def test_micro_batches_are_summed_in_float32(kernels, monkeypatch):
    jepa, update = make(copies=torch.bfloat16, accumulation=3, kernels=kernels)
    name = "blocks.0.mlp.fc1.weight"
    weight = jepa.encoder.get_parameter(name)
    expected = torch.zeros(weight.shape)
    for part in range(3):
        (gradient,) = torch.autograd.grad(autocast_loss(jepa, part) / 3, weight)
        assert gradient.dtype == torch.bfloat16
        expected += gradient.float()
        update.backward(autocast_loss(jepa, part) / 3)
        assert all(w.parameter.grad is None for w in update.weights if w.rounded)
    (ours,) = [w.gradient for w in update.weights if w.name == f"encoder.{name}"]
    assert ours.dtype == torch.float32
    assert ours.equal(expected)
    update.drop_gradients()
    assert all(w.gradient is None for w in update.weights)


@pytest.mark.parametrize("way", WAYS)
def test_written_tensors_continue_bitwise(way):
    _, update = make(clip_grad=0.1, **WAYS[way])
    train(update, range(3))
    saved = copied(update)
    _, fresh = make(clip_grad=0.1, **WAYS[way])
    train(fresh, [50])
    with torch.no_grad():
        for name, tensor in fresh.tensors().items():
            tensor.copy_(saved[name])
    fresh.restored()
    for one in (update, fresh):
        train(one, range(3, 6))
    want = copied(update)
    for name, tensor in copied(fresh).items():
        assert tensor.equal(want[name]), name


def test_a_checkpoint_of_one_way_is_continued_in_another():
    _, update = make(**WAYS["copies, kernels"])
    train(update, range(2))
    saved, (_, plain) = copied(update), make()
    with torch.no_grad():
        for name, tensor in plain.tensors().items():
            tensor.copy_(saved[name])
    plain.restored()
    for one in (update, plain):
        train(one, range(2, 4))
    assert_close(copied(plain), copied(update), rtol=1e-4, atol=1e-6)


def test_in_place_the_modules_compute_in_float32_and_then_as_before():
    jepa, update = make(copies=torch.bfloat16)
    weight = jepa.target_encoder.blocks[0].attn.qkv.weight
    copy = weight.data
    with update.masters.in_place():
        assert weight.dtype == torch.float32
        assert weight.data is not copy
        assert jepa.target_encoder(batch(0)[0]).dtype == torch.float32
    assert weight.data.data_ptr() == copy.data_ptr()
    with pytest.raises(RuntimeError, match="probe"), update.masters.in_place():
        raise RuntimeError("probe")
    assert weight.dtype == torch.bfloat16
    train(update, range(1))


def test_a_parameter_without_a_gradient_is_left_alone_and_its_target_is_averaged():
    results = []
    for way in ("torch", "kernels"):
        jepa, update = make(**WAYS[way])
        with torch.no_grad():
            jepa.target_encoder.norm.bias.add_(1.0)
        loss = jepa(*batch(0)).loss
        update.backward(loss)
        jepa.encoder.norm.bias.grad = None
        update.step(0, loss.detach())
        assert jepa.target_encoder.norm.bias.mean().item() == pytest.approx(0.9, abs=1e-3)
        results.append(copied(update))
    assert_close(*results)


@pytest.mark.parametrize("way", WAYS)
def test_the_distance_of_the_target_encoder_is_that_of_the_float32_weights(way):
    jepa, update = make(**WAYS[way])
    assert update.ema_distance().item() == 0
    train(update, range(3))
    tensors = update.tensors()
    trained = [name for name, p in jepa.named_parameters() if name.startswith("encoder.") and p.requires_grad]
    apart = torch.cat([(tensors[f"target_{name}"] - tensors[name]).flatten() for name in trained])
    length = torch.cat([tensors[name].flatten() for name in trained])
    assert update.ema_distance().item() == pytest.approx((apart.norm() / length.norm()).item(), rel=1e-4)
    assert update.ema_distance().dtype == torch.float32


def test_one_call_moves_everything(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fastjepa.updates.adamw_ema_",
        lambda *lists, **more: calls.append((len(lists[0]), sum(t is not None for t in more["target_copies"]))),
    )
    jepa, update = make(**WAYS["copies, kernels"])
    loss = autocast_loss(jepa, 0)
    update.backward(loss)
    update.step(0, loss.detach())
    assert calls == [(len(update.weights), sum(name.startswith("target_encoder") for name in update.masters.tensors()))]
