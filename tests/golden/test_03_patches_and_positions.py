import pytest
import torch

from fastjepa.models import PatchEmbed, PatchEmbed3D, VisionTransformer, pos_embed


@pytest.mark.parametrize(("name", "kind"), [("03_patch_embed_2d", PatchEmbed), ("03_patch_embed_3d", PatchEmbed3D)])
def test_patch_embedding(case, check_gradients, leaf, name, kind):
    golden = case(name)
    module = kind(**golden.info["constructor"])
    module.load_state_dict(golden.params())
    x = leaf(golden.tensors["in.x"])
    y = module(x)
    golden.assert_max(y, "out.y", "out")
    check_gradients(golden, module, "", {"y": y}, {"x": x})


def test_sincos_tables(case):
    golden = case("03_pos_embed_sincos")
    for call in golden.info["calls"]:
        table = getattr(pos_embed, call["what"])(**call["args"])
        if call["rows"] is not None:
            table = table[call["rows"]]
        golden.assert_max(torch.from_numpy(table).float(), call["outputs"][0], "out")


@pytest.mark.parametrize(("name", "size"), [("03_pos_embed_interp_2d", "image"), ("03_pos_embed_interp_3d", "clip")])
def test_interpolated_tables(case, name, size):
    golden = case(name)
    model = VisionTransformer(**golden.info["constructor"])
    golden.assert_max(model.pos_embed, "in.table", "out")
    for number, call in enumerate(golden.info["calls"]):
        like = torch.empty(1, 3, *call[size])
        for suffix in ("", "_random"):
            table = model.interpolate_pos_encoding(like, golden.tensors[f"in.table{suffix}"])
            golden.assert_max(table, f"out.{number}{suffix}", "out")


@pytest.mark.parametrize(("old", "new"), [(11, 15), (13, 15), (22, 15), (23, 13), (7, 61), (14, 61)])
def test_interpolation_never_loses_a_token(old, new):
    table = torch.randn(1, old * old, 12)
    assert pos_embed.interpolate_pos_embed(table, (old, old), (new, new)).shape == (1, new * new, 12)
    volume = torch.randn(1, 2 * old * old, 12)
    assert pos_embed.interpolate_pos_embed(volume, (2, old, old), (3, new, old)).shape == (1, 3 * new * old, 12)
