"""Which video comes at which slot: passes, mixtures, shards, ranks."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.data.loader import SlotBatches
from fastjepa.data.order import BLOCK, Collection, VideoOrder
from fastjepa.streams import Purpose, stream


def collection(first, count, weight=1.0, per_shard=None):
    shards = None if per_shard is None else np.arange(count) // per_shard
    return Collection(np.arange(first, first + count), weight, shards)


def drawn(order, slots):
    return [order.video(slot) for slot in slots]


def test_one_collection_comes_in_the_permutations_that_runs_before_mixtures_had():
    order = VideoOrder(7, [collection(0, 50)])
    passes = [stream(7, Purpose.PERMUTATION, number).permutation(np.arange(50)) for number in range(3)]
    assert drawn(order, range(150)) == np.concatenate(passes).tolist()
    assert order.replacement(4, 2) == stream(7, Purpose.REPLACEMENT, 4, 2).choice(np.arange(50))
    assert order.all_replacements(4, 2) == stream(7, Purpose.REPLACEMENT, 4, 2).permutation(np.arange(50)).tolist()


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=8), st.booleans(), st.integers(0, 2**60))
@settings(deadline=None)
def test_a_draw_depends_on_seed_and_slot_alone(slots, replacement, seed):
    parts = [collection(0, 9), collection(9, 5, 2.5, per_shard=2), collection(14, 1, 0.1)]
    used = VideoOrder(seed, parts, replacement=replacement, window=3)
    for slot in slots:
        fresh = VideoOrder(seed, parts, replacement=replacement, window=3)
        assert used.video(slot) == fresh.video(slot)
        assert used.replacement(slot, 3) == fresh.replacement(slot, 3)
        assert used.all_replacements(slot, 3) == fresh.all_replacements(slot, 3)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (5, 0.01), (1 / 3, 1 / 7, 1 / 9, 2)])
def test_collections_come_as_often_as_their_weights_say(weights, replacement):
    parts = [collection(100 * k, 40 + k, weight) for k, weight in enumerate(weights)]
    order = VideoOrder(3, parts, replacement=replacement)
    count = 20_000
    found = Counter(video // 100 for video in drawn(order, range(count)))
    for k, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(found[k] - count * p) <= 4 * (count * p * (1 - p)) ** 0.5


def test_without_replacement_shares_are_exact_in_every_block_and_each_collection_takes_all_its_videos_in_turn():
    order = VideoOrder(1, [collection(0, 300, 0.25), collection(1000, 7, 0.75)])
    first = drawn(order, range(BLOCK))
    assert Counter(video >= 1000 for video in first) == {False: BLOCK // 4, True: 3 * BLOCK // 4}
    # The next block goes on where this one ended, also for one who starts there.
    there = VideoOrder(1, [collection(0, 300, 0.25), collection(1000, 7, 0.75)])
    more = first[-2000:] + drawn(there, range(BLOCK, BLOCK + 2000))
    assert more[2000:] == drawn(order, range(BLOCK, BLOCK + 2000))
    for low, count in ((0, 300), (1000, 7)):
        own = [video for video in first + more[2000:] if (video >= 1000) == (low == 1000)]
        for start in range(0, len(own) - count, count):
            assert len(set(own[start : start + count])) == count


def test_a_block_has_as_many_slots_as_it_says_however_small_a_weight_is():
    order = VideoOrder(1, [collection(0, 9), collection(9, 9, 1e-9), collection(18, 9, 1e-9)])
    assert order.shares.tolist() == [BLOCK - 2, 1, 1]


def test_equal_collections_have_orders_of_their_own():
    order = VideoOrder(1, [collection(0, 30), collection(100, 30)])
    drawn_in_turn = drawn(order, range(200))
    first, second = ([v % 100 for v in drawn_in_turn if (v >= 100) == later][:30] for later in (False, True))
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second


def test_with_replacement_videos_come_by_chance():
    order = VideoOrder(1, [collection(0, 100)], replacement=True)
    seen = Counter(drawn(order, range(1000)))
    assert len(set(drawn(order, range(100)))) < 80, "a permutation would show a hundred"
    assert max(seen.values()) < 30


def test_a_replacement_is_of_the_same_collection():
    for replacement in (False, True):
        order = VideoOrder(1, [collection(0, 10), collection(100, 10)], replacement=replacement)
        for slot in range(200):
            mine = order.video(slot) >= 100
            assert all((order.replacement(slot, attempt) >= 100) == mine for attempt in range(5))
            every = order.all_replacements(slot, 16)
            assert sorted(every) == [*range(10), *range(100, 110)]
            assert all((video >= 100) == mine for video in every[:10])


def test_shards_are_read_one_after_another_and_shuffled_inside_a_window():
    order = VideoOrder(5, [collection(0, 120, per_shard=12)], window=24)
    first, second = drawn(order, range(120)), drawn(order, range(120, 240))
    assert sorted(first) == sorted(second) == list(range(120))
    windows = [{video // 12 for video in first[start : start + 24]} for start in range(0, 120, 24)]
    assert all(len(shards) == 2 for shards in windows), "a window of two shards reads two"
    assert len(set.union(*windows)) == 10
    assert len({video // 12 for video in first[:12]}) == 2, "its videos are mixed"
    again = [{video // 12 for video in second[start : start + 24]} for start in range(0, 120, 24)]
    assert windows != again, "shards come in another order"
    assert windows != [{2 * n, 2 * n + 1} for n in range(5)]


def test_a_window_of_one_reads_shards_in_the_order_of_their_archive():
    first = drawn(VideoOrder(5, [collection(0, 30, per_shard=10)], window=1), range(30))
    assert all(first[start : start + 10] == list(range(first[start], first[start] + 10)) for start in (0, 10, 20))


@pytest.mark.parametrize("parts", [[], [collection(0, 0)], [collection(0, 3, 0.0)], [collection(0, 3, float("nan"))]])
def test_an_order_of_nothing_is_refused(parts):
    with pytest.raises(ValueError, match="needs collections with videos"):
        VideoOrder(0, parts)


# -- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [2, 4])
def test_ranks_take_disjoint_parts_of_every_step_and_leave_nothing_out(world, batch_size):
    of_ranks = [list(SlotBatches(3, 6, 16, batch_size, rank, world)) for rank in range(world)]
    assert all(len(batches) == len(SlotBatches(3, 6, 16, batch_size, 0, world)) for batches in of_ranks)
    for step in range(3):
        parts = 16 // world // batch_size
        slots = [slot for batches in of_ranks for batch in batches[step * parts : (step + 1) * parts] for slot in batch]
        assert slots == list(range(16 * (step + 3), 16 * (step + 4)))


@pytest.mark.parametrize("wrong", [(16, 4, 0, 3), (16, 8, 0, 4), (16, 4, 2, 2), (16, 4, -1, 2)])
def test_a_step_that_cannot_be_divided_is_refused(wrong):
    with pytest.raises(ValueError, match="cannot be divided"):
        SlotBatches(0, 1, *wrong)
