"""Checkpoints of the second-generation training script: what is in them, and features after loading."""

from functools import partial

import pytest
import torch
from torch import nn

from fastjepa.interop import NETWORKS, load_meta_checkpoint, load_weights
from fastjepa.jepa import JEPA
from fastjepa.models import VisionTransformer, vit_predictor

CASES = ["24_v2_checkpoint_own", "24_v2_checkpoint_with_tables"]
TABLES = {"encoder.pos_embed", "predictor.predictor_pos_embed", "target_encoder.pos_embed"}


@pytest.fixture(params=CASES)
def golden(request, case, shared):
    found = case(request.param)
    found.file = shared / "golden" / "cases" / f"{request.param}.pt"
    return found


def fresh(golden, execution="reference", mask_tokens=4, **more):
    e, p = (dict(golden.info["constructor"][k]) for k in ("encoder", "predictor"))
    norm = partial(nn.LayerNorm, eps=e.pop("norm_eps"))
    p |= {"norm_layer": partial(nn.LayerNorm, eps=p.pop("norm_eps")), "num_mask_tokens": mask_tokens}
    return JEPA(VisionTransformer(**e, norm_layer=norm), vit_predictor(**p), execution=execution, **more)


def recorded(golden, network):
    """The entries that a rotary network has."""
    entries = golden.info["checkpoint"][network]
    return {key: facts for key, facts in entries.items() if not key.endswith("pos_embed")}


def test_every_entry_is_the_recorded_one(golden):
    loaded, wanted = load_meta_checkpoint(golden.file), golden.info["checkpoint"]
    assert loaded.facts == {key: wanted[key] for key in ("epoch", "loss", "batch_size", "world_size", "lr")}
    assert "second-generation V-JEPA checkpoint (V-JEPA 2), of epoch 1" in loaded.description
    assert loaded.licence_id == "mit"
    for network in NETWORKS:
        state = loaded.networks[network]
        assert [f"module.backbone.{key}" for key in state] == list(recorded(golden, network))
        for key, tensor in state.items():
            facts = recorded(golden, network)[f"module.backbone.{key}"]
            assert list(tensor.shape) == facts["shape"]
            assert tensor.double().sum().item() == pytest.approx(facts["sum"], rel=1e-9, abs=1e-9)
            assert tensor.double().abs().sum().item() == pytest.approx(facts["abs_sum"], rel=1e-9)


def test_tables_are_left_out_and_that_is_said(golden):
    ignored = load_meta_checkpoint(golden.file).ignored
    said = "with_tables" in golden.info["case"]
    assert (f"{', '.join(sorted(TABLES))} (rotary networks do not use position tables)" in ignored) == said
    assert ("opt (the optimizer starts anew)" in ignored) != said


def test_moments_carry_the_recorded_names(case, shared):
    golden = case(CASES[0])
    loaded = load_meta_checkpoint(shared / "golden" / "cases" / f"{CASES[0]}.pt")
    index = golden.info["checkpoint"]["optimizer_index"]
    assert list(loaded.moments()) == [entry["name"] for entry in index if entry["has_state"]]


@pytest.mark.parametrize("execution", ["reference", "packed"])
def test_features_and_predictions_after_loading(golden, execution):
    jepa, given = fresh(golden, execution), golden.tensors
    load_weights(jepa, load_meta_checkpoint(golden.file))
    golden.assert_max(jepa.target_encoder(given["in.x"]), "target.out.y", "out")
    golden.assert_max(jepa.encoder(given["in.x"]), "encoder.out.y", "out")
    seen = jepa.encoder(given["in.x"], [given["in.mask_x"]])
    seen = seen[0] if isinstance(seen, list) else seen
    golden.assert_max(seen, "encoder_masked.out.y", "out")
    predicted = jepa.predictor(seen, None, given["in.mask_x"], given["in.mask_y"], mask_index=1)
    golden.assert_max(predicted, "pred.out.y", "out")


@pytest.mark.parametrize("execution", ["reference", "packed"])
def test_the_step_predicts_from_these_weights(golden, execution):
    """Predictions of a training step with a second mask set: that of mask token 1, as recorded."""
    jepa, given = fresh(golden, execution, mask_tokens=2), golden.tensors
    report = load_weights(jepa, load_meta_checkpoint(golden.file))
    line = "mask tokens: the file has 4, the settings 2: they begin with those of the same number"
    assert sum(line in text for text in report) == 1
    sets = [given["in.mask_x"]] * 2, [given["in.mask_y"]] * 2
    out = jepa(given["in.x"], *sets, collect=True)
    golden.assert_max(out.predictions[1].detach(), "pred.out.y", "out")
    with torch.no_grad():
        targets = torch.nn.functional.layer_norm(given["target.out.y"], (48,))
        targets = targets.gather(1, given["in.mask_y"].unsqueeze(-1).expand(-1, -1, 48))
    part = (out.predictions[1] - targets).abs().mean()
    first = (out.predictions[0] - targets).abs().mean()
    assert out.loss.item() == pytest.approx(((part + first) / 2).item(), rel=1e-5)
