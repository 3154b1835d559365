"""Parity cases 25: the options of mask sets of the second generation."""

import numpy as np
import torch

from fastjepa.masks import MaskCollator

# Mask options, 25_v2_masks

TOKENS = 4 * 6 * 6
SIDES = ("mask_enc", "mask_pred")


def recorded_corners(generator, random):
    """Corners of a clip from the recorded stream: block after block, top, left, start."""

    def draw(block, _):
        bt, bh, bw = block
        room = (generator.height - bh + 1, generator.width - bw + 1, generator.duration - bt + 1)
        return np.array(
            [[torch.randint(0, n, (1,), generator=random).item() for n in room] for _ in range(generator.npred)]
        )

    return draw


def first_batch(case, call):
    """(context, target) of our rules with the recorded positions."""
    collator = MaskCollator([call["mask"]], call["crop_size"], call["frames"], 16, 2)
    (generator,) = collator.generators
    random = torch.Generator().manual_seed(case.info["seeds"]["torch_global_seed"])
    generator.draw_corners = recorded_corners(generator, random)
    return generator.draw(0, range(call["batch"]))


def test_recorded_positions_give_the_recorded_masks_with_every_option(case):
    masks = case("25_v2_masks")
    compared = 0
    for call in masks.info["calls"]:
        for name, got in zip(("mask_enc", "mask_pred"), first_batch(masks, call)):
            want = masks.tensors[call["prefix"] + name]
            assert got.dtype == want.dtype
            assert torch.equal(got, want), call["prefix"] + name
            compared += 1
    assert compared == len(masks.tensors) == 10


def test_the_recorded_options_are_all_of_them_and_do_what_they_say(case):
    masks = case("25_v2_masks")
    sides = {
        call["prefix"]: [[set(row) for row in masks.tensors[call["prefix"] + side].tolist()] for side in SIDES]
        for call in masks.info["calls"]
    }
    plain_context, plain_target = sides["plain."]
    assert any(len(seen | asked) < TOKENS for seen, asked in zip(plain_context, plain_target))
    for name, kept in (("full.", plain_context), ("pred_full.", plain_target)):
        context, target = sides[name]
        assert (context if kept is plain_context else target) == kept
        assert all(len(seen) + len(asked) == len(seen | asked) == TOKENS for seen, asked in zip(context, target))
    assert sides["inv."] == [plain_target, plain_context]
    assert sides["full_inv."] == sides["full."][::-1]
    options = {key for call in masks.info["calls"] for key, value in call["mask"].items() if value is True}
    assert options == {"full_complement", "pred_full_complement", "inv_block"}
