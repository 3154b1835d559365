"""The bias inside the attention kernels in the interpreter: added as rows are read, its gradient summed from tiles."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import Rope, config, indexed_attention
from fastjepa_kernels._triton.attention_bias import sum_bias
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check, within
from tests.kernels.made import chosen, normal

pytestmark = pytest.mark.usefixtures("results_are_poisoned")

DTYPES = [torch.float32, torch.float16]
# Clips of several blocks, of a part of one, of one row and of none.
LENGTHS = [0, 33, 1, 0]


@pytest.fixture(autouse=True)
def _blocks_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and of keys, not of one size."""
    for side, (m, n) in {"": (16, 32), "_query": (16, 32), "_key": (32, 16)}.items():
        for name in (f"indexed_attention{side}", f"indexed_attention{side}_biased"):
            monkeypatch.setitem(config._forced, name, {"BLOCK_M": m, "BLOCK_N": n})


def flat(lengths: list[int]) -> dict:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return {"cu_seqlens": guarded(starts), "max_length": max(lengths, default=0)}


FORMS = {
    "flat": (sum(LENGTHS), flat(LENGTHS)),
    "dense": ((2, 33), {}),
    "lengths": ((2, 33), {"q_lengths": torch.tensor([33, 5]), "kv_lengths": torch.tensor([0, 17])}),
    "index": ((2, 40), {"q_index": chosen(2, 33, 40), "kv_index": chosen(2, 17, 40, 1)}),
}
forms = pytest.mark.parametrize(("rows", "named"), FORMS.values(), ids=FORMS)


def rows_of(rows, *rest: int, dtype: torch.dtype) -> Tensor:
    return guarded(normal(*(rows if isinstance(rows, tuple) else (rows,)), *rest, dtype=dtype))


