"""Parity cases 25: the options of mask sets and the frame numbers of the second generation."""

import numpy as np
import torch

from fastjepa.data.frames import clip_frames, clip_stride, rate_stride
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


# Frame numbers, 25_v2_frame_sampling


class Recorded:
    """In place of a random generator: gives the recorded numbers, and notes the ranges that were asked for."""

    def __init__(self, numbers):
        self.numbers, self.asked = list(numbers), []

    def integers(self, low, high):
        self.asked.append([low, high])
        return self.numbers.pop(0)


def stride_of(call):
    args, frames = call["args"], call["frames_per_clip"]
    if "fps" in args:
        return rate_stride(args["fps"], call["video_fps"])
    return clip_stride(frames, args.get("frame_step", 0), args.get("duration"), call["video_fps"])


def test_frame_numbers_by_a_rate_are_those_of_the_published_code(case):
    """Exact, with the recorded ends of the windows handed in. Too slow a video fails there; here its stride is 1."""
    frames_case = case("25_v2_frame_sampling")
    assert {key for call in frames_case.info["calls"] for key in call["args"]} == {"fps", "duration", "frame_step"}
    for call in frames_case.info["calls"]:
        if call["error"]:
            assert call["args"]["fps"] > call["video_fps"]
            assert stride_of(call) == 1
            continue
        tensors = frames_case.group(call["prefix"])
        rng = Recorded(tensors["drawn"].tolist())
        got = clip_frames(call["n"], call["frames_per_clip"], stride_of(call), rng, fixed="start")
        assert [got.tolist()] == tensors["indices"].tolist(), call
        assert rng.asked == call["draw_ranges"], call


def test_every_case_of_masks_and_frames_is_read_here(shared):
    names = {path.stem for path in (shared / "golden" / "cases").glob("25_*.json")}
    assert names == {"25_v2_masks", "25_v2_frame_sampling"}
