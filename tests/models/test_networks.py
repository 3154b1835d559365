"""Encoder and predictor: sizes, names, initial weights, tables, and what they refuse."""

import math

import pytest
import torch

from fastjepa.masks import Ragged
from fastjepa.models import (
    PatchEmbed,
    PatchEmbed3D,
    VisionTransformer,
    VisionTransformerPredictor,
    build_vit,
    vit_predictor,
    vit_tiny,
)
from fastjepa.models.initialise import normal_, redraw_linears
from fastjepa.models.pos_embed import position_table
from fastjepa.models.predictor import signal_left
from fastjepa.models.vision_transformer import SIZES

TINY = {"img_size": 32, "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "uniform_power": True}
SMALL = {**TINY, "embed_dim": 24, "depth": 2, "num_heads": 2}  # 2 x 4 x 4 tokens


def encoder(**changes):
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **changes})


def predictor(**changes):
    torch.manual_seed(0)
    plain = {**TINY, "embed_dim": 24, "predictor_embed_dim": 12, "depth": 2, "num_heads": 2, "use_mask_tokens": True}
    return vit_predictor(**{**plain, **changes})


def clips(count=2, size=(32, 32), frames=4):
    return torch.randn(count, 3, frames, *size, generator=torch.Generator().manual_seed(1))


def trainable(network):
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


# Sizes and names


@pytest.mark.parametrize(("name", "count"), [("vit_tiny", 5_633_856), ("vit_small", 21_884_544)])
def test_trainable_parameters_of_the_small_sizes(name, count):
    network = build_vit(name, num_frames=16, uniform_power=True)
    assert trainable(network) == count
    assert network.num_patches == 1568


@pytest.mark.parametrize(
    ("name", "depth", "count"),
    [("vit_base", 12, 86_236_416), ("vit_large", 24, 303_885_312), ("vit_huge", 32, 631_648_000)],
)
def test_trainable_parameters_of_the_large_sizes_follow_from_none_and_one_of_their_blocks(name, depth, count):
    assert SIZES[name]["depth"] == depth
    none, one = (trainable(build_vit(name, num_frames=16, img_size=32, depth=d)) for d in (0, 1))
    assert none + depth * (one - none) == count


@pytest.mark.parametrize(("name", "hidden"), [("vit_giant", 6144), ("vit_gigantic", 8192)])
def test_hidden_width_of_the_giants(name, hidden):
    block = build_vit(name, num_frames=2, img_size=(16, 14)[name == "vit_gigantic"], depth=1).blocks[0]
    assert block.mlp.fc1.out_features == hidden


@pytest.mark.parametrize(
    ("size", "frames", "count"), [(224, 16, 1568), (256, 16, 2048), (384, 16, 4608), (256, 64, 8192), (224, 1, 196)]
)
def test_number_of_tokens(size, frames, count):
    network = VisionTransformer(img_size=size, num_frames=frames, embed_dim=24, depth=0, num_heads=2)
    assert network.num_patches == count
    assert network.pos_embed.shape == (1, count, 24)


def block_shapes(prefix, width, hidden):
    return {
        f"{prefix}.{name}": shape
        for name, shape in {
            "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
            "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,),
        }.items()
    }  # fmt: skip


