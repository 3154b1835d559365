"""Parity cases 08: mask rules. Our positions come from other random streams, so recorded ones are handed to our rules.

The first test of each part hands the recorded random numbers in and compares token for token; the others compare what
our own streams draw with the recorded statistics.
"""

import numpy as np
import pytest
import torch

from fastjepa.masks import MaskCollator, RandomTubeMaskCollator
from fastjepa.masks.random_tube import tube_tokens

# Multi-block masks, 08_mask_exact


def recorded_corners(generator, random):
    """Corners of a clip from the recorded stream: block after block, top, left, start."""

    def draw(block, _):
        bt, bh, bw = block
        room = (generator.height - bh + 1, generator.width - bw + 1, generator.duration - bt + 1)
        return np.array(
            [[torch.randint(0, n, (1,), generator=random).item() for n in room] for _ in range(generator.npred)]
        )

    return draw


def collator_of(case, **changes):
    c = case.info["constructor"]
    return MaskCollator(c["mask"], c["crop_size"], c["num_frames"], c["patch_size"], c["tubelet_size"], **changes)


def batches_of(case):
    return range(1 + max(int(name[len("batch")]) for name in case.tensors))


def test_recorded_positions_give_the_recorded_masks_token_for_token(case):
    exact = case("08_mask_exact")
    collator = collator_of(exact)
    random = torch.Generator().manual_seed(exact.info["seeds"]["torch_global_seed"])
    for generator in collator.generators:
        generator.draw_corners = recorded_corners(generator, random)
    compared = 0
    for batch in batches_of(exact):
        context, target = collator.draw(batch, range(exact.info["constructor"]["batch"]))
        for number in range(len(collator.generators)):
            for name, got in (("mask_enc", context[number]), ("mask_pred", target[number])):
                want = exact.tensors[f"batch{batch}.set{number}.{name}"]
                assert got.dtype == want.dtype
                assert torch.equal(got, want), (batch, number, name)
                compared += 1
    assert compared == len(exact.tensors)


def invariants(context, target, tokens):
    """What holds for every pair of cut mask sets, of whatever stream."""
    assert len(context) == len(target)
    for seen, rest in zip(context.tolist(), target.tolist()):
        assert seen == sorted(set(seen))
        assert rest == sorted(set(rest))
        assert not set(seen) & set(rest)
        assert 0 <= min(seen + rest) <= max(seen + rest) < tokens


def test_recorded_masks_and_ours_keep_the_same_invariants(case):
    exact = case("08_mask_exact")
    collator = collator_of(exact, seed=1)
    for batch in batches_of(exact):
        own = list(zip(*collator.draw(batch, range(4))))
        for number, generator in enumerate(collator.generators):
            recorded = [exact.tensors[f"batch{batch}.set{number}.{side}"] for side in ("mask_enc", "mask_pred")]
            for context, target in (recorded, own[number]):
                invariants(context, target, np.prod(generator.grid))


# Multi-block masks, 08_mask_statistics. Its block sizes are compared in tests/masks/test_multiblock.py.

STATISTICS = ["vit224_b24", "options", "vit384_b10", "vit384_b24"]


def watched(generator):
    """The list that every (context, target) of the generator goes to as it is placed."""
    placed, place = [], generator.place

    def place_and_tell(*arguments):
        placed.append(place(*arguments))
        return placed[-1]

    generator.place = place_and_tell
    return placed


@pytest.mark.parametrize("name", STATISTICS)
def test_counts_of_our_masks_agree_with_the_recorded_ones(case, name):
    """Over the recorded batches, which have the same block sizes, within the four standard errors of the case."""
    facts = case("08_mask_statistics").info["summary"][name]
    size, tokens = facts["batch"], facts["tokens"]
    collator = MaskCollator(facts["mask_cfg"], facts["crop"], facts["frames"], 16, seed=11)
    for number, (recorded, generator) in enumerate(zip(facts["sets"], collator.generators)):
        counts = {key: [] for key, value in recorded.items() if isinstance(value, dict) and "mean" in value}
        assert len(counts) == 6
        placed, redraws = watched(generator), 0
        for step in range(facts["batches"]):
            placed.clear()
            context, target = (side.shape[1] for side in generator.draw(step, range(size * step, size * step + size)))
            before = [pair for pair in placed if len(pair[0])]
            redraws += len(placed) - len(before)
            counts["ctx_before"] += [len(seen) for seen, _ in before]
            counts["tgt_before"] += [len(rest) for _, rest in before]
            counts["ctx_after"].append(context)
            counts["tgt_after"].append(target)
            counts["predictor_sequence_after"].append(context + target)
            counts["covered_by_neither_after"].append(tokens - context - target)
        for key, values in counts.items():
            error = np.std(values) / len(values) ** 0.5
            difference = abs(np.mean(values) - recorded[key]["mean"])
            assert difference <= 4 * (error**2 + recorded[key]["se"] ** 2) ** 0.5, (number, key, np.mean(values))
        again = recorded["redraws_for_empty_context"]
        assert abs(redraws - again) <= 4 * (redraws + again) ** 0.5, (number, redraws)


