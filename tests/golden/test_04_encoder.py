from functools import partial

import pytest
import torch
from torch import nn

from fastjepa.models import VisionTransformer


def encoder(golden, **more):
    arguments = {k: v for k, v in golden.info["constructor"].items() if k not in ("norm", "norm_eps")}
    norm = partial(nn.LayerNorm, eps=golden.info["constructor"]["norm_eps"])
    model = VisionTransformer(**arguments, norm_layer=norm, **more)
    model.load_state_dict(golden.params())
    return model


def test_video_encoder_with_every_kind_of_mask(case):
    golden = case("04_vit_video")
    model, t = encoder(golden), golden.tensors
    for prefix, masks in {
        "full.": None,
        "mask.": t["in.mask_a"],
        "list.": [t["in.mask_a"], t["in.mask_b"]],
        "unsorted.": t["in.mask_unsorted"],
    }.items():
        golden.assert_max(model(t["in.x"], masks), f"{prefix}out.y", "out")


@pytest.mark.parametrize("name", ["04_vit_video", "04_vit_image"])
def test_gradients_through_a_mask(case, check_gradients, leaf, name):
    golden = case(name)
    model = encoder(golden)
    x = leaf(golden.tensors["in.x"])
    y = model(x, golden.tensors["in.mask_a"])
    golden.assert_max(y, "mask.out.y", "out")
    check_gradients(golden, model, "mask.", {"y": y}, {"x": x})


def test_intermediate_layers_pass_the_final_norm(case):
    golden = case("04_vit_video")
    model = encoder(golden, out_layers=golden.info["constructor_out_layers"])
    for prefix, masks in (("layers.", None), ("layers_mask.", golden.tensors["in.mask_a"])):
        for number, features in enumerate(model(golden.tensors["in.x"], masks)):
            golden.assert_max(features, f"{prefix}out.{number}", "out")


def test_clips_of_another_size(case):
    golden = case("04_vit_video_resized")
    model = encoder(golden)
    for number in (0, 1):
        golden.assert_max(model(golden.tensors[f"in.x{number}"]), f"size{number}.out.y", "out")


def test_image_encoder(case):
    golden = case("04_vit_image")
    model = encoder(golden)
    golden.assert_max(model(golden.tensors["in.x"]), "full.out.y", "out")
    golden.assert_max(model(golden.tensors["in.x_resized"]), "resized.out.y", "out")


def test_forward_sets_gives_one_tensor_a_set(case):
    golden = case("04_vit_video")
    model, t = encoder(golden), golden.tensors
    sets = model.forward_sets(t["in.x"], [t["in.mask_a"], t["in.mask_b"]])
    golden.assert_max(torch.cat(sets), "list.out.y", "out")
