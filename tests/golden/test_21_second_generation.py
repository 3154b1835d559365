"""Networks of the second generation: rotary block, encoder, predictor and classifier, alone and in the packed pass."""

from functools import partial

import pytest
import torch
from torch import nn

from fastjepa.masks.tokens import apply_masks
from fastjepa.models import AttentiveClassifier, Block, VisionTransformer, VisionTransformerPredictor, packing
from fastjepa.models.layers import Attention
from fastjepa.models.operations import LIBRARY
from fastjepa.models.rotary import Places

NETWORKS = {"encoder": VisionTransformer, "predictor": VisionTransformerPredictor}


def build(golden, kind, **more):
    given = {k: v for k, v in golden.info["constructor"].items() if k not in ("norm", "norm_eps")}
    norm = partial(nn.LayerNorm, eps=golden.info["constructor"]["norm_eps"])
    model = kind(**given, norm_layer=norm, **more)
    model.load_state_dict(golden.params())
    return model


@pytest.mark.parametrize("name", ["20_v2_rope_attention_hd16", "20_v2_rope_attention_hd32"])
@pytest.mark.parametrize("call", ["grid", "thw", "ids", "ids_thw"])
def test_attention_turns_queries_and_keys_by_the_places_of_their_tokens(case, check_gradients, name, call):
    golden = case(name)
    settings, t = golden.info["constructor"], golden.tensors
    module = Attention(settings["dim"], settings["num_heads"], qkv_bias=True, use_rope=True)
    module.load_state_dict(golden.params())
    number = "2" if call == "ids_thw" else ""
    x = t[f"in.x_ids{number}" if "ids" in call else f"in.x_{call}"].requires_grad_("thw" not in call)
    height, width = golden.info["thw"][1:] if "thw" in call else [settings["grid_size"]] * 2
    ids = t[f"in.ids{number}"] if "ids" in call else torch.arange(x.shape[1])
    out = module(x, places=Places(ids, height, width))
    golden.assert_max(out, f"{call}.out.y", "out")
    if "thw" not in call:
        check_gradients(golden, module, f"{call}.", {"y": out}, {f"x_{call}": x})


def test_block_with_the_gated_feed_forward_layer(case, check_gradients, leaf):
    golden = case("20_v2_block_swiglu")
    c = golden.info["constructor"]
    norm = partial(nn.LayerNorm, eps=c["norm_eps"])
    block = Block(
        c["dim"], c["num_heads"], c["mlp_ratio"], qkv_bias=c["qkv_bias"], norm_layer=norm, use_rope=True, use_silu=True
    )
    block.load_state_dict(golden.params())
    x = leaf(golden.tensors["in.x"])
    y = block(x, places=Places(torch.arange(x.shape[1]), c["grid_size"], c["grid_size"]))
    golden.assert_max(y, "out.y", "out")
    check_gradients(golden, block, "", {"y": y}, {"x": x})


def test_rotary_encoder_with_every_kind_of_mask(case, check_gradients, leaf):
    golden = case("21_v2_vit_rope")
    model, t = build(golden, VisionTransformer), golden.tensors
    calls = {
        "mask.": ("x", t["in.mask_a"]),
        "list.": ("x", [t["in.mask_a"], t["in.mask_b"]]),
        "wide.": ("x_wide", None),
        "wide_mask.": ("x_wide", t["in.mask_wide"]),
    }
    for prefix, (clips, masks) in calls.items():
        golden.assert_max(model(t[f"in.{clips}"], masks), f"{prefix}out.y", "out")
    x = leaf(t["in.x"])
    y = model(x)
    golden.assert_max(y, "full.out.y", "out")
    check_gradients(golden, model, "full.", {"y": y}, {"x": x})


def test_layers_of_a_rotary_encoder_pass_the_final_norm(case):
    golden = case("21_v2_vit_rope")
    model = build(golden, VisionTransformer, out_layers=[0, 1])
    for number, features in enumerate(model(golden.tensors["in.x"])):
        golden.assert_max(features, f"layers.out.{number}", "out")


