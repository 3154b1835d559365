"""Random tube masks: the same cells at all times, counts as published, and draws that depend on the clip alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.masks import RandomTubeMaskCollator, RandomTubeMaskGenerator
from fastjepa.masks.random_tube import tube_tokens


def small(**changes):
    """9 of 36 cells are seen in each of 4 time slots."""
    return RandomTubeMaskGenerator(**{"crop_size": 96, "num_frames": 8, "ratio": 0.75, **changes})


# What a mask is


@pytest.mark.parametrize(
    ("crop", "frames", "ratio", "context", "target"),
    [
        (224, 16, 0.9, 152, 1416),  # 19 of 196 cells
        (160, 16, 0.9, 72, 728),  # 9 of 100 cells: 100 * (1 - 0.9) is below 10
        (160, 4, 0.7, 60, 140),  # 100 * (1 - 0.7) is above 30
        ((96, 64), 2, 0.5, 12, 12),
    ],
)
def test_counts_are_the_published_ones(crop, frames, ratio, context, target):
    sides = small(crop_size=crop, num_frames=frames, ratio=ratio).draw(0, range(3))
    assert [tuple(side.shape) for side in sides] == [(3, context), (3, target)]
    assert all(side.dtype == torch.int64 for side in sides)


def test_the_published_ratio_is_the_default():
    assert RandomTubeMaskGenerator().draw(0, [0])[0].shape == (1, 152)
    assert RandomTubeMaskCollator([{}], patch_size=16).draw(0, [0])[0][0].shape == (1, 152)


def test_a_clip_sees_its_cells_at_all_times_and_predicts_all_others():
    generator = small(crop_size=(96, 64))
    cells = generator.draw_cells(2, range(5))
    assert cells.shape == (5, 24)
    context, target = generator.draw(2, range(5))
    for kept, seen, rest in zip(cells, context.numpy(), target.numpy()):
        grid = np.zeros((4, 24), dtype=int)
        np.add.at(grid.ravel(), seen, 1)
        np.add.at(grid.ravel(), rest, 2)
        assert (grid == np.where(kept, 1, 2)).all()
        assert (np.diff(seen) > 0).all()
        assert (np.diff(rest) > 0).all()


def test_every_cell_is_seen_equally_often():
    generator, clips = small(), 4000
    seen = generator.draw_cells(0, range(clips)).mean(axis=0)
    assert seen.sum() == pytest.approx(9)
    assert (abs(seen - 0.25) < 4 * (0.25 * 0.75 / clips) ** 0.5).all()


def test_cells_are_drawn_without_regard_to_one_another():
    """Two cells are seen together as often as two draws without replacement: 9 * 8 of 36 * 35 pairs."""
    clips = 4000
    cells = small().draw_cells(1, range(clips)).astype(float)
    together = (cells.T @ cells / clips)[np.triu_indices(36, 1)]
    expected = 9 * 8 / (36 * 35)
    error = (expected * (1 - expected) / clips) ** 0.5
    assert abs(together - expected).max() < 5 * error
    assert together.std() == pytest.approx(error, rel=0.15)


def test_clips_that_keep_different_numbers_of_cells_are_no_mask_set():
    with pytest.raises(ValueError, match=r"equally many cells, got \[1, 2\]"):
        tube_tokens(np.array([[True, False, False], [True, True, False]]), 2)


# Draws depend on (seed, step, slot, set)


def test_a_draw_depends_on_seed_step_slot_and_set_and_on_nothing_else():
    want = small().draw(3, [7])[0].tolist()
    others = [
        small().draw(4, [7]),
        small().draw(3, [8]),
        small(seed=1).draw(3, [7]),
        small(set_number=1).draw(3, [7]),
    ]
    assert want not in [context.tolist() for context, _ in others]
    torch.manual_seed(99)
    np.random.seed(99)
    generator = small()
    generator.draw(5, range(3))
    assert generator.draw(3, [7])[0].tolist() == want


def test_a_clip_has_the_same_mask_in_any_batch():
    whole, single = small().draw(1, [4, 5, 9]), [small().draw(1, [slot]) for slot in (4, 5, 9)]
    for side in (0, 1):
        assert torch.equal(whole[side], torch.cat([pair[side] for pair in single]))


# Settings


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ratio": 0.98}, r"mask ratio 0.98 leaves no context on a frame of 6x6 tokens: lower mask.ratio"),
        ({"ratio": 1e-17}, r"mask ratio 1e-17 leaves no target on a frame of 6x6 tokens: raise mask.ratio"),
        ({"crop_size": 16, "ratio": 0.5}, "this one has a single one: raise data.crop"),
        ({"ratio": 0.0}, "mask ratio must be above 0 and below 1, got 0.0"),
        ({"ratio": 1.0}, "mask ratio must be above 0 and below 1, got 1.0"),
        ({"ratio": float("nan")}, "mask ratio must be above 0 and below 1, got nan"),
        ({"crop_size": 8}, "has no token to mask"),
        ({"num_frames": 1}, "has no token to mask"),
    ],
)
def test_a_ratio_that_leaves_a_side_empty_is_refused_at_construction(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**changes)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    slots=st.integers(1, 5),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_settings_are_refused_or_divide_every_clip(rows, columns, slots, ratio, seed):
    try:
        generator = small(crop_size=(16 * rows, 16 * columns), num_frames=2 * slots, ratio=ratio, seed=seed)
    except ValueError:
        return
    context, target = generator.draw(0, range(3))
    assert min(context.shape[1], target.shape[1]) > 0
    for seen, rest in zip(context.tolist(), target.tolist()):
        assert sorted(seen + rest) == list(range(rows * columns * slots))


# The collator


def test_a_collator_draws_one_pair_of_sets_an_entry_each_with_its_own_number():
    collate = RandomTubeMaskCollator([{"ratio": 0.5}, {"ratio": 0.5}], 96, 8, 16, 2, seed=3)
    batch, context, target = collate([torch.zeros(2)] * 3, step=5, slots=[8, 9, 10])
    assert batch.shape == (3, 2)
    for number in (0, 1):
        want = small(ratio=0.5, seed=3, set_number=number).draw(5, [8, 9, 10])
        assert torch.equal(context[number], want[0])
        assert torch.equal(target[number], want[1])
    assert not torch.equal(context[0], context[1])


def test_sizes_of_the_collator_reach_the_grid():
    collate = RandomTubeMaskCollator([{"ratio": 0.5}], (96, 64), 12, (16, 8), 3)
    assert collate.generators[0].grid == (4, 6, 8)


def test_an_unknown_key_and_an_empty_list_are_refused():
    with pytest.raises(ValueError, match=r"unknown mask setting 'num_blocks', expected one of ratio"):
        RandomTubeMaskCollator([{"ratio": 0.9, "num_blocks": 2}])
    with pytest.raises(ValueError, match="at least one mask set is needed"):
        RandomTubeMaskCollator([])