def with_gradients(run, x: Tensor, bias: Tensor, seed: int = 7) -> list[Tensor]:
    """The result, and the gradients of x and of the bias."""
    leaves = [t.detach().requires_grad_() for t in (x, bias)]
    out = run(*leaves)
    upstream = normal(*out.shape, seed=seed).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def eager(x: Tensor, bias: Tensor) -> Tensor:
    """Flat rows, clip by clip and step by step in the precision of the inputs."""
    results = []
    for clip in (x + bias).to(x.dtype).split(LENGTHS):
        q, k, v = (part.transpose(0, 1) for part in clip.unbind(1))
        results.append(((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [16, 24, 64, 80])
def test_flat_rows_with_empty_clips_are_as_exact_as_eager(head: int, dtype: torch.dtype) -> None:
    rows, named = FORMS["flat"]
    x, bias = rows_of(rows, 3, 2, head, dtype=dtype), guarded(normal(3, 2, head, seed=1))
    run = lambda x, b: indexed_attention(x, qkv_bias=b, **named)  # noqa: E731
    found, close = with_gradients(run, x, bias), with_gradients(eager, x, bias)
    exact = with_gradients(eager, x.double(), bias.double())
    assert [one.dtype for one in found] == [dtype, dtype, torch.float32]
    for mine, theirs, true in zip(found, close, exact):
        within(mine, theirs, true)
    assert all(intact(t) for t in (x, bias, named["cu_seqlens"]))


@pytest.mark.parametrize("head", [16, 24, 64, 80])
def test_dense_rows_are_as_exact_as_the_reference(head: int) -> None:
    x, bias = guarded(normal(2, 33, 3, 1, head, dtype=torch.float16)), guarded(normal(3, 1, head, seed=1))

    def every(impl: str):
        run = lambda x, b: indexed_attention(x, qkv_bias=b, impl=impl)  # noqa: E731
        return lambda x, b: torch.cat([t.flatten().to(x.dtype) for t in with_gradients(run, x, b)])

    check(every("triton"), every("reference"), x, bias)
    assert intact(x)
    assert intact(bias)


@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_numbers_are_those_of_rows_that_were_biased_before(rows, named: dict, dtype: torch.dtype) -> None:
    x, bias = rows_of(rows, 3, 2, 24, dtype=dtype), normal(3, 2, 24, seed=1)
    before = lambda x, b: indexed_attention((x.float() + b).to(x.dtype), **named)  # noqa: E731
    inside = lambda x, b: indexed_attention(x, qkv_bias=b, **named)  # noqa: E731
    ours, theirs = with_gradients(inside, x, bias), with_gradients(before, x, bias)
    assert ours[0].equal(theirs[0])
    assert ours[1].equal(theirs[1])
    # What is summed is the gradient of the rows as it is written.
    total = ours[1].double().flatten(0, -4).sum(0)
    torch.testing.assert_close(ours[2].double(), total, rtol=1e-5, atol=1e-5)


@forms
def test_results_and_gradients_are_those_of_the_reference(rows, named: dict) -> None:
    x, bias = rows_of(rows, 3, 2, 24, dtype=torch.float32), normal(3, 2, 24, seed=1)
    results = []
    for impl in ("triton", "reference"):
        run = lambda x, b, impl=impl: indexed_attention(x, qkv_bias=b, **named, impl=impl)  # noqa: E731
        results.append(with_gradients(run, x, bias))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@forms
def test_no_row_is_copied(rows, named: dict, launches: Counter[str]) -> None:
    x, bias = rows_of(rows, 3, 2, 16, dtype=torch.float32), normal(3, 2, 16, seed=1)
    with_gradients(lambda x, b: indexed_attention(x, qkv_bias=b, **named), x, bias)
    assert launches == dict.fromkeys(("forward_kernel", "query_kernel", "key_kernel", "bias_sum_kernel"), 1)
    launches.clear()
    indexed_attention(x.requires_grad_(), qkv_bias=bias, **named).sum().backward()
    assert launches == dict.fromkeys(("forward_kernel", "query_kernel", "key_kernel"), 1)


def test_rows_that_are_turned_get_their_bias_before(launches: Counter[str]) -> None:
    x, bias = normal(1, 6, 3, 1, 16), normal(3, 1, 16, seed=1)
    with_gradients(lambda x, b: indexed_attention(x, qkv_bias=b, rope=Rope((1, 2, 3))), x, bias)
    assert launches["ready_kernel"] == 6
    assert launches["back_kernel"] == launches["sum_kernel"] == 3
    assert not launches["bias_sum_kernel"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, at 0 times infinity
@pytest.mark.parametrize("unasked", [1.0, math.inf])
def test_rows_that_take_no_part_may_hold_anything_and_give_the_bias_nothing(unasked: float) -> None:
    """So may, for the bias, the keys of a clip where nobody asks."""
    asked, seen = chosen(3, 20, 40), chosen(3, 36, 40, 1)
    q_lengths, kv_lengths = torch.tensor([20, 0, 3]), torch.tensor([0, 36, 17])
    named = {"q_index": asked, "kv_index": seen, "q_lengths": q_lengths, "kv_lengths": kv_lengths}
    x, upstream = torch.full((3, 40, 3, 1, 24), math.nan), torch.full((3, 20, 1, 24), math.nan)
    for clip, (queries, keys) in enumerate(zip(q_lengths.tolist(), kv_lengths.tolist())):
        x[clip, asked[clip, :queries], 0] = normal(queries, 1, 24)
        x[clip, seen[clip, :keys], 1:] = normal(keys, 2, 1, 24, seed=1) * (1.0 if queries else unasked)
        upstream[clip, :queries] = normal(queries, 1, 24, seed=2)
        asked[clip, queries:] = 2**40
        seen[clip, keys:] = 2**40

    def run(x: Tensor, impl: str) -> list[Tensor]:
        leaves = [guarded(x).requires_grad_(), normal(3, 1, 24).requires_grad_()]
        out = indexed_attention(leaves[0], qkv_bias=leaves[1], **named, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    ours, theirs = run(x, "triton"), run(x.nan_to_num(0.0, 1.0, 1.0), "reference")
    for clip in (0, 2):
        torch.testing.assert_close(ours[0][clip], theirs[0][clip], rtol=1e-4, atol=1e-5)
    for mine, other in zip(ours[1:], theirs[1:]):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert ours[1][x.isnan()].eq(0).all()


@pytest.mark.parametrize("how", ["half", "strided"])
def test_any_bias_of_a_floating_dtype_is_read(how: str) -> None:
    x, bias = normal(2, 17, 3, 2, 24), normal(3, 2, 24, seed=1)
    bias = bias.half() if how == "half" else bias.mT.contiguous().mT
    results = []
    for impl in ("triton", "reference"):
        run = lambda x, b, impl=impl: indexed_attention(x, qkv_bias=b, impl=impl)  # noqa: E731
        results.append(with_gradients(run, x, bias))
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-3 if how == "half" else 1e-4, atol=1e-5)


def test_the_gradient_of_the_bias_repeats_bit_by_bit() -> None:
    rows, named = FORMS["flat"]
    x, bias = rows_of(rows, 3, 2, 24, dtype=torch.float32), normal(3, 2, 24, seed=1)
    one, two = (with_gradients(lambda x, b: indexed_attention(x, qkv_bias=b, **named), x, bias) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one, two))


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_rows_at_all_give_the_bias_zeros(lengths: list[int]) -> None:
    x, bias = normal(0, 3, 2, 16), normal(3, 2, 16)
    out, _, dbias = with_gradients(lambda x, b: indexed_attention(x, qkv_bias=b, **flat(lengths)), x, bias)
    assert out.shape == (0, 2, 16)
    assert dbias.eq(0).all()


@pytest.mark.parametrize(("asking", "seen"), [(1, 1), (65, 2), (3, 130)])
def test_partial_sums_are_added_over_their_own_rows(asking: int, seen: int) -> None:
    """More rows than a program holds at a time, and columns that fill no program."""
    parts = guarded(normal(asking + 2 * seen, 40))
    out = parts.new_empty(3, 5, 8)
    sum_bias(parts, out, asking, seen)
    exact = torch.stack([part.double().sum(0) for part in parts.split([asking, seen, seen])])
    torch.testing.assert_close(out.flatten(1).double(), exact, rtol=1e-5, atol=1e-5)
    assert intact(parts)
