"""Multi-block masks: sizes and counts as published, and draws that depend on the clip alone."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastjepa.masks import MaskCollator, MultiBlockMaskGenerator, Ragged

SHORT = {"num_blocks": 8, "spatial_scale": (0.15, 0.15), "temporal_scale": (1.0, 1.0), "aspect_ratio": (0.75, 1.5)}
LONG = {**SHORT, "num_blocks": 2, "spatial_scale": (0.7, 0.7)}
# Uniforms that a torch generator seeded with 0..3 draws: temporal scale, area, aspect ratio.
UNIFORMS = [
    (0.496257, 0.768222, 0.088477),
    (0.757632, 0.279311, 0.403069),
    (0.614695, 0.381013, 0.637114),
    (0.004264, 0.105569, 0.285842),
]


def small(**changes):
    """Half-time blocks on a 4 x 6 x 6 grid, so that lengths differ between clips."""
    plain = {
        "crop_size": 96,
        "num_frames": 8,
        "spatial_pred_mask_scale": (0.2, 0.4),
        "temporal_pred_mask_scale": (0.5, 1.0),
        "aspect_ratio": (0.75, 1.5),
        "npred": 3,
    }
    return MultiBlockMaskGenerator(**{**plain, **changes})


def tubes(**changes):
    """Blocks over all frames, as published: before cutting every time slot keeps the same places."""
    return small(temporal_pred_mask_scale=(1.0, 1.0), **changes)


def clips(token_set):
    if isinstance(token_set, Ragged):
        return [part.tolist() for part in token_set.index.split(list(token_set.lengths))]
    return token_set.tolist()


def golden(shared, name):
    folder = shared / "golden" / "cases"
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


# Sizes


@pytest.mark.parametrize(("scale", "sizes"), [(0.15, [(8, 5, 6), (8, 6, 5), (8, 6, 5)]), (0.7, [(8, 11, 13)])])
def test_block_sizes_at_14_by_14_are_the_published_ones(scale, sizes):
    generator = MultiBlockMaskGenerator(spatial_pred_mask_scale=(scale, scale), aspect_ratio=(0.75, 1.5))
    assert [generator.block_size(step) for step in range(len(sizes))] == sizes


@pytest.mark.parametrize("step", range(4))
def test_a_step_number_seeds_three_uniforms_for_time_area_and_aspect(step):
    generator = MultiBlockMaskGenerator(
        crop_size=(224, 288), num_frames=32, spatial_pred_mask_scale=(0.2, 0.5),
        temporal_pred_mask_scale=(0.25, 0.75), aspect_ratio=(0.5, 2.0),
    )  # fmt: skip
    time, area, aspect = UNIFORMS[step]
    cells, ratio = int(14 * 18 * (0.2 + 0.3 * area)), 0.5 + 1.5 * aspect
    expected = int(16 * (0.25 + 0.5 * time)), round((cells * ratio) ** 0.5), round((cells / ratio) ** 0.5)
    assert generator.block_size(step) == expected


def test_a_block_lasts_at_least_one_slot_and_stays_inside_the_frame():
    wide = {"spatial_pred_mask_scale": (0.5, 0.5), "temporal_pred_mask_scale": (0.1, 0.1)}
    assert MultiBlockMaskGenerator(**wide, aspect_ratio=(9.0, 9.0)).block_size(0) == (1, 14, 3)
    assert MultiBlockMaskGenerator(**wide, aspect_ratio=(0.1, 0.1)).block_size(0) == (1, 3, 14)


def collator_of(configuration, facts, **changes):
    return MaskCollator(configuration, facts["crop"], facts["frames"], 16, **changes)


def test_block_sizes_equal_the_recorded_ones(shared):
    info, tensors = golden(shared, "08_mask_statistics")
    for name, facts in info["summary"].items():
        for number, generator in enumerate(collator_of(facts["mask_cfg"], facts).generators):
            want = [tuple(row) for row in tensors[f"{name}.set{number}.block_size"].tolist()]
            assert [generator.block_size(step) for step in range(len(want))] == want, (name, number)


def test_recorded_targets_are_unions_of_blocks_of_our_size(shared):
    info, tensors = golden(shared, "08_mask_exact")
    c = info["constructor"]
    collator = MaskCollator(c["mask"], c["crop_size"], c["num_frames"], c["patch_size"], c["tubelet_size"])
    for name, rows in tensors.items():
        if name.endswith("mask_enc"):
            continue
        batch, number = int(name[5]), int(name[10])
        generator = collator.generators[number]
        _, bh, bw = generator.block_size(batch)
        for row in rows.tolist():
            # The blocks are tubes, and the first time slot is never cut.
            plane, union = np.zeros((2, generator.height, generator.width), dtype=bool)
            plane.ravel()[[token for token in row if token < plane.size]] = True
            for top, left in np.ndindex(generator.height - bh + 1, generator.width - bw + 1):
                box = slice(top, top + bh), slice(left, left + bw)
                union[box] |= plane[box].all()
            assert (union == plane).all(), name


# What a mask is


def test_context_and_target_divide_the_grid_and_are_ascending():
    generator = small()
    for step in range(6):
        for slot in range(6):
            context, target = generator.sample(step, slot)
            assert len(context) > 0
            assert len(target) > 0
            assert sorted([*context, *target]) == list(range(4 * 6 * 6))
            assert (np.diff(context) > 0).all()
            assert (np.diff(target) > 0).all()


def test_a_single_block_is_a_box_of_the_block_size_anywhere_in_the_grid():
    generator = small(npred=1)
    corners, far = set(), np.zeros(3, dtype=int)
    for slot in range(200):
        _, target = generator.sample(0, slot)
        places = np.stack(np.unravel_index(target, generator.grid))
        low, high = places.min(axis=1), places.max(axis=1) + 1
        assert tuple(high - low) == generator.block_size(0)
        assert len(target) == np.prod(high - low)
        corners.add(tuple(low))
        far = np.maximum(far, high)
    assert tuple(far) == generator.grid
    free = np.array(generator.grid) - generator.block_size(0) + 1
    assert len(corners) == np.prod(free)


def test_frames_after_max_temporal_keep_are_always_target():
    generator = small(max_context_frames_ratio=0.5)
    for slot in range(20):
        context, target = generator.sample(0, slot)
        assert max(context) < 2 * 36
        assert set(range(2 * 36, 4 * 36)) <= set(target.tolist())


@pytest.mark.parametrize("truncation", ["group", "none", "random"])
def test_max_keep_limits_the_context_and_not_the_target(truncation):
    limited = small(max_keep=5, truncation=truncation, group=4).draw(0, range(8))
    free = small(truncation=truncation, group=4).draw(0, range(8))
    assert all(len(kept) == 5 for kept in clips(limited[0]))
    assert all(len(kept) > 5 for kept in clips(free[0]))
    assert clips(limited[1]) == clips(free[1])


# Draws depend on (seed, step, slot, set)


def test_a_draw_depends_on_seed_step_slot_and_set_and_on_nothing_else():
    fixed = {"spatial_pred_mask_scale": (0.2, 0.2), "aspect_ratio": (1.0, 1.0), "temporal_pred_mask_scale": (0.5, 0.5)}
    base = small(**fixed)
    want = base.sample(3, 7)[0].tolist()
    others = [
        base.sample(4, 7),
        base.sample(3, 8),
        small(**fixed, seed=1).sample(3, 7),
        small(**fixed, set_number=1).sample(3, 7),
    ]
    assert want not in [context.tolist() for context, _ in others]
    torch.manual_seed(99)
    np.random.seed(99)
    assert small(**fixed).sample(3, 7)[0].tolist() == want
    assert base.sample(3, 7)[0].tolist() == want


@pytest.mark.parametrize("truncation", ["group", "none", "random"])
def test_masks_do_not_depend_on_how_a_step_is_divided_into_batches(truncation):
    def all_clips(batch):
        generator = small(truncation=truncation, group=24)
        draws = [generator.draw(2, range(first, first + batch)) for first in range(0, 48, batch)]
        return [[clip for draw in draws for clip in clips(draw[side])] for side in (0, 1)]

    want = all_clips(8)
    assert len(want[0]) == 48
    for batch in (24, 48):
        assert all_clips(batch) == want


@pytest.mark.parametrize(
    ("group", "slots", "dense"),
    [
        (None, range(6), True),
        (6, range(6, 12), True),
        (6, [8, 10], True),
        (6, range(3, 9), False),
        (2, range(4), False),
    ],
)
def test_clips_of_one_group_are_a_tensor_and_others_are_ragged(group, slots, dense):
    for truncation in ("group", "random"):
        for token_set in small(truncation=truncation, group=group).draw(0, slots):
            assert isinstance(token_set, torch.Tensor if dense else Ragged)
            assert len(clips(token_set)) == len(slots)
            assert (token_set if dense else token_set.index).dtype == torch.int64
    for token_set in small(truncation="none", group=group).draw(0, slots):
        assert isinstance(token_set, Ragged)


def test_the_clips_of_a_draw_stand_in_the_order_of_the_slots():
    generator = small(group=4)
    forward, backward = generator.draw(1, [4, 5, 6, 7]), generator.draw(1, [7, 6, 5, 4])
    for there, back in zip(forward, backward):
        assert clips(there) == clips(back)[::-1]


# Cutting


def test_without_truncation_every_token_is_kept():
    generator = small(truncation="none")
    for side, token_set in enumerate(generator.draw(1, range(8))):
        assert clips(token_set) == [generator.sample(1, slot)[side].tolist() for slot in range(8)]


def test_group_truncation_keeps_the_lowest_numbers_up_to_the_shortest_of_the_group():
    generator = small(group=4)
    for side, token_set in enumerate(generator.draw(1, range(8))):
        full = [generator.sample(1, slot)[side].tolist() for slot in range(8)]
        for slot, kept in enumerate(clips(token_set)):
            members = range(slot // 4 * 4, slot // 4 * 4 + 4)
            assert kept == full[slot][: min(len(full[member]) for member in members)]


def test_without_a_group_the_clips_of_a_call_are_cut_to_the_shortest_of_them():
    generator = small()
    for side, token_set in enumerate(generator.draw(1, [3, 9, 11])):
        full = [generator.sample(1, slot)[side].tolist() for slot in (3, 9, 11)]
        least = min(map(len, full))
        assert clips(token_set) == [tokens[:least] for tokens in full]


def test_random_truncation_keeps_a_sorted_subset_of_the_length_that_a_group_cut_gives():
    cut, random = (small(truncation=truncation, group=4) for truncation in ("group", "random"))
    differences = 0
    for side in (0, 1):
        full = [cut.sample(1, slot)[side].tolist() for slot in range(8)]
        for lowest, kept, tokens in zip(
            clips(cut.draw(1, range(8))[side]), clips(random.draw(1, range(8))[side]), full
        ):
            assert kept == sorted(set(kept))
            assert set(kept) <= set(tokens)
            assert len(kept) == len(lowest)
            differences += kept != lowest
    assert differences > 8


def shares_of_time(truncation):
    """Share of the kept tokens in each time slot, for context and target."""
    generator = tubes(truncation=truncation, group=24)
    counts = np.zeros((2, generator.duration))
    for step in range(40):
        for side, token_set in enumerate(generator.draw(step, range(24))):
            counts[side] += np.bincount(token_set.ravel() // 36, minlength=generator.duration)
    return counts / counts.sum(axis=1, keepdims=True), counts.sum(axis=1, keepdims=True)


def test_random_truncation_favours_no_time_slot_and_group_truncation_the_early_ones():
    shares, kept = shares_of_time("random")
    even = 1 / shares.shape[1]
    assert (abs(shares - even) < 5 * (even * (1 - even) / kept) ** 0.5).all()
    early, _ = shares_of_time("group")
    assert (early[:, -1] < 0.5 * early[:, 0]).all()


# The options of the second generation

TOKENS = set(range(4 * 6 * 6))


@pytest.mark.parametrize("truncation", ["group", "random"])
def test_complements_take_in_what_cutting_dropped_and_leave_the_other_side_alone(truncation):
    options = {"truncation": truncation, "group": 4}
    plain = [clips(side) for side in small(**options).draw(1, range(8))]
    full = [clips(side) for side in small(**options, full_complement=True).draw(1, range(8))]
    pred_full = [clips(side) for side in small(**options, pred_full_complement=True).draw(1, range(8))]
    assert any(len(seen) + len(asked) < len(TOKENS) for seen, asked in zip(*plain))
    assert full == [plain[0], [sorted(TOKENS - set(seen)) for seen in plain[0]]]
    assert pred_full == [[sorted(TOKENS - set(asked)) for asked in plain[1]], plain[1]]


def test_without_cutting_the_complement_takes_in_what_max_keep_dropped():
    context, target = small(truncation="none", max_keep=5, full_complement=True).draw(1, range(4))
    for seen, asked in zip(clips(context), clips(target)):
        assert len(seen) == 5
        assert asked == sorted(TOKENS - set(seen))


@pytest.mark.parametrize("truncation", ["group", "random", "none"])
@pytest.mark.parametrize("option", [{}, {"full_complement": True, "max_keep": 9}])
def test_the_inverse_block_exchanges_the_sides_at_the_end(truncation, option):
    options = {"truncation": truncation, "group": 4, **option}
    plain, exchanged = small(**options), small(**options, inv_block=True)
    assert [clips(side) for side in exchanged.draw(1, range(8))] == [
        clips(side) for side in reversed(plain.draw(1, range(8)))
    ]


@pytest.mark.parametrize("other", [{"full_complement": True}, {"max_keep": 3}])
def test_options_that_undo_each_other_are_refused(other):
    with pytest.raises(ValueError, match=f"pred_full_complement undoes {next(iter(other))}: choose one of them"):
        small(pred_full_complement=True, **other)


# Settings

WHOLE = {"spatial_pred_mask_scale": (1.0, 1.0), "temporal_pred_mask_scale": (1.0, 1.0)}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({**WHOLE, "aspect_ratio": (1.0, 1.0)}, "can cover the whole"),
        ({**WHOLE, "spatial_pred_mask_scale": (0.2, 0.99), "aspect_ratio": (0.9, 1.1)}, "can cover the whole"),
        ({"spatial_pred_mask_scale": (0.01, 0.4)}, "blocks without a token"),
        ({"spatial_pred_mask_scale": (0.05, 0.4), "aspect_ratio": (0.1, 1.0)}, "blocks without a token"),
        ({"spatial_pred_mask_scale": (0.05, 0.4), "aspect_ratio": (1.0, 10.0)}, "blocks without a token"),
        ({"npred": 0}, "num_blocks must be at least 1, got 0"),
        ({"max_keep": 0}, "max_keep must be at least 1"),
        ({"spatial_pred_mask_scale": (0.2, 1.2)}, "spatial_scale must be 0 < low <= high <= 1"),
        ({"spatial_pred_mask_scale": (0.0, 0.5)}, "spatial_scale must be 0 < low"),
        ({"temporal_pred_mask_scale": (0.5, 2.0)}, "temporal_scale must be 0 < low <= high <= 1"),
        ({"temporal_pred_mask_scale": (0.9, 0.5)}, "temporal_scale must be 0 < low <= high <= 1, got 0.9..0.5"),
        ({"aspect_ratio": (2.0, 0.5)}, "aspect_ratio must be 0 < low <= high, got 2.0..0.5"),
        ({"npred": 400, "temporal_pred_mask_scale": (1.0, 1.0)}, "left no context .* lower num_blocks"),
        ({"crop_size": 8}, "has no token to mask"),
        ({"num_frames": 1}, "has no token to mask"),
    ],
)
def test_settings_that_leave_a_side_empty_are_refused_at_construction(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**settings)


def test_a_full_frame_block_is_fine_where_it_does_not_fill_the_clip():
    whole = {"spatial_pred_mask_scale": (1.0, 1.0), "aspect_ratio": (1.0, 1.0), "npred": 1}
    context, _ = small(**whole, temporal_pred_mask_scale=(0.5, 0.5)).sample(0, 0)
    assert len(context) == 2 * 36


def test_blocks_of_varying_duration_never_fill_the_clip_and_are_not_refused():
    varying = small(spatial_pred_mask_scale=(0.2, 0.99), aspect_ratio=(0.9, 1.1), npred=1)
    assert {varying.block_size(step)[0] for step in range(200)} == {2, 3}


@pytest.mark.parametrize("blocks", [8, 9])
def test_blocks_that_cover_the_grid_together_nearly_always_are_refused_before_a_run_meets_it(blocks):
    # 6 x 4 blocks on 6 x 5 places leave a context only where all of them stand on the same side: 1 draw in 2 ** 8.
    with pytest.raises(ValueError, match="left no context"):
        small(
            crop_size=(96, 80), npred=blocks, spatial_pred_mask_scale=(0.8, 0.8), aspect_ratio=(1.5, 1.5),
            temporal_pred_mask_scale=(1.0, 1.0),
        )  # fmt: skip


def pairs(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda pair: tuple(sorted(pair)))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    slots=st.integers(1, 5),
    changes=st.fixed_dictionaries(
        {
            "spatial_pred_mask_scale": pairs(0.01, 1.0),
            "temporal_pred_mask_scale": pairs(0.01, 1.0),
            "aspect_ratio": pairs(0.2, 4.0),
            "npred": st.integers(1, 12),
            "max_context_frames_ratio": st.sampled_from([1.0, 0.5, 0.1]),
            "max_keep": st.sampled_from([None, 1, 7]),
            "truncation": st.sampled_from(["group", "random", "none"]),
            "group": st.sampled_from([None, 1, 3]),
            "seed": st.integers(0, 2**40),
        }
    ),
)
def test_settings_are_refused_or_never_give_an_empty_side(rows, columns, slots, changes):
    try:
        generator = small(crop_size=(16 * rows, 16 * columns), num_frames=2 * slots, **changes)
    except ValueError:
        return
    for step in range(4):
        for context, target in zip(*map(clips, generator.draw(step, range(4)))):
            assert context
            assert target
            assert not set(context) & set(target)
            assert context == sorted(set(context))
            assert target == sorted(set(target))
            assert 0 <= min(context + target) <= max(context + target) < rows * columns * slots
