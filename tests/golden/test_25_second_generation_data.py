"""Parity cases 25: mask options and frame numbers of V-JEPA 2, with the recorded random numbers handed in."""

import numpy as np
import pytest
import torch

from fastjepa.data.frames import segment_frames
from fastjepa.data.sampling import ClipShape
from fastjepa.masks import MaskCollator

OPTIONS = {"full_complement", "pred_full_complement", "inv_block"}


@pytest.fixture(scope="module")
def masks(case):
    return case("25_v2_masks")


def test_the_case_covers_every_option(masks):
    assert set().union(*(call["mask"] for call in masks.info["calls"])) >= OPTIONS
    assert len(masks.info["calls"]) == 5


def test_recorded_positions_give_the_recorded_masks_token_for_token(masks):
    """Of every option alone, of none, and of two together."""
    for call in masks.info["calls"]:
        random = torch.Generator().manual_seed(masks.info["seeds"]["torch_global_seed"])

        def corners(block, _, random=random):
            room = (6 - block[1] + 1, 6 - block[2] + 1, 4 - block[0] + 1)
            return np.array([[torch.randint(0, n, (1,), generator=random).item() for n in room] for _ in range(3)])

        collator = MaskCollator([call["mask"]], call["crop_size"], call["frames"], 16, 2)
        (generator,) = collator.generators
        assert generator.grid == (4, 6, 6)
        generator.draw_corners = corners
        (context,), (target,) = collator.draw(0, range(call["batch"]))
        wanted = masks.group(call["prefix"])
        assert torch.equal(context, wanted["mask_enc"]), call
        assert torch.equal(target, wanted["mask_pred"]), call


@pytest.mark.parametrize("truncation", ["group", "random", "none"])
@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_complements_leave_no_token_out_and_blocks_change_places(truncation, option):
    entry = {"num_blocks": 3, "spatial_scale": (0.2, 0.2), "temporal_scale": (0.5, 0.5), "max_keep": 60}
    plain, other = (
        MaskCollator([more], 96, 8, 16, 2, seed=3, truncation=truncation, group=2)
        for more in (entry, entry | {option: True})
    )
    sides = [[by_clip(*side) for side in one.draw(4, range(6))] for one in (plain, other)]
    (context, target), (seen, asked) = sides
    if option == "inv_block":
        assert (seen, asked) == (target, context)
    else:
        same = (context, seen) if option == "full_complement" else (target, asked)
        assert same[0] == same[1]
        assert [sorted(c + t) for c, t in zip(seen, asked)] == [list(range(144))] * 6
        assert any(len(c + t) < 144 for c, t in zip(context, target))


def by_clip(token_set):
    parts = token_set.index.split(list(token_set.lengths)) if hasattr(token_set, "lengths") else token_set
    return [part.tolist() for part in parts]


# -- frame numbers, 25_v2_frame_sampling --


def shape_of(call):
    args = call["args"]
    return ClipShape(
        call["frames_per_clip"], args.get("frame_step", 1), args.get("duration"), args.get("fps"), by_stride=True
    )


def test_frame_numbers_are_those_of_the_published_code(case):
    """Exact, by frame rate, duration and stride; the public code fails where a video is slower than its clips."""
    golden = case("25_v2_frame_sampling")
    assert {key for call in golden.info["calls"] for key in call["args"]} == {"fps", "duration", "frame_step"}
    compared = 0
    for call in golden.info["calls"]:
        stride = shape_of(call).source_stride(call["video_fps"])
        if call["error"]:
            assert (call["args"], stride) == ({"fps": 12}, 1)
            continue
        tensors, frames, length = golden.group(call["prefix"]), call["frames_per_clip"], call["n"]
        assert [[frames * stride, length]] * (length > frames * stride) == call["draw_ranges"], call
        end = int(tensors["drawn"][0]) if call["draw_ranges"] else None
        assert segment_frames(length, frames, stride, end).tolist() == tensors["indices"][0].tolist(), call
        compared += 1
    assert compared == 7
