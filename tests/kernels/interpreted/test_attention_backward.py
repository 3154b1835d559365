"""The backward kernels of indexed attention in the interpreter, against eager PyTorch. float32 and float16 only."""

import math

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import Rope, config, indexed_attention
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check
from tests.kernels.made import chosen, normal

pytestmark = pytest.mark.usefixtures("results_are_poisoned")


@pytest.fixture(autouse=True)
def _blocks_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and of keys in lengths that the interpreter manages."""
    tiles = {"query": {"BLOCK_M": 32, "BLOCK_N": 16}, "key": {"BLOCK_M": 32, "BLOCK_N": 16}}
    monkeypatch.setitem(config._forced, "indexed_attention", {"BLOCK_M": 32, "BLOCK_N": 32})
    for side, tile in tiles.items():
        monkeypatch.setitem(config._forced, f"indexed_attention_{side}", tile)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, K, H, d] each, step by step in the precision of the inputs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def gradients(run, *inputs: Tensor, seed: int = 7) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    out.backward(normal(*out.shape, seed=seed).to(out.dtype))
    return [x.grad for x in leaves]


def same(*inputs: Tensor, **named) -> None:
    """The gradients of the kernels are those of the reference."""
    ours, theirs = (
        gradients(lambda *given, impl=impl: indexed_attention(*given, **named, impl=impl), *inputs)
        for impl in ("triton", "reference")
    )
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [24, 32, 64, 80, 88, 104, 120])
def test_gradients_of_every_first_class_head_size_are_as_exact_as_eager(head: int) -> None:
    x = guarded(normal(1, 40, 3, 1, head, dtype=torch.float16 if head % 16 else torch.float32))
    asked, seen = guarded(chosen(1, 33, 40)), guarded(chosen(1, 33, 40, 1))

    def composed(x: Tensor) -> Tensor:
        q, k, v = x.unbind(2)
        return eager(q[:, asked[0]], k[:, seen[0]], v[:, seen[0]])

    check(
        lambda x: gradients(lambda x: indexed_attention(x, q_index=asked, kv_index=seen), x)[0],
        lambda x: gradients(composed, x)[0],
        x,
    )
    assert all(intact(t) for t in (x, asked, seen))


@pytest.mark.parametrize(("queries", "keys"), [(1, 33), (33, 1)])
def test_separate_inputs_of_clips_and_heads_beside_each_other(queries: int, keys: int) -> None:
    shapes = (queries, keys, keys)
    inputs = [guarded(normal(2, n, 2, 24, dtype=torch.float16, seed=m)) for m, n in enumerate(shapes)]
    ours, theirs = gradients(indexed_attention, *inputs), gradients(eager, *inputs)
    exact = gradients(eager, *(x.double() for x in inputs))
    # One key has all the attention there is: gradients of query and key are of rounding alone.
    assert keys > 1 or all(x.abs().max() < 0.02 for x in ours[:2])
    for part in range(2 if keys == 1 else 0, 3):

        def reference(x: Tensor, part=part) -> Tensor:
            return (exact if x.dtype == torch.float64 else theirs)[part]

        check(lambda x, part=part: ours[part], reference, inputs[0])
    assert all(intact(t) for t in inputs)


def test_strided_inputs() -> None:
    x = normal(2, 6, 2, 3, 19)[..., :16]
    same(*(x[:, :, :, n] for n in range(3)), kv_index=chosen(2, 4, 6))
    gradient = normal(6, 2, 2, 16)
    results = []
    for impl in ("triton", "reference"):
        leaf = normal(2, 6, 3, 2, 16).requires_grad_()
        indexed_attention(leaf, impl=impl).backward(gradient.transpose(0, 1))
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_ragged_rows_that_take_no_part_may_hold_anything() -> None:
    asked, seen = chosen(2, 5, 12), chosen(2, 9, 12, 1).int()
    q_lengths, kv_lengths = torch.tensor([5, 2]), torch.tensor([0, 7]).int()
    x = torch.full((2, 12, 3, 1, 24), math.nan)
    for clip in range(2):
        x[clip, asked[clip, : q_lengths[clip]], 0] = normal(int(q_lengths[clip]), 1, 24)
        x[clip, seen[clip, : kv_lengths[clip]], 1:] = normal(int(kv_lengths[clip]), 2, 1, 24, seed=1)
        # Padding of an index names no row, and writing there would end the process.
        asked[clip, q_lengths[clip] :] = 2**40
        seen[clip, kv_lengths[clip] :] = 2**30
    upstream = normal(2, 5, 1, 24, seed=2)
    upstream[1, 2:] = math.nan
    results = []
    for impl in ("triton", "reference"):
        leaf, bias = guarded(x).requires_grad_(), normal(3, 1, 24).requires_grad_()
        named = {"q_index": asked, "kv_index": seen, "q_lengths": q_lengths, "kv_lengths": kv_lengths}
        indexed_attention(leaf, **named, qkv_bias=bias, rope=Rope((1, 3, 4)), impl=impl).backward(upstream)
        results.append((leaf.grad, bias.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert results[0][0][x.isnan()].eq(0).all()


@pytest.mark.parametrize("lengths", [None, [18, 0], [18, 5]])
def test_without_an_index_nothing_is_filled_before_and_every_row_is_written(lengths, monkeypatch) -> None:
    monkeypatch.delattr(torch, "zeros_like")
    x = normal(2, 18, 3, 1, 16)
    if lengths is None:
        same(x)
    else:
        named = {"q_lengths": torch.tensor(lengths), "kv_lengths": torch.tensor(lengths[::-1])}
        same(x, **named)
        same(x, **named, rope=Rope((2, 3, 3)))


def test_nothing_to_see_and_nobody_to_ask() -> None:
    x, bias = normal(2, 5, 3, 1, 16), normal(3, 1, 16)
    for named in ({"kv_index": chosen(2, 0, 5)}, {"q_index": chosen(2, 0, 5)}):
        results = gradients(lambda x, b, named=named: indexed_attention(x, **named, qkv_bias=b), x, bias)
        assert all(result.eq(0).all() for result in results)


def test_flat_rows() -> None:
    starts, x, bias = torch.tensor([0, 17, 17, 20, 21]).int(), guarded(normal(21, 3, 1, 24)), normal(3, 1, 24, seed=2)

    def run(impl: str):
        return lambda x, b: indexed_attention(
            x, qkv_bias=b, cu_seqlens=starts, max_length=17, rope=Rope((2, 3, 3), compat=True), impl=impl
        )

    for ours, theirs in zip(*(gradients(run(impl), x, bias) for impl in ("triton", "reference"))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    same(*guarded(normal(21, 3, 1, 16)).unbind(1), cu_seqlens=starts, max_length=17)


@pytest.mark.parametrize(("head", "compat", "dtype"), [(24, True, torch.int64), (64, False, torch.int32)])
def test_ids_name_the_tokens_of_rows(head: int, compat: bool, dtype: torch.dtype) -> None:
    starts, x = torch.tensor([0, 17, 17, 20, 21]).int(), normal(21, 3, 2, head)
    bias, rope = normal(3, 2, head, seed=2), Rope((1, 3, 4), 100.0, compat)
    ids = guarded(torch.randperm(48, generator=torch.Generator().manual_seed(3))[:21].to(dtype))
    clips, few, kept = ids[:20].view(2, 10).contiguous(), chosen(2, 4, 10), chosen(2, 7, 10, 1)
    forms = [
        (x, {"ids": ids, "cu_seqlens": starts, "max_length": 17}),
        (x[:20].unflatten(0, (2, 10)), {"ids": clips, "q_index": few, "kv_index": kept}),
    ]
    for rows, named in forms:
        runs = [
            lambda x, b, impl=impl, named=named: indexed_attention(x, qkv_bias=b, **named, rope=rope, impl=impl)
            for impl in ("triton", "reference")
        ]
        for ours, theirs in zip(*(gradients(run, rows.contiguous(), bias) for run in runs)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    q, (k, v) = x[:8].select(1, 0).unflatten(0, (2, 4)), x[:20, 1:].unflatten(0, (2, 10)).unbind(2)
    same(q.contiguous(), k.contiguous(), v.contiguous(), ids=(few, clips), rope=rope)
    assert intact(ids)


@pytest.mark.parametrize(("head", "several", "compat"), [(24, 2, True), (88, 1, False)])
def test_rope_turns_gradients_back_and_the_bias_gets_its_sums(head: int, several: int, compat: bool) -> None:
    x, bias = normal(several, 40, 3, several, head), guarded(normal(3, several, head, seed=2))
    kept = {"q_index": chosen(several, 33, 40), "kv_index": chosen(several, 9, 40, 1)}
    named = {**kept, "rope": Rope((2, 5, 4), 100.0, compat)}
    results = []
    for impl in ("triton", "reference"):
        run = lambda x, b, impl=impl: indexed_attention(x, qkv_bias=b, **named, impl=impl)  # noqa: E731
        results.append(gradients(run, x, bias))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert intact(bias)


def test_repeats_bit_by_bit() -> None:
    x, bias = normal(1, 17, 3, 1, 24), normal(3, 1, 24)
    one, two = (gradients(lambda x, b: indexed_attention(x, qkv_bias=b), x, bias) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one, two))


def test_keys_that_take_no_part_get_zeros_where_the_others_score_far_below_zero() -> None:
    """The share that an absent key would have, as if its channels were 0, passes the largest number."""
    q, k, v = (normal(1, 20, 1, 32, seed=n) for n in range(3))
    k = k - 60 * q.mean(1, keepdim=True).sign()
    q = q.mean(1, keepdim=True).sign() * 8 + 0 * q
    lengths = torch.tensor([7])
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    indexed_attention(*leaves, kv_lengths=lengths).sum().backward()
    for leaf in leaves[1:]:
        assert leaf.grad[:, 7:].eq(0).all()
        assert leaf.grad.isfinite().all()
