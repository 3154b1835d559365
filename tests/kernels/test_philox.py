"""Row keys, Philox and its normal numbers: published vectors, statistics with fixed seeds, no repeats.

Limits of the statistics are five standard deviations of what a fair source would show, or six where many are looked at:
a fair source passes with near certainty, and the seeds are fixed.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, library

from fastjepa_kernels import philox_normal, row_keys
from fastjepa_kernels.reference.philox import normals, philox, philox_words

PUBLISHED = [  # counter, key, words: known answers of Random123
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
FACTORS, STEPS, MASK = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 2**32 - 1


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def by_hand(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox in Python's integers."""
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0, k1 = ((k + turn * step) & MASK for k, step in zip(key, STEPS))
        left, right = c0 * FACTORS[0], c2 * FACTORS[1]
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & MASK, (left >> 32) ^ c3 ^ k1, left & MASK
    return c0, c1, c2, c3


def back_by_hand(words: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The counter that gave these words: every round can be undone, since the factors are odd."""
    c0, c1, c2, c3 = words
    for turn in reversed(range(10)):
        k0, k1 = ((k + turn * step) & MASK for k, step in zip(key, STEPS))
        first, third = (w * pow(f, -1, 2**32) & MASK for w, f in zip((c3, c1), FACTORS))
        c0, c1, c2, c3 = (
            first,
            (third * FACTORS[1] >> 32) ^ c0 ^ k0,
            third,
            (first * FACTORS[0] >> 32) ^ c2 ^ k1,
        )
    return c0, c1, c2, c3


def seed(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


@pytest.fixture(scope="module")
def sample() -> Tensor:
    """[slot 16, set 4, token 256, channel 128]: two million numbers of one seed."""
    slot, number, token = torch.meshgrid(torch.arange(16), torch.arange(4), torch.arange(256), indexing="ij")
    return philox_normal(row_keys(slot, token, number), 128, 7).double()


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_words_are_the_published_ones(counter: str, key: str, words: str) -> None:
    given = [tuple(torch.tensor(n) for n in numbers(text)) for text in (counter, key)]
    assert tuple(int(word) for word in philox(*given)) == numbers(words)
    assert by_hand(numbers(counter), numbers(key)) == numbers(words)


def test_counter_and_key_hold_every_bit_of_group_row_and_seed() -> None:
    keys = [0, 1, 2**31, 2**32, 2**32 + 1, 2**62 + 5, 2**63 - 1, -1, -(2**63)]
    for start in (0, 5, 2**31, 2**32 + 7, 2**63 - 1, -3):
        words = philox_words(torch.tensor(keys), 11, seed(start))
        assert words.shape == (len(keys), 3, 4)
        for row, key in zip(words.tolist(), keys):
            for group, four in enumerate(row):
                counter = (group, 0, key & MASK, key >> 32 & MASK)
                assert tuple(four) == by_hand(counter, (start & MASK, start >> 32 & MASK))


def test_words_lead_back_to_the_counter_so_nothing_can_repeat() -> None:
    keys = torch.randint(0, 2**63 - 1, (50,), generator=torch.Generator().manual_seed(0))
    words = philox_words(keys, 40, seed(2**40 + 3))
    for row, key in zip(words.tolist(), keys.tolist()):
        for group, four in enumerate(row):
            assert back_by_hand(tuple(four), (3, 2**8)) == (group, 0, key & MASK, key >> 32)


def test_no_block_of_words_repeats_in_a_large_sample() -> None:
    """More than a million blocks, near one another and 2 ** 32 and more apart. Two fair halves would meet with 3e-8."""
    near = torch.arange(2**12)
    keys = torch.cat([near + far for far in (0, 2**20, 2**31, 2**32, 2**40, 2**62, 2**63 - 2**12)])
    words = torch.cat([philox_words(keys, 4 * 13, seed(start)) for start in (0, 1, 2**32)]).flatten(0, 1)
    assert len(words) > 2**20
    for half in (words[:, :2], words[:, 2:]):
        assert len(torch.unique((half[:, 0] << 32) | half[:, 1])) == len(words)


def test_every_bit_of_the_input_moves_half_of_the_output() -> None:
    """Of 128 bits 64 +- 5.7 change; a mean of 64 blocks is within 5 * 5.7 / 8 of it."""
    keys = torch.randint(0, 2**63 - 1, (64,), generator=torch.Generator().manual_seed(1))
    start, bits = 0x123456789ABCDEF, torch.arange(32)

    def changed(a: Tensor, b: Tensor) -> float:
        return ((a ^ b).unsqueeze(-1) >> bits & 1).sum(dim=(-2, -1)).double().mean().item()

    plain = philox_words(keys, 4 * 9, seed(start))
    first = plain[:, 0]
    for bit in range(63):
        assert abs(changed(first, philox_words(keys ^ (1 << bit), 4, seed(start))[:, 0]) - 64) < 3.6, bit
        assert abs(changed(first, philox_words(keys, 4, seed(start ^ (1 << bit)))[:, 0]) - 64) < 3.6, bit
    for group in (1, 2, 4, 8):
        assert abs(changed(first, plain[:, group]) - 64) < 3.6, group


def test_every_bit_of_the_words_is_fair(sample: Tensor) -> None:
    words = philox_words(torch.arange(2**14), 32, seed(3)).flatten(0, 1)
    for bit in range(32):
        share = (words >> bit & 1).double().mean(0)
        assert ((share - 0.5).abs() < 5 * 0.5 / math.sqrt(len(words))).all()


def test_normals_are_box_muller_of_the_words_and_never_infinite() -> None:
    extreme = [0, 1, 2, 255, 2**24, 2**29, 2**30, 2**31 - 1, 2**31, 2**31 + 2**30, 2**32 - 2**9, MASK]
    words = torch.tensor([[a, b, b, a] for a in extreme for b in extreme])
    for (w0, w1, w2, w3), got in zip(words.tolist(), normals(words).tolist()):
        for (first, second), pair in (((w0, w1), got[:2]), ((w2, w3), got[2:])):
            radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
            turn = 2 * math.pi * (second + 0.5) / 2**32
            # The uniform number is rounded to float32, which shows where it is nearly 1.
            assert pair == pytest.approx(
                [radius * math.cos(turn), radius * math.sin(turn)], abs=2e-6 + 4e-4 * (first > 2**31)
            )
    farthest = normals(words).abs().max()
    assert 6.7 < farthest < 6.77


def test_moments_are_those_of_the_normal_distribution(sample: Tensor) -> None:
    z, n = sample.flatten(), sample.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - expected) < 5 * math.sqrt(variance / n), power


def test_the_distribution_function_is_that_of_the_normal_distribution(sample: Tensor) -> None:
    """Kolmogorov-Smirnov: a fair sample is farther than 2.7 / sqrt(n) once in a million."""
    z, n = sample.flatten().sort().values, sample.numel()
    expected = torch.special.ndtr(z)
    rank = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((rank[1:] - expected).abs().max(), (expected - rank[:-1]).abs().max())
    assert distance < 2.7 / math.sqrt(n)


@pytest.mark.parametrize("far", [2.0, 3.0, 4.0])
def test_both_tails_are_as_heavy_as_they_should_be(sample: Tensor, far: float) -> None:
    n = sample.numel()
    expected = n * math.erfc(far / math.sqrt(2)) / 2
    for tail in (sample > far, sample < -far):
        assert abs(tail.sum().item() - expected) < 5 * math.sqrt(expected)


def test_each_of_the_four_channels_of_a_group_is_normal(sample: Tensor) -> None:
    for channel in range(4):
        z = sample[..., channel::4].flatten()
        for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs((z**power).mean().item() - expected) < 5 * math.sqrt(variance / z.numel()), (channel, power)


def correlation(a: Tensor, b: Tensor) -> float:
    """Of numbers of mean 0 and variance 1, in standard deviations of a fair sample."""
    return abs((a * b).mean().item()) * math.sqrt(a.numel())


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_neighbouring_slots_sets_tokens_and_channels_are_independent(sample: Tensor, axis: int, lag: int) -> None:
    """Values and their squares: a radius shared by the two of a pair would show in the squares."""
    length = sample.shape[axis] - lag
    a, b = sample.narrow(axis, 0, length), sample.narrow(axis, lag, length)
    assert correlation(a, b) < 5
    assert correlation((a**2 - 1) / math.sqrt(2), (b**2 - 1) / math.sqrt(2)) < 5


def test_all_pairs_of_channels_are_uncorrelated(sample: Tensor) -> None:
    rows = sample.flatten(0, -2)
    matrix = (rows.T @ rows / math.sqrt(len(rows))).abs()
    matrix.fill_diagonal_(0)
    assert matrix.max() < 6


def test_seeds_and_far_rows_are_independent() -> None:
    keys = torch.arange(2**12)
    draws = [philox_normal(keys, 32, start).double() for start in (0, 1, 2, 2**32, 2**32 + 1, 2**62)]
    draws += [philox_normal(keys + far, 32, 0).double() for far in (2**20, 2**32, 2**33, 2**62)]
    for n, one in enumerate(draws):
        for other in draws[:n]:
            assert not torch.equal(one, other)
            assert correlation(one, other) < 6


def test_a_row_has_its_numbers_in_any_order_shape_batch_and_width() -> None:
    keys = row_keys(torch.arange(5)[:, None], torch.arange(9), 2)
    whole = philox_normal(keys, 37, 11)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(0))
    assert philox_normal(keys.flatten()[order], 37, 11).equal(whole.flatten(0, 1)[order])
    for clip, row in zip(keys, whole):
        assert philox_normal(clip, 37, seed(11)).equal(row)
    for width in (1, 3, 4, 30, 64):
        shared = min(37, width)
        assert philox_normal(keys, width, 11)[..., :shared].equal(whole[..., :shared])
    assert philox_normal(keys[0, 0], 37, 11).equal(whole[0, 0])
    assert philox_normal(keys[:0], 37, 11).shape == (0, 9, 37)
    assert philox_normal(keys.T, 37, 11).is_contiguous()


def test_row_keys_are_one_to_one_and_hold_the_largest_numbers() -> None:
    slots = torch.tensor([0, 1, 2, 2**20, 2**34, 2**35 - 1])[:, None, None]
    tokens = torch.tensor([0, 1, 255, 2**19, 2**20 - 1])[:, None]
    sets = torch.tensor([0, 1, 255])
    keys = row_keys(slots, tokens, sets)
    assert keys.shape == (6, 5, 3)
    assert keys.dtype == torch.int64
    assert (keys >= 0).all()
    assert len(keys.unique()) == keys.numel()
    for s, t, m in ((0, 0, 0), (5, 4, 2), (3, 1, 1)):
        number = row_keys(slots[s].item(), tokens[t].item(), sets[m].item())
        assert number.shape == ()
        assert number == keys[s, t, m]
    assert torch.equal(row_keys(3, tokens.int(), 1), row_keys(torch.tensor(3), tokens, torch.tensor(1)))
    ordered = [
        row_keys(*each).item() for each in ((0, 2**20 - 1, 255), (1, 0, 0), (1, 0, 1), (2**35 - 1, 2**20 - 1, 255))
    ]
    assert all(a < b for a, b in pairwise(ordered))
    assert ordered[-1] == 2**63 - 1


@pytest.mark.parametrize("name", ["philox_normal", "philox_normal_reference"])
def test_torch_accepts_the_operator(name: str) -> None:
    run = getattr(torch.ops.fastjepa, name).default
    for keys in (torch.arange(6).view(2, 3), torch.arange(6).view(2, 3).T, torch.tensor(5), torch.arange(0)):
        library.opcheck(run, (keys, 7, seed(3)))


def test_compiles_whole_with_few_recompiles_over_many_lengths() -> None:
    torch._dynamo.reset()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    def draw(slots: Tensor, tokens: Tensor, start: Tensor) -> Tensor:
        return philox_normal(row_keys(slots[:, None], tokens, 1), 24, start)

    compiled = torch.compile(draw, fullgraph=True, backend=backend)
    for length in range(2, 22):
        given = torch.arange(2), torch.arange(2 * length).view(2, length), seed(length)
        assert compiled(*given).equal(draw(*given))
    assert len(frames) <= 2
    torch._dynamo.reset()


KEYS = torch.arange(4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: row_keys(2**35, 0), r"slot must be from 0 to 2 \*\* 35 - 1, got 34359738368"),
        (lambda: row_keys(-1, 0), "slot must be from 0"),
        (lambda: row_keys(0, 2**20), "token must be from 0"),
        (lambda: row_keys(KEYS, KEYS, 256), "mask_set must be from 0"),
        (lambda: row_keys(KEYS.double(), 0), "slot must be int32 or int64, got torch.float64"),
        (lambda: row_keys(0, KEYS.bool()), "token must be int32 or int64"),
        (lambda: philox_normal(KEYS.int(), 4, 0), "row_key must be int64"),
        (lambda: philox_normal(KEYS, 0, 0), "width must be at least 1"),
        (lambda: philox_normal(KEYS, 4, -1), "seed must be from 0"),
        (lambda: philox_normal(KEYS, 4, 2**63), "seed must be from 0"),
        (lambda: philox_normal(KEYS, 4, KEYS), "seed must be an int64 tensor of no dims"),
        (lambda: philox_normal(KEYS, 4, seed(0).int()), "seed must be an int64 tensor of no dims"),
        (lambda: philox_normal(KEYS, 4, seed(0).to("meta")), "on cpu"),
        (lambda: philox_normal(KEYS, 4, 0, impl="triton"), "CUDA device"),
        (lambda: philox_normal(KEYS, 4, 0, impl="fast"), "impl must be one of"),
    ],
)
def test_mistakes_are_sentences(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