def test_rotary_encoder_packed(case, check_gradients):
    """Every token, and two mask sets beside each other; clips of another size by themselves."""
    golden = case("21_v2_vit_rope")
    model, t = build(golden, VisionTransformer), golden.tensors
    for clips, prefix, masks in (("x", "list.", ["mask_a", "mask_b"]), ("x_wide", "wide_mask.", ["mask_wide"])):
        patches = [LIBRARY.cut(model, t[f"in.{clips}"])]
        rows = packing.encode_sets(model, patches, [[t[f"in.{mask}"] for mask in masks]])
        wanted = t[f"{prefix}out.y"]
        golden.assert_max(rows.view_as(wanted), wanted, "out")
    (y,) = packing.encode_all(model, [LIBRARY.cut(model, t["in.x"])])
    golden.assert_max(y, "full.out.y", "out")
    parameters = {k: v for k, v in golden.tensors.items() if not k.startswith("full.grad.in.")}
    check_gradients(type(golden)(golden.info, parameters), model, "full.", {"y": y}, {})


def test_some_tokens_of_a_rotary_encoder_packed(case):
    """The last block finishes the named tokens alone, each turned by its own place."""
    golden = case("21_v2_vit_rope")
    model, t = build(golden, VisionTransformer), golden.tensors
    patches, index = [LIBRARY.cut(model, t["in.x"])], t["in.mask_b"]
    full = t["full.out.y"]
    (asked,), (every,) = packing.encode_both(model, patches, LIBRARY, [index])
    golden.assert_max(asked, apply_masks(full, index), "out")
    golden.assert_max(every, full, "out")


def test_a_shorter_clip_takes_the_first_rows_of_the_table(case):
    golden = case("21_v2_vit_table")
    model, t = build(golden, VisionTransformer, short_clips="cut"), golden.tensors
    for call in ("short", "same", "interp"):
        golden.assert_max(model(t[f"in.x_{call}"]), f"{call}.out.y", "out")
        (packed,) = packing.encode_all(model, [LIBRARY.cut(model, t[f"in.x_{call}"])])
        golden.assert_max(packed, f"{call}.out.y", "out")


@pytest.mark.parametrize("name", ["22_v2_predictor_rope", "22_v2_predictor_table"])
def test_predictor(case, check_gradients, leaf, name):
    golden = case(name)
    model, t = build(golden, VisionTransformerPredictor), golden.tensors
    masks = t["in.mask_x"], t["in.mask_y"]
    golden.assert_max(model(t["in.x"], None, *masks, mask_index=0), "index0.out.y", "out")
    everything = build(golden, VisionTransformerPredictor, return_all_tokens=True)
    golden.assert_max(everything(t["in.x"], None, *masks, mask_index=1), "all.out.y", "out")
    x = leaf(t["in.x"])
    y = model(x, None, *masks, mask_index=1)
    golden.assert_max(y, "index1.out.y", "out")
    check_gradients(golden, model, "index1.", {"y": y}, {"x": x})


@pytest.mark.parametrize("name", ["22_v2_predictor_rope", "22_v2_predictor_table"])
def test_predictor_packed(case, check_gradients, leaf, name):
    golden = case(name)
    model, t = build(golden, VisionTransformerPredictor), golden.tensors
    x = leaf(t["in.x"])
    context, target = [t["in.mask_x"]] * 2, [t["in.mask_y"]] * 2
    rows = torch.cat([x.detach().flatten(0, 1), x.flatten(0, 1)])
    first, second = packing.predict_sets(model, rows, None, context, target)
    golden.assert_max(first, "index0.out.y", "out")
    golden.assert_max(second, "index1.out.y", "out")
    (second * t["index1.cot.y"]).sum().backward()
    for parameter, gradient in golden.group("index1.grad.param.").items():
        golden.assert_max(model.get_parameter(parameter).grad, gradient, "grad.param")
    golden.assert_max(x.grad, "index1.grad.in.x", "grad.in")


def test_blocks_of_the_classifier_come_before_its_query(case, check_gradients, leaf):
    golden = case("22_v2_classifier")
    classifier = build(golden, AttentiveClassifier, blocks_first=True)
    x = leaf(golden.tensors["in.x"])
    logits = classifier(x)
    golden.assert_max(logits, "out.logits", "out")
    check_gradients(golden, classifier, "", {"logits": logits}, {"x": x})
