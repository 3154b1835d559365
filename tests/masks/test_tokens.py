"""Mask sets as data: ragged sets, runs of equal lengths, gathering, and the collators."""

import pytest
import torch
from torch.utils.data import DataLoader

from fastjepa.masks import (
    DefaultCollator,
    MaskCollator,
    MultiBlockMaskGenerator,
    Ragged,
    apply_masks,
    repeat_clips,
    split_runs,
)

ENTRY = {"num_blocks": 3, "spatial_scale": (0.2, 0.4), "temporal_scale": (0.5, 1.0), "aspect_ratio": (0.75, 1.5)}


def numbers(count):
    return torch.arange(count)


# Ragged


@pytest.mark.parametrize("index", [numbers(4), numbers(6), numbers(5).view(1, 5)])
def test_a_ragged_set_refuses_an_index_that_does_not_fit_its_lengths(index):
    with pytest.raises(ValueError, match=r"lengths \(2, 3\) does not fit"):
        Ragged(index, (2, 3))


def test_a_ragged_set_moves_its_index_and_keeps_its_lengths():
    moved = Ragged(numbers(5), (2, 3)).to("meta")
    assert moved.index.device.type == "meta"
    assert moved.lengths == (2, 3)


def test_runs_are_neighbouring_clips_of_equal_length():
    runs = list(Ragged(numbers(12), (2, 2, 3, 3, 2)).runs())
    assert [rows for rows, _ in runs] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [dense.tolist() for _, dense in runs] == [[[0, 1], [2, 3]], [[4, 5, 6], [7, 8, 9]], [[10, 11]]]


# repeat_clips


