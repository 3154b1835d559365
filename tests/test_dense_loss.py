"""Deep supervision and the dense loss: both executions and every way of computing them are one mathematics."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from fastjepa.attending import Dispatched
from fastjepa.configfile import load
from fastjepa.dense import context_token_weights
from fastjepa.exits import Exit
from fastjepa.fused import Fused
from fastjepa.handover import hand_over
from fastjepa.jepa import JEPA
from fastjepa.masks import MaskCollator
from fastjepa.masks.tokens import gather_tokens
from fastjepa.masks.union import target_union
from fastjepa.models import VisionTransformer, vit_predictor
from fastjepa.models.operations import LIBRARY
from fastjepa.models.vision_transformer import deep_levels

SETS = [
    {"spatial_scale": (0.2, 0.2), "temporal_scale": (1, 1), "aspect_ratio": (0.75, 1.5), "num_blocks": 2},
    {"spatial_scale": (0.5, 0.5), "temporal_scale": (1, 1), "aspect_ratio": (0.75, 1.5), "num_blocks": 1},
]
WAYS = {"packed": LIBRARY, "flat": Dispatched(flat=True), "fused": Fused("reference")}


def networks(levels=(0, 2, 3), predict_context=True, rope=True, targets="mask_tokens"):
    torch.manual_seed(0)
    shared = {"img_size": 32, "patch_size": 8, "num_frames": 8, "use_rope": rope, "rope_style": "interleaved"}
    encoder = VisionTransformer(**shared, embed_dim=48, depth=4, num_heads=3, mlp_ratio=2, levels=levels)
    predictor = vit_predictor(
        **shared, embed_dim=48, predictor_embed_dim=24, depth=2, num_heads=1, use_mask_tokens=targets == "mask_tokens",
        zero_init_mask_tokens=False, levels=1 if levels is None else len(levels), predict_context=predict_context,
    )  # fmt: skip
    for p in (*encoder.parameters(), *predictor.parameters()):
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return encoder.double(), predictor.double()


def several(truncation):
    """Clips of two lengths and their masks: ragged ones for the longer, dense ones for the shorter."""
    torch.manual_seed(1)
    clips = [torch.randn(3, 3, 8, 32, 32, dtype=torch.float64), torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)]
    masks = []
    for one in clips:
        kind = truncation if one.shape[2] == 8 else "group"
        masks.append(MaskCollator(SETS, 32, one.shape[2], 8, 2, truncation=kind).draw(0, range(len(one))))
    return clips, [m[0] for m in masks], [m[1] for m in masks]


def loss_and_gradients(jepa, *given, **more):
    out = jepa(*given, **more)
    out.loss.backward()
    return out, {name: p.grad for name, p in jepa.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("truncation", ["none", "group"])
@pytest.mark.parametrize(("levels", "dense"), [((0, 2, 3), True), (None, True), ((1, 3), False)])
def test_packed_is_the_reference_in_float64(way, truncation, levels, dense):
    clips, context, target = several(truncation)
    more = {"shares": [0.7, 0.3], "context_weight": 0.5}
    unions = [target_union(sets, one[0, 0].numel() // 128) for sets, one in zip(target, clips)]
    jepa = JEPA(*networks(levels, dense), execution="reference", loss_exp=1.5)
    wanted, gradients = loss_and_gradients(jepa, clips, context, target, **more)
    jepa = JEPA(*networks(levels, dense), loss_exp=1.5, operations=WAYS[way])
    got, found = loss_and_gradients(jepa, clips, context, target, union=unions, look=True, **more)
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-11)
    assert (got.loss_context is None) == (not dense)
    if dense:
        assert got.loss_context.item() == pytest.approx(wanted.loss_context.item(), rel=1e-11)
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for one, features in zip(clips, got.every_target):
        torch.testing.assert_close(features, jepa.target_features(one), rtol=1e-11, atol=1e-11)


def test_the_loss_is_what_it_says():
    """Written out: levels normalised apart, context tokens by their distance, both errors in one sum."""
    encoder, predictor = networks()
    jepa = JEPA(encoder, predictor, loss_exp=1.0)
    (clips, _), (context, _), (target, _) = several("group")
    out = jepa(clips, context, target, context_weight=0.25, collect=True)
    with torch.no_grad():
        raw = jepa.target_encoder(clips, every_level=True).unflatten(-1, (3, 48))
        goals = F.layer_norm(raw, (48,), eps=1e-5).flatten(-2)
        at_target, at_context = [], []
        for number, (c, t) in enumerate(zip(context, target)):
            p, q = predictor(encoder(clips, c, every_level=True), None, c, t, number)
            at_target.append((p - gather_tokens(goals, t)).abs().mean())
            weight = context_token_weights(c, t, (4, 4, 4))
            at_context.append(((q - gather_tokens(goals, c)).abs().mean(-1) * weight).mean())
    assert out.loss_jepa.item() == pytest.approx(torch.stack(at_target).mean().item(), rel=1e-10)
    assert out.loss_context.item() == pytest.approx(torch.stack(at_context).mean().item(), rel=1e-10)
    assert out.loss.item() == pytest.approx(out.loss_jepa.item() + 0.25 * out.loss_context.item(), rel=1e-10)
    plain = JEPA(encoder, predictor, context_distance=False)(clips, context, target).loss_context
    assert plain.item() > out.loss_context.item()  # no weight is above 1


def test_features_are_those_of_the_last_level():
    encoder, _ = networks()
    (clips, _), *_ = several("group")
    every = encoder(clips, every_level=True)
    assert every.shape == (3, 64, 3 * 48)
    assert torch.equal(every[..., -48:], encoder(clips))
    assert not hasattr(encoder, "norm")
    assert {"norms_block.0.weight", "norms_block.2.bias"} <= set(encoder.state_dict())


def test_noised_targets_of_several_levels():
    encoder, predictor = networks(targets="noised")
    (clips, _), (context, _), (target, _) = several("group")
    draws = [(torch.zeros(3, dtype=torch.int64), torch.randn(*t.shape, 24, dtype=torch.float64)) for t in target]
    losses = [
        JEPA(copy.deepcopy(encoder), copy.deepcopy(predictor), execution=way)(clips, context, target, draws).loss.item()
        for way in ("reference", "packed")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.parametrize("levels", [(3, 0), (0, 2), (0, 0, 3), (-1, 3), ()])
def test_levels_that_are_none_are_refused(levels):
    with pytest.raises(ValueError, match="levels"):
        networks(levels)


def test_encoder_and_predictor_agree_on_levels():
    encoder, _ = networks((0, 3))
    with pytest.raises(ValueError, match="equally many levels, got 2 and 3"):
        JEPA(encoder, networks()[1])


LEVELS = {
    12: [2, 5, 8, 11], 24: [5, 11, 17, 23], 40: [9, 19, 29, 39], 48: [11, 23, 37, 47], 32: [7, 15, 23, 31],
    3: [0, 1, 2],
}  # fmt: skip


@pytest.mark.parametrize(("depth", "levels"), LEVELS.items())
def test_levels_of_deep_supervision(depth, levels):
    """Those of V-JEPA 2.1 for its sizes; a quarter of the depth each for others."""
    assert deep_levels(depth) == levels


DENSE = ("model.levels=deep", "loss.context=0.5", "loss.context_start=1", "loss.context_full=3", "optim.steps=4",
         "log.every=1", "log.images=false")  # fmt: skip


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("positions", ["rope", "table"])
def test_a_dense_run_continues_bit_for_bit_and_its_executions_agree(run, positions):
    more = (*DENSE, f"model.positions={positions}", "model.predictor_heads=2")
    _, whole = run(*more, folder="whole")
    assert run(*more, "runtime.stop_at=2", folder="parts")[0] == Exit.DONE
    _, parts = run(*more, folder="parts")
    assert [row["loss"] for row in rows(parts)] == [row["loss"] for row in rows(whole)]
    _, other = run(*more, "runtime.execution=reference", folder="other")
    for got, wanted in zip(rows(whole), rows(other)):
        assert got["loss_context"] == pytest.approx(wanted["loss_context"], rel=1e-4)
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    _, batches = run(*more, "data.batch_size=4", folder="batches")
    assert rows(batches)[0]["loss"] == pytest.approx(rows(whole)[0]["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="have no published layout"):
        hand_over(whole, whole.parent / "out")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["loss.context=0.5", "loss.context_start=5"], "loss.context_full: expected at least loss.context_start 5"),
        (
            ["loss.context=0.5", "loss.context_start=99", "loss.context_full=99"],
            "loss.context_start: expected less than optim.steps 10, given 99",
        ),
        (["loss.context_full=5"], "loss.context_full: expected the default 0 with loss.context 0, given 5"),
        (["loss.context_distance=false"], "loss.context_distance: expected the default true with loss.context 0"),
    ],
)
def test_settings_of_the_context_loss_that_would_do_nothing_are_refused(recipe, given, told):
    with pytest.raises(ValueError, match=told):
        load(recipe, given)


def test_the_console_says_what_is_not_of_the_first_generation(run, capsys):
    run(*DENSE, "model.positions=rope", "model.predictor_heads=2", "runtime.stop_at=1")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model ")]
    assert line.endswith("targets: mask_tokens, rotary positions, of 3 levels, context tokens too (weight 0.5)")