# Random tubes, 08_mask_random_tube

TUBES = range(4)


def tube_of(case, number):
    """(description of a configuration, our generator for it, its tensors)."""
    tubes = case("08_mask_random_tube")
    c = tubes.info["calls"][number]
    collator = RandomTubeMaskCollator([{"ratio": c["ratio"]}], c["crop_size"], c["num_frames"], 16, 2, seed=21)
    return c, collator.generators[0], tubes.group(c["prefix"])


def recorded_cells(case, number):
    """The cells of all recorded clips, bool [batches, B, cells], from the recorded stream.

    Its seed grows by one with the number of the configuration, which the case does not say.
    """
    c, generator, _ = tube_of(case, number)
    seed = case("08_mask_random_tube").info["seeds"]["numpy_global_seed"] + number
    random, clips = np.random.RandomState(seed), []
    for _ in range(c["batches"] * c["batch"]):
        kept = np.concatenate([np.zeros(generator.cells - generator.keep), np.ones(generator.keep)])
        random.shuffle(kept)
        clips.append(kept.astype(bool))
    return np.reshape(clips, (c["batches"], c["batch"], -1))


@pytest.mark.parametrize("number", TUBES)
def test_recorded_cells_give_the_recorded_tubes_token_for_token(case, number):
    _, generator, tensors = tube_of(case, number)
    cells = recorded_cells(case, number)
    assert cells.sum(axis=(0, 1)).tolist() == tensors["spatial_keep_frequency"].tolist()
    assert ("mask_enc" in tensors) == (number in (0, 3))
    if "mask_enc" in tensors:
        for name, chosen in (("mask_enc", cells[0]), ("mask_pred", ~cells[0])):
            got = tube_tokens(chosen, generator.grid[0])
            assert got.dtype == tensors[name].dtype
            assert torch.equal(got, tensors[name])


@pytest.mark.parametrize("number", TUBES)
def test_our_tubes_have_the_recorded_counts_and_frequencies(case, number):
    c, generator, tensors = tube_of(case, number)
    clips = c["batches"] * c["batch"]
    context, target = generator.draw(0, range(clips))
    assert tensors["counts"].tolist() == c["counts"]
    assert [context.shape[1], target.shape[1], context.shape[1] + target.shape[1]] == c["counts"]
    seen = np.bincount(context.ravel() % generator.cells, minlength=generator.cells) / generator.grid[0]
    share = generator.keep / generator.cells
    error = (clips * share * (1 - share)) ** 0.5
    assert (abs(seen - clips * share) <= 4 * error).all()
    assert (abs(seen - tensors["spatial_keep_frequency"].numpy()) <= 4 * 2**0.5 * error).all()


@pytest.mark.parametrize("number", [0, 3])
def test_recorded_tubes_and_ours_have_the_same_structure(case, number):
    _, generator, tensors = tube_of(case, number)
    for context, target in ((tensors["mask_enc"], tensors["mask_pred"]), generator.draw(0, range(8))):
        for seen, rest in zip(context.numpy(), target.numpy()):
            assert sorted([*seen, *rest]) == list(range(np.prod(generator.grid)))
            assert (np.diff(seen) > 0).all()
            assert (np.diff(rest) > 0).all()
            planes = seen.reshape(generator.grid[0], -1)
            assert (planes == planes[0] + generator.cells * np.arange(len(planes))[:, None]).all()


# All of them


def test_every_case_of_masks_is_read_here(case, shared):
    """A case that is added beside the repository must get a test."""
    names = {path.stem for path in (shared / "golden" / "cases").glob("08_*.json")}
    assert names == {"08_mask_exact", "08_mask_statistics", "08_mask_random_tube"}
    configurations = case("08_mask_statistics").info["summary"]
    assert set(configurations) == set(STATISTICS)