def shapes(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize(("frames", "kernel", "tokens"), [(4, (2, 8, 8), 32), (1, (8, 8), 16)])
def test_state_dict_of_the_encoder(frames, kernel, tokens):
    want = {
        "pos_embed": (1, tokens, 24), "patch_embed.proj.weight": (24, 3, *kernel), "patch_embed.proj.bias": (24,),
        "norm.weight": (24,), "norm.bias": (24,),
    }  # fmt: skip
    want |= block_shapes("blocks.0", 24, 96) | block_shapes("blocks.1", 24, 96)
    assert shapes(encoder(num_frames=frames)) == want


def test_state_dict_of_the_predictor():
    want = {
        "predictor_embed.weight": (12, 24), "predictor_embed.bias": (12,), "predictor_pos_embed": (1, 32, 12),
        "mask_tokens.0": (1, 1, 12), "mask_tokens.1": (1, 1, 12), "predictor_norm.weight": (12,),
        "predictor_norm.bias": (12,), "predictor_proj.weight": (24, 12), "predictor_proj.bias": (24,),
    }  # fmt: skip
    want |= block_shapes("predictor_blocks.0", 12, 48) | block_shapes("predictor_blocks.1", 12, 48)
    assert shapes(predictor()) == want
    noised = {name: shape for name, shape in want.items() if not name.startswith("mask_tokens")}
    assert shapes(predictor(use_mask_tokens=False)) == noised


def test_published_entry_counts():
    assert len(vit_tiny(num_frames=2, img_size=16).state_dict()) == 149
    deep = predictor(depth=12, num_mask_tokens=2)
    assert len(deep.state_dict()) == 153


def test_factories_use_the_published_epsilon():
    for network in (vit_tiny(depth=1), predictor(depth=1)):
        assert {part.eps for part in network.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("build", [encoder, predictor, vit_tiny])
def test_an_unknown_argument_is_refused(build):
    with pytest.raises(TypeError, match="use_SiLU"):
        build(use_SiLU=True)


def test_an_unknown_size_is_refused_with_the_names():
    with pytest.raises(
        ValueError, match=r"unknown model 'vit_larg', expected one of vit_nano, vit_tiny, .*vit_gigantic"
    ):
        build_vit("vit_larg")


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="dim 24 and num_heads 5"):
        encoder(num_heads=5)


# Initial weights


def wide(kind):
    if kind == "encoder":
        network = VisionTransformer(**TINY, embed_dim=192, depth=3, num_heads=3)
        return network, network.blocks
    network = vit_predictor(**TINY, embed_dim=192, predictor_embed_dim=192, depth=3, num_heads=3, use_mask_tokens=True)
    return network, network.predictor_blocks


@pytest.mark.parametrize("kind", ["encoder", "predictor"])
def test_initial_weights_have_the_published_spread_and_output_projections_are_rescaled(kind):
    network, blocks = wide(kind)
    for number, block in enumerate(blocks, start=1):
        for layer, shrink in [
            (block.attn.qkv, 1.0), (block.mlp.fc1, 1.0),
            (block.attn.proj, (2 * number) ** 0.5), (block.mlp.fc2, (2 * number) ** 0.5),
        ]:  # fmt: skip
            assert layer.weight.std().item() * shrink == pytest.approx(0.02, rel=0.03)
            assert abs(layer.weight.mean().item()) < 0.001
            assert not layer.bias.any()
    ends = [network.patch_embed.proj] if kind == "encoder" else [network.predictor_embed, network.predictor_proj]
    for layer in ends:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert not layer.bias.any()
    for part in network.modules():
        if isinstance(part, torch.nn.LayerNorm):
            assert (part.weight == 1).all()
            assert not part.bias.any()
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_init_std_is_honoured():
    network = VisionTransformer(**TINY, embed_dim=192, depth=1, num_heads=3, init_std=0.1)
    assert network.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.1, rel=0.03)


def test_redrawing_undoes_the_rescale_and_leaves_the_patch_embedding():
    network, blocks = wide("encoder")
    before, table = network.patch_embed.proj.weight.clone(), network.pos_embed.clone()
    redraw_linears(network)
    for block in blocks:
        assert block.attn.proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert torch.equal(network.patch_embed.proj.weight, before)
    assert torch.equal(network.pos_embed, table)


def test_no_weight_lies_at_the_cut():
    # The published sampler puts about one weight in 26 million at exactly -2, a hundred standard deviations out.
    # With this seed it does so among the first 20 million.
    torch.manual_seed(1)
    drawn = normal_(torch.empty(20_000_000), 0.02)
    assert drawn.abs().max() < 0.2


def test_mask_tokens_start_at_zero_and_can_be_drawn():
    assert not any(token.any() for token in predictor().mask_tokens)
    drawn = predictor(predictor_embed_dim=1200, num_mask_tokens=3, depth=0, zero_init_mask_tokens=False).mask_tokens
    assert len(drawn) == 3
    for token in drawn:
        assert token.requires_grad
        assert token.std().item() == pytest.approx(0.02, rel=0.1)


