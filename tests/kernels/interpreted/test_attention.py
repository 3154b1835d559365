"""The Triton kernels of indexed attention in the interpreter, against eager PyTorch. float32 and float16 only."""

import math

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import Rope, config, indexed_attention
from fastjepa_kernels._triton import attention as forward
from fastjepa_kernels.reference import attention as reference
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check
from tests.kernels.made import chosen, normal

pytestmark = pytest.mark.usefixtures("results_are_poisoned")

DTYPES = [torch.float32, torch.float16]
HEADS = range(16, 129, 8)


@pytest.fixture(autouse=True)
def _blocks_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and of keys in lengths that the interpreter manages."""
    monkeypatch.setitem(config._forced, "indexed_attention", {"BLOCK_M": 16, "BLOCK_N": 32})


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, K, H, d] each, step by step in the precision of the inputs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def picked(x: Tensor, index: Tensor) -> Tensor:
    return x[torch.arange(len(x)).unsqueeze(1), index]


def both(*inputs: Tensor | None, **named) -> list[Tensor]:
    """The result of the kernel and that of the reference."""
    return [indexed_attention(*inputs, **named, impl=impl) for impl in ("triton", "reference")]


@pytest.mark.parametrize("head", HEADS)
def test_every_head_size_is_as_exact_as_eager(head: int) -> None:
    x = guarded(normal(1, 40, 3, 1, head, dtype=DTYPES[head % 16 == 0]))
    asked, seen = guarded(chosen(1, 7, 40)), guarded(chosen(1, 33, 40, 1))

    def composed(x: Tensor) -> Tensor:
        q, k, v = x.unbind(2)
        return eager(picked(q, asked), picked(k, seen), picked(v, seen))

    check(lambda x: indexed_attention(x, q_index=asked, kv_index=seen), composed, x)
    assert all(intact(t) for t in (x, asked, seen))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 33), (33, 1), (17, 32)])
def test_lengths_of_clips_and_heads_beside_each_other(queries: int, keys: int, dtype: torch.dtype) -> None:
    q, k, v = (guarded(normal(2, n, 2, 24, dtype=dtype, seed=n)) for n in (queries, keys, keys))
    check(lambda *given: indexed_attention(*given), eager, q, k, v)
    assert all(intact(t) for t in (q, k, v))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.nn.functional.pad(x, (0, 3))[..., :-3],
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:, ::2].repeat_interleave(2, 1)[:, ::2],
    ],
    ids=["heads first", "odd strides", "channels apart", "every other row"],
)
def test_strided_inputs(view) -> None:
    parts = [view(normal(2, 6, 2, 24, seed=n)) for n in range(3)]
    torch.testing.assert_close(*both(*parts), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        *both(view(normal(12, 3, 2, 24).view(2, 6, 6, 24)).unflatten(2, (3, 2))), rtol=1e-5, atol=1e-5
    )


def test_ragged_rows_that_take_no_part_may_hold_anything() -> None:
    asked, seen = chosen(2, 5, 12), chosen(2, 9, 12, 1).int()
    q_lengths, kv_lengths = torch.tensor([5, 2]), torch.tensor([0, 7]).int()
    x = torch.full((2, 12, 3, 1, 24), math.nan)
    for clip in range(2):
        x[clip, asked[clip, : q_lengths[clip]], 0] = normal(int(q_lengths[clip]), 1, 24)
        x[clip, seen[clip, : kv_lengths[clip]], 1:] = normal(int(kv_lengths[clip]), 2, 1, 24, seed=1)
        # Padding of an index names no row, and reading there would end the process.
        asked[clip, q_lengths[clip] :] = 2**40
        seen[clip, kv_lengths[clip] :] = 2**30
    named = {"q_index": guarded(asked), "kv_index": guarded(seen), "q_lengths": q_lengths, "kv_lengths": kv_lengths}
    result, expected = both(guarded(x), **named)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert result[0].eq(0).all()
    assert result[1, 2:].eq(0).all()


def test_lengths_without_an_index() -> None:
    x = normal(3, 9, 3, 1, 16)
    lengths = torch.tensor([9, 0, 4])
    torch.testing.assert_close(*both(x, q_lengths=lengths, kv_lengths=lengths.flip(0)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*both(x, kv_index=chosen(3, 0, 9)))


def test_flat_rows() -> None:
    starts = guarded(torch.tensor([0, 17, 17, 20, 21]).int())
    x = guarded(normal(21, 3, 2, 24))
    torch.testing.assert_close(*both(x, cu_seqlens=starts, max_length=17), rtol=1e-5, atol=1e-5)
    assert intact(x)
    assert intact(starts)


def test_log_sum_exp_is_that_of_the_reference() -> None:
    x, lengths, starts = normal(2, 9, 3, 2, 16), torch.tensor([9, 4]), torch.tensor([0, 5, 18]).int()
    none = [None] * 2
    for given in (
        (x, *none, None, None, lengths, None, None, None, None, None, 0),
        (x, *none, None, None, None, lengths * 0, None, None, None, None, 0),
        (x.flatten(0, 1), *none, *none, *none, starts, None, None, None, 13),
    ):
        results = [one(*given, 0.3, [], 1e4, False)[1] for one in (forward.attention, reference.attention)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [24, 32, 64, 80, 88, 104])
def test_rope_and_bias_on_the_way(head: int) -> None:
    x, bias = normal(1, 40, 3, 1, head), guarded(normal(3, 1, head, seed=2))
    named = {"q_index": chosen(1, 3, 40), "kv_index": chosen(1, 17, 40, 1), "qkv_bias": bias}
    for compat in (False, True):
        results = both(x, **named, rope=Rope((2, 5, 4), theta=100.0, compat=compat))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert intact(bias)


@pytest.mark.parametrize("flat", [False, True])
def test_rope_counts_rows_where_there_is_no_index(flat: bool) -> None:
    x, rope = normal(12, 3, 1, 24, dtype=torch.float16), Rope((1, 3, 4), compat=True)
    if flat:
        results = both(x, cu_seqlens=torch.tensor([0, 4, 12]).int(), max_length=8, rope=rope)
    else:
        results = both(x.view(2, 6, 3, 1, 24), kv_index=chosen(2, 4, 6), rope=rope)
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


def test_rope_far_from_the_beginning() -> None:
    """Angles of hundreds of turns, as exact as in float32 PyTorch."""
    x, rope = normal(1, 4, 3, 1, 24) * 3, Rope((3000, 1, 1))
    index = torch.tensor([[0, 1, 2, 3]])
    far = x.new_zeros(1, 2900, 3, 1, 24)
    far[:, -4:] = x
    index = index + 2896
    check(
        lambda x: indexed_attention(x, q_index=index, kv_index=index, rope=rope),
        lambda x: indexed_attention(x, q_index=index, kv_index=index, rope=rope, impl="reference"),
        far,
    )


def test_repeats_bit_by_bit() -> None:
    x = normal(1, 33, 3, 1, 24)
    assert indexed_attention(x).equal(indexed_attention(x))
