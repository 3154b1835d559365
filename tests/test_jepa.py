"""The objective: its value, its gradients, its independence of batching, and the target encoder."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastjepa.jepa import JEPA
from fastjepa.masks import apply_masks, target_union
from fastjepa.models import VisionTransformer, vit_predictor
from tests.small_jepa import GRID, assert_same, clips, gradients, make, masks, part, ragged


def by_hand(jepa, batch, context, target, exponent):
    """(jepa loss, regulariser), written out from the formulas."""
    h = F.layer_norm(jepa.target_encoder(batch), (24,), eps=1e-5)
    losses, spread = [], 0.0
    for number, (kept, wanted) in enumerate(zip(context, target)):
        goal = apply_masks(h, wanted)
        prediction = jepa.predictor(jepa.encoder(batch, kept), goal, kept, wanted, mask_index=number)
        losses.append(((prediction - goal).abs() ** exponent).mean() / exponent)
        centred = prediction - prediction.mean(dim=1, keepdim=True)
        variance = centred.square().sum(dim=1) / (prediction.shape[1] - 1)
        spread = spread + (variance + 1e-4).sqrt() / len(context)
    return sum(losses) / len(losses), (1.0 - spread).clamp_min(0).mean()


# The value


@pytest.mark.parametrize("exponent", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_the_loss_is_the_formula(exponent, weight):
    jepa, batch, (context, target) = make(loss_exp=exponent, reg_coeff=weight), clips(3), masks(3)
    out = jepa(batch, context, target)
    distance, spread = by_hand(jepa, batch, context, target, exponent)
    assert out.loss_jepa.item() == pytest.approx(distance.item(), rel=1e-10)
    assert out.loss.item() == pytest.approx((distance + weight * spread).item(), rel=1e-10)
    if weight:
        assert out.loss_reg.item() == pytest.approx(spread.item(), rel=1e-10)
        assert out.loss_reg.item() > 0
    else:
        assert out.loss_reg is None
        assert out.loss is out.loss_jepa


def test_the_regulariser_averages_the_mask_sets_before_it_cuts_at_one():
    jepa, batch, (context, target) = make(reg_coeff=1.0), clips(3), masks(3)
    predictions = jepa(batch, context, target, collect=True).predictions
    spreads = torch.stack([(p.var(dim=1) + 1e-4).sqrt() for p in predictions])
    with torch.no_grad():  # scaled so that the sets lie on both sides of one
        jepa.predictor.predictor_proj.weight /= spreads.median()
    out, (_, want) = jepa(batch, context, target, collect=True), by_hand(jepa, batch, context, target, 1.0)
    spreads = torch.stack([(p.var(dim=1) + 1e-4).sqrt() for p in out.predictions])
    assert out.loss_reg.item() == pytest.approx(want.item(), rel=1e-10)
    assert out.loss_reg.item() < 0.95 * (1 - spreads).clamp_min(0).mean().item()


def test_the_regulariser_of_constant_predictions_is_0_99():
    jepa = make(reg_coeff=1.0)
    nn.init.zeros_(jepa.predictor.predictor_proj.weight)
    assert jepa(clips(2), *masks(2)).loss_reg.item() == pytest.approx(0.99, abs=1e-12)


@pytest.mark.parametrize(("exponent", "value"), [(1.0, 0.798), (2.0, 0.5)])
def test_the_loss_of_a_constant_prediction_of_normalised_noise(exponent, value):
    jepa = make(loss_exp=exponent)
    nn.init.zeros_(jepa.predictor.predictor_proj.weight)
    nn.init.zeros_(jepa.predictor.predictor_proj.bias)
    noise = F.layer_norm(torch.randn(8, 32, 4096), (4096,))
    jepa.target_features = lambda _: noise[:, :, :24]
    assert jepa(clips(8), *masks(8)).loss.item() == pytest.approx(value, rel=0.05)


def test_target_features_are_normalised_without_affine():
    jepa = make()
    features = jepa.target_features(clips(2))
    assert features.shape == (2, 32, 24)
    assert not features.requires_grad
    torch.testing.assert_close(features.mean(dim=-1), torch.zeros(2, 32).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(features.var(dim=-1, correction=0), torch.ones(2, 32).double(), atol=1e-3, rtol=0)


# Ragged sets, groups, micro-batches


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_ragged_sets_of_equal_lengths_give_the_numbers_of_dense_ones(weight):
    jepa, batch, (context, target) = make(reg_coeff=weight), clips(3), masks(3)
    results = []
    for change in (lambda s: s, ragged):
        jepa.zero_grad()
        out = jepa(batch, [change(s) for s in context], [change(s) for s in target], collect=True)
        out.loss.backward()
        results.append((out, gradients(jepa)))
    (dense, want), (rows, got) = results
    assert rows.loss.item() == pytest.approx(dense.loss.item(), rel=1e-14)
    assert_same(got, want)
    for one, other in zip(rows.predictions + rows.targets, dense.predictions + dense.targets):
        assert torch.equal(one, other.flatten(0, 1))


def test_the_loss_is_the_mean_over_groups_and_sets():
    jepa, batch, (context, target) = make(), clips(6), masks(6, group=2)
    assert len(set(context[0].lengths)) > 1
    groups = [slice(first, first + 2) for first in (0, 2, 4)]
    each = [
        jepa(batch[rows], [part(context[m], rows)], [part(target[m], rows)]).loss.item()
        for rows in groups
        for m in (0,)
    ]
    assert jepa(batch, context[:1], target[:1]).loss.item() == pytest.approx(sum(each) / 3, rel=1e-10)
    pairs = [jepa(batch[r], *[[part(s, r) for s in sets] for sets in (context, target)]).loss.item() for r in groups]
    assert jepa(batch, context, target).loss.item() == pytest.approx(sum(pairs) / 3, rel=1e-10)


def test_without_truncation_every_clip_weighs_the_same():
    jepa, batch, (context, target) = make(), clips(4), masks(4, truncation="none")
    assert len(set(target[0].lengths)) > 1
    rows = [slice(i, i + 1) for i in range(4)]
    each = [jepa(batch[r], *[[part(s, r) for s in sets] for sets in (context, target)]).loss.item() for r in rows]
    assert jepa(batch, context, target).loss.item() == pytest.approx(sum(each) / 4, rel=1e-10)


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_add_up_to_the_whole_batch(size, weight):
    jepa, batch, (context, target) = make(reg_coeff=weight, loss_exp=2.0), clips(12), masks(12, group=4)
    whole = jepa(batch, context, target).loss
    whole.backward()
    want = gradients(jepa)
    jepa.zero_grad()
    total = 0.0
    for first in range(0, 12, size):
        rows = slice(first, first + size)
        loss = jepa(batch[rows], *masks(size, group=4, first=first)).loss * size / 12
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-10)
    assert_same(gradients(jepa), want)


@pytest.mark.parametrize("noised", [False, True])
@pytest.mark.parametrize("known", [False, True], ids=["", "union"])
def test_both_executions_give_the_same_numbers(noised, known):
    results = []
    for execution in ("reference", "packed"):
        jepa, batch, (context, target) = make(execution, noised, reg_coeff=0.1), clips(3), masks(3)
        draws = None
        if noised:
            generator = torch.Generator().manual_seed(3)
            draws = [
                (torch.tensor([0, 2, 5]), torch.randn(*s.shape, 12, dtype=torch.float64, generator=generator))
                for s in target
            ]
        union = target_union(target, 32) if known else None
        assert union is None or union.index.shape[1] < 32
        out = jepa(batch, context, target, draws=draws, collect=True, union=union)
        out.loss.backward()
        seen = jepa.encoder(batch, context[1])
        kept = {"timesteps": draws[1][0], "noise": draws[1][1]} if noised else {}
        alone = jepa.predictor(seen, out.targets[1], context[1], target[1], mask_index=1, **kept)
        torch.testing.assert_close(out.predictions[1], alone.detach())
        results.append((out, gradients(jepa)))
    (reference, want), (packed, got) = results
    assert packed.loss.item() == pytest.approx(reference.loss.item(), rel=1e-10)
    for one, other in zip(packed.predictions + packed.targets, reference.predictions + reference.targets):
        torch.testing.assert_close(one, other)
    assert_same(got, want)


@pytest.mark.parametrize("lengths", ["group", "none"])
def test_only_the_targets_pass_through_the_last_block_of_the_target_encoder(lengths):
    """What other tokens would become is read by nobody, and never computed."""
    jepa, batch, (context, target) = make(), clips(4), masks(4, group=2, truncation=lengths)
    want = jepa(batch, context, target).loss
    union, rows = target_union(target, 32), []
    jepa.target_encoder.blocks[-1].mlp.fc1.register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    torch.testing.assert_close(jepa(batch, context, target, union=union).loss, want, rtol=1e-12, atol=0)
    assert rows == [union.index.numel()]
    assert union.index.numel() < 4 * 32


@pytest.mark.parametrize("execution", ["packed", "reference"])
@pytest.mark.parametrize("with_union", [True, False])
def test_a_look_gives_all_target_features_and_changes_no_bit(execution, with_union):
    jepa = make(execution)
    context, target = masks(4, group=2)
    union = target_union(target, 32) if with_union else None
    plain = jepa(clips(4), context, target, union=union)
    looked = jepa(clips(4), context, target, union=union, look=True)
    assert torch.equal(plain.loss, looked.loss)
    assert plain.every_target is plain.predictions is None
    assert not looked.every_target.requires_grad
    torch.testing.assert_close(looked.every_target, jepa.target_features(clips(4)), rtol=1e-12, atol=1e-12)
    assert [len(p) for p in looked.predictions] == [one.index.numel() for one in target]
    weights = [weight for weight in jepa.encoder.parameters() if weight.requires_grad]
    for one, other in zip(*(torch.autograd.grad(out.loss, weights) for out in (plain, looked))):
        assert torch.equal(one, other)


@pytest.mark.parametrize("set_kind", ["dense", "groups"])
def test_collected_lists_have_a_tensor_a_mask_set(set_kind):
    jepa = make()
    context, target = masks(4, group=None if set_kind == "dense" else 2)
    out = jepa(clips(4), context, target, collect=True)
    for number, wanted in enumerate(target):
        shape = (*wanted.shape, 24) if set_kind == "dense" else (wanted.index.numel(), 24)
        assert out.predictions[number].shape == shape
        assert out.targets[number].shape == shape
        assert not out.predictions[number].requires_grad
    features = jepa.target_features(clips(4))
    rows = target[0] if set_kind == "dense" else target[0].index
    if set_kind == "dense":
        torch.testing.assert_close(out.targets[0], apply_masks(features, rows), rtol=1e-12, atol=1e-12)
    else:
        clip = torch.repeat_interleave(torch.arange(4), torch.tensor(target[0].lengths))
        torch.testing.assert_close(out.targets[0], features[clip, rows], rtol=1e-12, atol=1e-12)
    quiet = jepa(clips(4), context, target)
    assert quiet.predictions is None
    assert quiet.targets is None


def test_each_mask_set_trains_its_own_mask_token():
    jepa, (context, target) = make(), masks(2)
    jepa(clips(2), context[:1], target[:1]).loss.backward()
    assert jepa.predictor.mask_tokens[0].grad.any()
    assert jepa.predictor.mask_tokens[1].grad is None


# Refusals


def test_wrong_numbers_of_sets_and_draws_are_refused():
    jepa, batch, (context, target) = make(), clips(2), masks(2)
    with pytest.raises(ValueError, match="come in pairs, got 2 and 1"):
        jepa(batch, context, target[:1])
    with pytest.raises(ValueError, match="come in pairs, got 0 and 0"):
        jepa(batch, [], [])
    with pytest.raises(ValueError, match="draws come one a mask set, got 1 for 2 sets"):
        jepa(batch, context, target, draws=[(torch.zeros(2), torch.zeros(2))])
    with pytest.raises(ValueError, match="a mask set describes 1 clips, the batch has 2"):
        jepa(batch, [context[0][:1]], [target[0]])
    with pytest.raises(ValueError, match="execution must be 'packed' or 'reference', got 'fast'"):
        make("fast")


# The target encoder


def test_the_target_encoder_is_a_copy_without_gradients():
    encoder = VisionTransformer(**GRID, embed_dim=24, depth=1, num_heads=2)
    jepa = JEPA(encoder, vit_predictor(**GRID, embed_dim=24, predictor_embed_dim=12, num_heads=2, use_mask_tokens=True))
    for name, value in encoder.state_dict().items():
        copy = jepa.target_encoder.state_dict()[name]
        assert torch.equal(copy, value)
        assert copy.data_ptr() != value.data_ptr()
    jepa(clips(2).float(), *masks(2)).loss.backward()
    assert not any(p.requires_grad or p.grad is not None for p in jepa.target_encoder.parameters())
    assert all(p.grad is not None for p in jepa.encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.9), 0.0])
def test_the_target_encoder_follows_the_encoder(momentum):
    jepa = make()
    before = {name: p.clone() for name, p in jepa.target_encoder.named_parameters()}
    online = {name: p.clone() for name, p in jepa.encoder.named_parameters()}
    jepa.update_target(momentum)
    for name, p in jepa.target_encoder.named_parameters():
        want = (
            before[name]
            if name == "pos_embed"
            else before[name] + (1 - float(momentum)) * (online[name] - before[name])
        )
        torch.testing.assert_close(p, want, rtol=1e-6, atol=1e-7)
        assert torch.equal(jepa.encoder.get_parameter(name), online[name])


@pytest.mark.parametrize("momentum", [1.0, torch.tensor(1.0)])
def test_momentum_1_changes_nothing(momentum):
    jepa = make()
    before = {name: p.clone() for name, p in jepa.target_encoder.named_parameters()}
    jepa.update_target(momentum, every_parameter=True)
    assert all(torch.equal(p, before[name]) for name, p in jepa.target_encoder.named_parameters())


def test_the_position_table_is_averaged_only_on_request():
    jepa = make()
    table = jepa.target_encoder.pos_embed.clone()
    jepa.update_target(0.5)
    assert torch.equal(jepa.target_encoder.pos_embed, table)
    jepa.update_target(0.5, every_parameter=True)
    torch.testing.assert_close(jepa.target_encoder.pos_embed.data, (table + jepa.encoder.pos_embed.data) / 2)


def test_any_optimizer_trains_it():
    jepa, batch, sets = make().float(), clips(4).float(), masks(4)
    optimizer = torch.optim.SGD([p for p in jepa.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        loss = jepa(batch, *sets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        jepa.update_target(0.999)
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_it_works_under_bfloat16_autocast():
    jepa, batch, sets = make(reg_coeff=0.1).float(), clips(2).float(), masks(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = jepa(batch, *sets).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(jepa(batch, *sets).loss.item(), rel=0.05)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(jepa).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert jepa.target_features(batch).dtype == torch.float32


def test_a_float64_model_computes_its_loss_in_float64():
    jepa = make(reg_coeff=0.1)
    assert jepa(clips(2), *masks(2)).loss.dtype == torch.float64
    assert jepa.target_features(clips(2)).dtype == torch.float64


def test_a_single_target_token_has_a_finite_regulariser():
    jepa = make(reg_coeff=0.1)
    context, target = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[9], [11]])
    out = jepa(clips(2), [context], [target])
    assert out.loss_reg.item() == pytest.approx(0.99)
    assert torch.isfinite(out.loss)


def test_momentum_very_near_1_still_moves_the_target():
    jepa = make()
    before = jepa.target_encoder.norm.weight.detach().clone()
    momentum = 1 - 1e-9
    jepa.update_target(torch.tensor(momentum, dtype=torch.float64))
    moved = (jepa.target_encoder.norm.weight - before) / (jepa.encoder.norm.weight - before)
    assert moved.mean().item() == pytest.approx(1e-9, rel=1e-4)
