from functools import partial

import pytest
import torch
from torch import nn

from fastjepa.models import MLP, Attention, Block

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80])
def test_block_matches_the_published_block_forward_and_backward(case, check_gradients, leaf, head_dim):
    golden = case(f"01_block_hd{head_dim}")
    c = golden.info["constructor"]
    block = Block(
        c["dim"], c["num_heads"], c["mlp_ratio"], c["qkv_bias"], norm_layer=partial(nn.LayerNorm, eps=c["norm_eps"])
    )
    block.load_state_dict(golden.params())
    x = leaf(golden.tensors["in.x"])
    y = block(x)
    golden.assert_max(y, "out.y", "out")
    check_gradients(golden, block, "", {"y": y}, {"x": x})


@pytest.mark.parametrize(
    ("prefix", "arguments"),
    [
        ("fused.", {"use_sdpa": True, "sdpa_ignores_scale": True, "qk_scale": 0.5}),
        ("explicit.", {"use_sdpa": False, "qk_scale": 0.5}),
    ],
)
def test_attention_paths(case, check_gradients, leaf, prefix, arguments):
    golden = case("01_attention_paths")
    attention = Attention(48, 3, qkv_bias=True, **arguments)
    attention.load_state_dict(golden.params())
    x = leaf(golden.tensors["in.x"])
    outputs = {"y": attention(x)}
    if not arguments["use_sdpa"]:
        outputs["y"], outputs["attn"] = attention(x, return_attention=True)
    for name, out in outputs.items():
        golden.assert_max(out, f"{prefix}out.{name}", "out")
    check_gradients(golden, attention, prefix, outputs, {"x": x})


def test_explicit_attention_with_the_default_scale(case):
    golden = case("01_attention_paths")
    attention = Attention(48, 3, qkv_bias=True, use_sdpa=False)
    attention.load_state_dict(golden.params())
    y, weights = attention(golden.tensors["in.x"], return_attention=True)
    golden.assert_max(y, "explicit_default.out.y", "out")
    golden.assert_max(weights, "explicit_default.out.attn", "out")


def test_fused_attention_honours_a_custom_scale_by_default(case):
    golden = case("01_attention_paths")
    attention = Attention(48, 3, qkv_bias=True, qk_scale=0.5)
    attention.load_state_dict(golden.params())
    golden.assert_max(attention(golden.tensors["in.x"]), golden.tensors["explicit.out.y"], "out")


def test_fused_attention_gives_its_map_with_the_scale_that_it_used(case):
    golden = case("01_attention_paths")
    attention = Attention(48, 3, qkv_bias=True, qk_scale=0.5, sdpa_ignores_scale=True)
    attention.load_state_dict(golden.params())
    y, weights = attention(golden.tensors["in.x"], return_attention=True)
    golden.assert_max(y, golden.tensors["fused.out.y"], "out")
    golden.assert_max(weights, golden.tensors["explicit_default.out.attn"], "out")


def test_attention_without_qkv_bias(case, check_gradients, leaf):
    golden = case("01_attention_nobias")
    c = golden.info["constructor"]
    attention = Attention(c["dim"], c["num_heads"], qkv_bias=c["qkv_bias"])
    attention.load_state_dict(golden.params())
    x = leaf(golden.tensors["in.x"])
    y = attention(x)
    golden.assert_max(y, "out.y", "out")
    check_gradients(golden, attention, "", {"y": y}, {"x": x})


def test_mlp(case, check_gradients, leaf):
    golden = case("01_mlp")
    mlp = MLP(**golden.info["constructor"])
    mlp.load_state_dict(golden.params())
    x = leaf(golden.tensors["in.x"])
    y = mlp(x)
    golden.assert_max(y, "out.y", "out")
    check_gradients(golden, mlp, "", {"y": y}, {"x": x})
    assert torch.is_tensor(y)