# Position tables


def test_position_tables_are_frozen_and_hold_the_published_entries():
    one_slot = 4 * 4
    for table, width in [(encoder().pos_embed, 24), (predictor().predictor_pos_embed, 12)]:
        assert not table.requires_grad
        third = 2 * math.ceil(width / 6)
        assert table[0, one_slot, 0].item() == pytest.approx(math.sin(1), abs=1e-7)
        assert table[0, one_slot, third // 2].item() == pytest.approx(math.cos(1), abs=1e-7)
        assert table[0, 0, 0].item() == 0
        row, column = table[0, 4], table[0, 1]
        assert row[third].item() == pytest.approx(math.sin(1), abs=1e-7)
        assert column[2 * third].item() == pytest.approx(math.sin(1), abs=1e-7)
        assert column[third].item() == 0


@pytest.mark.parametrize(("width", "third"), [(1024, 342), (1280, 428), (1408, 470), (384, 128)])
def test_uniform_channels_of_a_table_are_cut_at_the_end(width, third):
    table = position_table(width, (2, 2, 2), uniform_power=True)[0]
    assert table.shape == (8, width)
    changing = [(table[0] != table[token]).nonzero().ravel() for token in (4, 2, 1)]  # one step in time, row, column
    assert [(int(c.min()), int(c.max()) // third) for c in changing] == [(0, 0), (third, 1), (2 * third, 2)]


def test_rectangular_clips_have_rectangular_tables():
    network = encoder(img_size=(32, 48))
    assert network.grid == (2, 4, 6)
    features = network(clips(size=(32, 48)))
    assert features.shape == (2, 48, 24)
    table = network.pos_embed.view(2, 4, 6, 24)
    assert torch.equal(table[:, :, :4], encoder().pos_embed.view(2, 4, 4, 24))
    assert predictor(img_size=(32, 48)).predictor_pos_embed.shape == (1, 48, 12)
    image = VisionTransformer(img_size=(16, 32), patch_size=8, embed_dim=24, depth=1, num_heads=2)
    assert image(torch.randn(1, 3, 16, 32)).shape == (1, 8, 24)


def test_other_clip_sizes_resample_the_table():
    network = encoder()
    assert network(clips(size=(48, 40), frames=6)).shape == (2, 3 * 6 * 5, 24)


# Encoder


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [((1, 3, 5, 16, 16), "clip frames must be a multiple of 2, got 5"), ((1, 3, 4, 18, 16), "height .* 8, got 18"),
     ((1, 3, 4, 16, 20), "width must be a multiple of 8, got 20")],
)  # fmt: skip
def test_clips_that_do_not_fill_their_patches_are_refused(shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        PatchEmbed3D(8, 2, 3, 4)(torch.zeros(shape))


@pytest.mark.parametrize(("size", "sentence"), [((18, 16), "height .* got 18"), ((16, 20), "width .* got 20")])
def test_images_that_do_not_fill_their_patches_are_refused(size, sentence):
    with pytest.raises(ValueError, match=sentence):
        PatchEmbed(8, 3, 4)(torch.zeros(1, 3, *size))


def test_forward_sets_of_a_ragged_set_equal_the_clips_one_by_one():
    network, batch = encoder(), clips(4)
    lengths = (5, 5, 3, 7)
    index = torch.cat([torch.randperm(32)[:length].sort().values for length in lengths])
    dense = torch.stack([torch.randperm(32)[:6].sort().values for _ in range(4)])
    rows, block = network.forward_sets(batch, [Ragged(index, lengths), dense])
    each = [network(batch[i : i + 1], part.unsqueeze(0))[0] for i, part in enumerate(index.split(lengths))]
    torch.testing.assert_close(rows, torch.cat(each))
    torch.testing.assert_close(block, network(batch, dense))


def test_a_list_of_masks_needs_equal_lengths():
    network, batch = encoder(), clips(2)
    masks = [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)]
    assert network(batch, [masks[0], masks[0]]).shape == (4, 3, 24)
    with pytest.raises(ValueError, match=r"different numbers of tokens \[3, 4\]"):
        network(batch, masks)


def test_out_layers_return_normalised_outputs_in_the_order_of_the_blocks():
    network, batch = encoder(depth=3, out_layers=[2, 0]), clips(2)
    first, last = network(batch)
    network.out_layers = None
    torch.testing.assert_close(last, network(batch))
    torch.testing.assert_close(first, network.norm(network.blocks[0](network.embed(batch))))
    network.out_layers = [0]
    with pytest.raises(ValueError, match="does not take out_layers"):
        network.forward_sets(batch, [torch.zeros(2, 3, dtype=torch.int64)])


# Predictor


def asked(network, **changes):
    generator = torch.Generator().manual_seed(2)
    kept, wanted = torch.arange(5).expand(2, 5), torch.arange(9, 16).expand(2, 7)
    features = torch.randn(2, 5, 24, generator=generator)
    plain = {"ctxt": features, "tgt": None, "masks_ctxt": kept, "masks_tgt": wanted}
    return network(**{**plain, **changes})


def test_mask_index_wraps_around_the_mask_tokens():
    network = predictor(num_mask_tokens=2, zero_init_mask_tokens=False)
    outputs = [asked(network, mask_index=number) for number in range(4)]
    assert outputs[0].shape == (2, 7, 24)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(asked(network), outputs[1])


def test_one_element_lists_are_masks_and_longer_ones_are_refused():
    network = predictor()
    kept, wanted = torch.arange(5).expand(2, 5), torch.arange(9, 16).expand(2, 7)
    assert torch.equal(asked(network, masks_ctxt=[kept], masks_tgt=[wanted]), asked(network))
    for lists in ({"masks_ctxt": [kept, kept]}, {"masks_tgt": [wanted, wanted]}):
        with pytest.raises(ValueError, match="one context mask with one target mask, got a list of 2"):
            asked(network, **lists)


def test_the_noised_path_needs_targets_and_takes_its_draws():
    network = predictor(use_mask_tokens=False)
    with pytest.raises(ValueError, match="needs target features"):
        asked(network)
    noise = torch.randn(2, 7, 12)
    pure = {"timesteps": torch.tensor([999, 999]), "noise": noise}
    some = {"timesteps": torch.tensor([0, 3]), "noise": noise}
    one, other = torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    assert torch.equal(asked(network, tgt=one, **pure), asked(network, tgt=other, **pure))
    assert not torch.allclose(asked(network, tgt=one, **some), asked(network, tgt=other, **some))


def test_signal_left_has_the_published_values():
    table = signal_left("published")
    want = {
        0: 0.5, 1: 0.24975, 2: 0.12462525, 3: 0.062125687125, 4: 0.0309385921883, 5: 0.0153919496137,
        9: 9.334576e-4, 19: 7.876667e-7, 23: 4.512993e-8, 49: 2.555568e-16, 99: 4.700764e-33,
    }  # fmt: skip
    for step, value in want.items():
        assert table[step].item() == pytest.approx(value, rel=1e-5 if step > 20 else 1e-6, abs=0)
    assert not table[136:].any()
    assert table.shape == (1000,)
    assert table.dtype == torch.float32


@pytest.mark.parametrize("noise", ["published", "linear"])
def test_noise_only_grows(noise):
    table = signal_left(noise)
    assert (table.diff() <= 0).all()
    assert 0 <= table[-1] < 1e-4
    assert table[0] < 1
    if noise == "linear":
        assert (table.diff() < 0).all()
        assert table[500] > 0.05
    assert torch.equal(predictor(noise=noise).signal_left, table)


def test_predictor_defaults_are_the_published_ones():
    network = VisionTransformerPredictor(img_size=32, embed_dim=48, predictor_embed_dim=24, num_heads=2)
    assert len(network.predictor_blocks) == 6
    assert network.mask_tokens is None
    assert network.predictor_pos_embed.shape == (1, 4, 24)


@pytest.mark.parametrize("layers", [[-1], [12], [0, 99]])
def test_out_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(ValueError, match="block numbers from 0 to 2"):
        build_vit("vit_nano", img_size=16, patch_size=8, out_layers=layers)
