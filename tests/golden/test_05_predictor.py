"""The published predictor: mask tokens, images, and noised targets with the recorded draws; both executions."""

from functools import partial

import pytest
import torch
from torch import nn

from fastjepa.models import VisionTransformerPredictor, packing
from fastjepa.models.predictor import signal_left

MASK_TOKENS = ["05_predictor_mask_tokens", "05_predictor_image"]
NOISED = ["05_predictor_diffusion", "05_predictor_diffusion_drawn"]


def predictor(golden):
    arguments = {k: v for k, v in golden.info["constructor"].items() if k not in ("norm", "norm_eps")}
    norm = partial(nn.LayerNorm, eps=golden.info["constructor"]["norm_eps"])
    model = VisionTransformerPredictor(**arguments, norm_layer=norm)
    model.load_state_dict(golden.params())
    return model


def inputs(golden, leaf):
    return {name: leaf(value) for name, value in golden.group("in.").items()}


@pytest.mark.parametrize("name", MASK_TOKENS)
def test_mask_tokens_are_chosen_by_the_number_of_the_mask_set_which_wraps(case, name):
    golden = case(name)
    model, t = predictor(golden), golden.tensors
    masks = t["in.mask_ctxt"], t["in.mask_tgt"]
    for prefix, index, lists in (
        ("index0.", 0, False),
        ("index1.", 1, False),
        ("wrap.", 3, True),
        ("index0.", 2, False),
    ):
        given = [[mask] for mask in masks] if lists else masks
        golden.assert_max(model(t["in.ctxt"], None, *given, mask_index=index), f"{prefix}out.y", "out")


@pytest.mark.parametrize("name", MASK_TOKENS)
def test_gradients_with_mask_tokens_reach_only_the_chosen_one(case, check_gradients, leaf, name):
    golden = case(name)
    model, given = predictor(golden), inputs(golden, leaf)
    y = model(given["ctxt"], None, given["mask_ctxt"], given["mask_tgt"], mask_index=1)
    check_gradients(golden, model, "index1.", {"y": y}, given)
    without = next(call for call in golden.info["calls"] if call["gradients"])["params_without_gradient"]
    assert {name for name, p in model.named_parameters() if p.grad is None} == set(without)


@pytest.mark.parametrize("name", NOISED)
def test_noised_targets_with_the_recorded_draws(case, check_gradients, leaf, name):
    golden = case(name)
    model, given = predictor(golden), inputs(golden, leaf)
    draws = {"timesteps": given["T"], "noise": given["noise"].detach()}
    y = model(given["ctxt"], given["tgt"], given["mask_ctxt"], given["mask_tgt"], **draws)
    golden.assert_max(y, "out.y", "out")
    check_gradients(golden, model, "", {"y": y}, given)


@pytest.mark.parametrize("name", NOISED)
def test_targets_are_embedded_normalised_and_noised_before_their_positions(case, name):
    golden = case(name)
    model, t = predictor(golden), golden.tensors
    noised = model.diffuse(model.predictor_embed(t["in.tgt"]), t["in.T"], t["in.noise"])
    golden.assert_max(noised, "noised_only.out.noised", "out")


@pytest.mark.parametrize("name", NOISED)
def test_the_published_schedule_is_the_recorded_one(case, name):
    golden = case(name)
    alpha = golden.tensors["in.alpha"]
    for table in (signal_left("published"), predictor(golden).signal_left):
        torch.testing.assert_close(table, alpha, rtol=5e-7, atol=1e-43)
        assert (table == 0).int().argmax() == (alpha == 0).int().argmax() == golden.info["first_alpha_zero"]


def test_packed_mask_tokens_in_one_pass_over_both_sets(case, leaf):
    golden = case("05_predictor_mask_tokens")
    model, given = predictor(golden), inputs(golden, leaf)
    context, target = [given["mask_ctxt"]] * 2, [given["mask_tgt"]] * 2
    goals = [torch.zeros(*given["mask_tgt"].shape, given["ctxt"].shape[-1])] * 2
    rows = torch.cat([given["ctxt"].detach().flatten(0, 1), given["ctxt"].flatten(0, 1)])
    first, second = packing.predict_sets(model, rows, goals, context, target)
    golden.assert_max(first, "index0.out.y", "out")
    golden.assert_max(second, "index1.out.y", "out")
    (second * golden.tensors["index1.cot.y"]).sum().backward()
    for name, gradient in golden.group("index1.grad.param.").items():
        golden.assert_max(model.get_parameter(name).grad, gradient, "grad.param")
    golden.assert_max(given["ctxt"].grad, "index1.grad.in.ctxt", "grad.in")


@pytest.mark.parametrize("name", NOISED)
def test_packed_noised_targets(case, check_gradients, leaf, name):
    golden = case(name)
    model, given = predictor(golden), inputs(golden, leaf)
    sets = [given["mask_ctxt"]], [given["mask_tgt"]]
    draws = [(given["T"], given["noise"].detach())]
    (y,) = packing.predict_sets(model, given["ctxt"].flatten(0, 1), [given["tgt"]], *sets, draws)
    golden.assert_max(y, "out.y", "out")
    check_gradients(golden, model, "", {"y": y}, given)
