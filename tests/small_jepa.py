"""A small JEPA with its clips and masks, for tests that compare ways of computing the same."""

from functools import partial

import torch
from torch import nn

from fastjepa.jepa import JEPA
from fastjepa.masks import MultiBlockMaskGenerator, Ragged
from fastjepa.models import VisionTransformer, vit_predictor

GRID = {"img_size": 32, "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "uniform_power": True}  # 2 x 4 x 4
NORM = partial(nn.LayerNorm, eps=1e-6)


def make(
    execution="packed", noised=False, widths=(24, 12), rotary=None, drop_path=0.0, levels=None, dense=False, **arguments
):
    """A small JEPA in float64 whose target encoder and mask tokens differ from what they start as.

    `rotary` is the style of rotary positions, in place of tables; `levels` are blocks that are supervised; `dense`: the
    predictor predicts context tokens too.
    """
    torch.manual_seed(0)
    width, narrow = widths
    shared = {**GRID, "depth": 2, "num_heads": 2, "init_std": 0.2, "drop_path_rate": drop_path}
    if rotary is not None:
        shared |= {"use_rope": True, "rope_style": rotary}
    encoder = VisionTransformer(**shared, embed_dim=width, norm_layer=NORM, levels=levels)
    predictor = vit_predictor(
        **shared, embed_dim=width, predictor_embed_dim=narrow, use_mask_tokens=not noised, zero_init_mask_tokens=False,
        levels=encoder.number_of_levels, predict_context=dense,
    )  # fmt: skip
    jepa = JEPA(encoder, predictor, execution=execution, **arguments).double()
    with torch.no_grad():
        for p in jepa.target_encoder.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return jepa


def clips(count, frames=4):
    return torch.randn(count, 3, frames, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def byte_clips(count):
    """Clips of bytes, black and white among them."""
    pixels = torch.randint(256, (count, 3, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels[:, :, 0, 0, 0], pixels[:, :, 0, 0, 1] = 0, 255
    return pixels


def masks(count, group=None, truncation="group", first=0, step=0, frames=4):
    """Two mask sets whose lengths differ between groups, and between steps."""
    generators = [
        MultiBlockMaskGenerator(
            32, frames, 8, spatial_pred_mask_scale=(scale, scale), temporal_pred_mask_scale=(0.5, 0.5), npred=blocks,
            aspect_ratio=(0.75, 1.5), set_number=number, truncation=truncation, group=group,
        )
        for number, (scale, blocks) in enumerate([(0.25, 3), (0.5, 2)])
    ]  # fmt: skip
    pairs = [generator.draw(step, range(first, first + count)) for generator in generators]
    return [list(sets) for sets in zip(*pairs)]


def ragged(token_set):
    return Ragged(token_set.flatten(), (token_set.shape[1],) * len(token_set))


def part(token_set, rows):
    """Some clips of a mask set."""
    if not isinstance(token_set, Ragged):
        return token_set[rows]
    lengths = token_set.lengths[rows]
    return Ragged(torch.cat(token_set.index.split(list(token_set.lengths))[rows]), lengths)


def gradients(jepa):
    return {name: p.grad.clone() for name, p in jepa.named_parameters() if p.grad is not None}


def assert_same(got, want, rel=1e-10):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= rel * value.abs().max() + 1e-18, name