def test_the_clips_of_a_video_are_neighbours_with_its_tokens():
    dense = numbers(6).view(3, 2)
    assert repeat_clips(dense, 2).tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    ragged = repeat_clips(Ragged(numbers(6) + 7, (3, 0, 1, 2)), 3)
    assert ragged.lengths == (3, 3, 3, 0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert ragged.index.tolist() == [7, 8, 9] * 3 + [10] * 3 + [11, 12] * 3
    assert ragged.index.dtype == torch.int64
    for token_set in (dense, ragged):
        assert repeat_clips(token_set, 1) is token_set


def test_repeated_sets_of_equal_lengths_stay_one_run():
    runs = list(repeat_clips(Ragged(numbers(10), (2, 2, 3, 3)), 2).runs())
    assert [rows for rows, _ in runs] == [slice(0, 4), slice(4, 8)]


# split_runs


def test_a_batch_is_cut_where_the_length_of_any_set_changes():
    context, target = Ragged(numbers(8), (2, 2, 2, 2)), Ragged(numbers(10), (3, 3, 3, 1))
    third = Ragged(numbers(7), (1, 2, 2, 2))
    cuts = list(split_runs([context, target, third]))
    assert [rows for rows, _ in cuts] == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert [tuple(dense.shape) for _, dense in [cuts[1]] for dense in dense] == [(2, 2), (2, 3), (2, 2)]
    assert [dense.tolist() for dense in cuts[1][1]] == [[[2, 3], [4, 5]], [[3, 4, 5], [6, 7, 8]], [[1, 2], [3, 4]]]


def test_dense_sets_are_one_run_and_follow_the_cuts_of_ragged_ones():
    dense = numbers(6).view(3, 2)
    ((rows, (whole,)),) = split_runs([dense])
    assert rows == slice(0, 3)
    assert torch.equal(whole, dense)
    cuts = list(split_runs([dense, Ragged(numbers(5), (1, 2, 2))]))
    assert [part[0].tolist() for _, part in cuts] == [[[0, 1]], [[2, 3], [4, 5]]]


def test_sets_of_different_numbers_of_clips_are_refused():
    with pytest.raises(ValueError, match=r"different numbers of clips: \[2, 3\]"):
        list(split_runs([numbers(6).view(3, 2), Ragged(numbers(5), (2, 3))]))


# apply_masks


def test_a_mask_keeps_the_named_tokens_of_each_clip_in_its_order():
    x = torch.randn(2, 5, 3)
    kept = apply_masks(x, torch.tensor([[4, 0], [1, 2]]))
    assert torch.equal(kept, torch.stack([x[0, [4, 0]], x[1, [1, 2]]]))


def test_a_list_of_masks_is_concatenated_set_after_set():
    x = torch.randn(2, 5, 3)
    masks = [torch.tensor([[4, 0], [1, 2]]), torch.tensor([[0, 1], [3, 3]])]
    assert torch.equal(apply_masks(x, masks), torch.cat([apply_masks(x, mask) for mask in masks]))


def test_unequal_masks_are_a_list_or_refused():
    x = torch.randn(2, 5, 3)
    masks = [torch.tensor([[4, 0], [1, 2]]), torch.tensor([[3], [2]])]
    separate = apply_masks(x, masks, concat=False)
    assert [tuple(part.shape) for part in separate] == [(2, 2, 3), (2, 1, 3)]
    assert torch.equal(separate[1], x[[0, 1], [3, 2]].unsqueeze(1))
    with pytest.raises(ValueError, match=r"different numbers of tokens \[2, 1\]: use forward_sets"):
        apply_masks(x, masks)


# Collators


def collator(**changes):
    return MaskCollator([ENTRY, {**ENTRY, "num_blocks": 1}], **{"crop_size": 96, "num_frames": 8, **changes})


def test_the_default_collator_batches_and_draws_no_masks():
    batch, context, target = DefaultCollator()([(torch.zeros(3), 1), (torch.ones(3), 2)])
    assert torch.equal(batch[0], torch.tensor([[0.0] * 3, [1.0] * 3]))
    assert batch[1].tolist() == [1, 2]
    assert context is None
    assert target is None


def test_a_collator_draws_one_pair_of_sets_an_entry_each_with_its_own_number():
    collate = collator()
    batch, context, target = collate([torch.zeros(2)] * 3, step=5, slots=[8, 9, 10])
    assert batch.shape == (3, 2)
    for number, entry in enumerate([3, 1]):
        generator = MultiBlockMaskGenerator(
            96, 8, spatial_pred_mask_scale=(0.2, 0.4), temporal_pred_mask_scale=(0.5, 1.0), aspect_ratio=(0.75, 1.5),
            npred=entry, set_number=number,
        )  # fmt: skip
        want = generator.draw(5, [8, 9, 10])
        assert torch.equal(context[number], want[0])
        assert torch.equal(target[number], want[1])


def test_a_collator_without_a_step_counts_its_calls_and_clips():
    counting, told = collator(), collator()
    for step, slots in [(0, [0, 1]), (1, [2, 3, 4]), (2, [5])]:
        _, *got = counting([0] * len(slots))
        _, *want = told([0] * len(slots), step=step, slots=slots)
        for side in (0, 1):
            assert all(torch.equal(a, b) for a, b in zip(got[side], want[side]))


def test_a_collator_works_in_a_data_loader():
    loader = DataLoader([torch.full((2,), float(i)) for i in range(4)], batch_size=2, collate_fn=collator())
    batches = list(loader)
    assert [batch[0][:, 0].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert not torch.equal(batches[0][1][0][0][:5], batches[1][1][0][0][:5])


def test_settings_of_an_entry_and_of_the_collator_reach_the_generators():
    entry = {**ENTRY, "max_temporal_keep": 0.5, "max_keep": 4}
    generator = MaskCollator([entry], 96, 8, seed=3, truncation="random", group=2).generators[0]
    assert generator.max_context_duration == 2
    assert (generator.max_keep, generator.seed, generator.truncation, generator.group) == (4, 3, "random", 2)
    assert (generator.npred, generator.spatial_scale, generator.temporal_scale) == (3, (0.2, 0.4), (0.5, 1.0))


@pytest.mark.parametrize(
    ("crop", "patch", "grid"),
    [(96, 16, (4, 6, 6)), ((96, 128), 16, (4, 6, 8)), (96, (16, 8), (4, 6, 12)), ([96, 64], [8, 16], (4, 12, 4))],
)
def test_sizes_may_be_numbers_or_pairs(crop, patch, grid):
    assert collator(crop_size=crop, patch_size=patch).generators[0].grid == grid


def test_an_unknown_key_and_an_empty_list_are_refused():
    with pytest.raises(ValueError, match=r"unknown mask setting 'spatial_scal', expected one of spatial_scale, "):
        MaskCollator([{**ENTRY, "spatial_scal": (0.1, 0.1)}])
    with pytest.raises(ValueError, match="at least one mask set is needed"):
        MaskCollator([])
