"""Indexed attention: what it computes, what it refuses, and how it lives with autograd and torch.compile."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from fastjepa_kernels import Rope, indexed_attention
from fastjepa_kernels.attention_inputs import Inputs
from fastjepa_kernels.reference.attention import rotate

GRID = (3, 2, 4)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def chosen(clips: int, kept: int, rows: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(rows, generator=generator)[:kept] for _ in range(clips)]).to(dtype)


def turned(x: Tensor, tokens: Tensor, rope: Rope) -> Tensor:
    """x [K, H, d], channel by channel."""
    _, height, width = rope.grid
    channels = 2 * (x.shape[-1] // 3 // 2)
    out = x.clone()
    for axis, place in enumerate((tokens // (height * width), tokens % (height * width) // width, tokens % width)):
        for c in range(channels):
            number = c % (channels // 2) if rope.compat else c // 2
            angle = (place * rope.theta ** (-number / (channels // 2))).unsqueeze(1).to(x.dtype)
            here = axis * channels + c
            other = -x[..., here + 1] if c % 2 == 0 else x[..., here - 1]
            out[..., here] = x[..., here] * angle.cos() + other * angle.sin()
    return out


def one_clip(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """[K, H, d] each, by the library."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)


def composed(
    q, k, v, q_index=None, kv_index=None, q_lengths=None, kv_lengths=None, scale=None, rope=None, bias=None
) -> Tensor:
    """Clip by clip: rows picked, turned and given to the library; zeros where there are none."""
    if k is None:
        q, k, v = q.unbind(2)
    if bias is not None:
        q, k, v = (x + one for x, one in zip((q, k, v), bias))
    results = []
    for clip in range(len(q)):
        asked = torch.arange(q.shape[1]) if q_index is None else q_index[clip].long()
        seen = torch.arange(k.shape[1]) if kv_index is None else kv_index[clip].long()
        most = len(asked)
        asked = asked if q_lengths is None else asked[: q_lengths[clip]]
        seen = seen if kv_lengths is None else seen[: kv_lengths[clip]]
        parts = [q[clip][asked], k[clip][seen], v[clip][seen]]
        if rope is not None:
            parts[:2] = [turned(x, tokens, rope) for x, tokens in zip(parts, (asked, seen))]
        out = one_clip(*parts, scale) if len(seen) else parts[0] * 0
        results.append(F.pad(out, (0, 0, 0, 0, 0, most - len(asked))))
    return torch.stack(results)


CASES = {
    "all rows": {},
    "one index": {"q_index": chosen(2, 7, 24), "kv_index": chosen(2, 7, 24)},
    "two indices": {"q_index": chosen(2, 5, 24, 1), "kv_index": chosen(2, 9, 24, 2, torch.int32)},
    "queries alone": {"q_index": chosen(2, 1, 24, 1), "scale": 0.3},
    "keys alone": {"kv_index": chosen(2, 23, 24, 1), "scale": -0.2},
    "lengths": {"q_lengths": torch.tensor([24, 5]), "kv_lengths": torch.tensor([3, 0], dtype=torch.int32)},
    "ragged index": {
        "q_index": chosen(2, 6, 24, 1),
        "kv_index": chosen(2, 9, 24, 2),
        "q_lengths": torch.tensor([0, 6]),
        "kv_lengths": torch.tensor([9, 4]),
    },
    "no keys": {"q_index": chosen(2, 6, 24, 1), "kv_index": chosen(2, 0, 24, 2)},
    "no queries": {"q_index": chosen(2, 0, 24, 1)},
}
TURNS = [None, Rope(GRID), Rope(GRID, theta=100.0, compat=True)]


@pytest.mark.parametrize("rope", TURNS, ids=["plain", "rope", "compat"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_library_on_picked_rows(case: dict, packed: bool, rope) -> None:
    x = normal(2, 24, 3, 2, 24)
    bias = normal(3, 2, 24, seed=1) if packed else None
    ours, theirs = ([leaf(t) for t in (x, *([bias] if packed else []))] for _ in range(2))

    def inputs(leaves: list[Tensor]) -> tuple:
        return (leaves[0], None, None) if packed else leaves[0].unbind(2)

    out = indexed_attention(*inputs(ours), **case, rope=rope, qkv_bias=ours[1] if packed else None)
    expected = composed(*inputs(theirs), **case, rope=rope, bias=theirs[1] if packed else None)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    upstream = normal(*out.shape, seed=9)
    out.backward(upstream)
    expected.backward(upstream)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, torch.zeros_like(mine) if other.grad is None else other.grad)


@pytest.mark.parametrize("rope", TURNS, ids=["plain", "rope", "compat"])
@pytest.mark.parametrize("lengths", [[4, 7, 1], [0, 5, 0, 3], [12], []])
def test_flat_rows_are_clips_one_after_another(lengths: list[int], rope) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    x, bias = normal(sum(lengths), 3, 2, 24), normal(3, 2, 24, seed=1)
    ours, apart, theirs = ([leaf(t) for t in (x, bias)] for _ in range(3))
    flat = {"cu_seqlens": starts, "max_length": max(lengths, default=0), "rope": rope}
    out = indexed_attention(ours[0], qkv_bias=ours[1], **flat)
    again = indexed_attention(*(apart[0] + apart[1]).unbind(1), **flat)
    pieces = [
        composed(clip.unsqueeze(0), None, None, rope=rope, bias=theirs[1])[0] for clip in theirs[0].split(lengths)
    ]
    expected = torch.cat(pieces) if lengths else theirs[0][:, 0] * theirs[1].sum()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(again, expected)
    upstream = normal(*out.shape, seed=9)
    for result in (out, again, expected):
        result.backward(upstream)
    for mine, separate, other in zip(ours, apart, theirs):
        torch.testing.assert_close(mine.grad, other.grad)
        torch.testing.assert_close(separate.grad, other.grad)


@pytest.mark.parametrize("rope", TURNS[1:], ids=["rope", "compat"])
def test_ids_are_the_token_numbers_of_rows_picked_before(rope) -> None:
    """The same as an index into rows of whole clips."""
    whole, bias, index = normal(2, 24, 3, 2, 24), normal(3, 2, 24, seed=1), chosen(2, 7, 24)
    order, few = chosen(2, 5, 7, 3), chosen(2, 3, 24, 4)
    x, b = leaf(whole), leaf(bias)
    forms: list = [
        ({"q_index": index, "kv_index": index}, {"ids": index.int()}),
        ({"q_index": index.gather(1, order), "kv_index": index}, {"ids": index, "q_index": order}),
    ]
    for one, other in forms:
        expected = indexed_attention(x, **one, rope=rope, qkv_bias=b)
        picked = x.gather(1, index[..., None, None, None].expand(-1, -1, 3, 2, 24))
        out = indexed_attention(picked, **other, rope=rope, qkv_bias=b)
        upstream = normal(*out.shape, seed=9)
        torch.testing.assert_close(out, expected)
        gradients = (torch.autograd.grad(result, (x, b), upstream) for result in (out, expected))
        for mine, theirs in zip(*gradients):
            torch.testing.assert_close(mine, theirs)
    flat = {"cu_seqlens": torch.tensor([0, 7, 14]).int(), "max_length": 7, "rope": rope, "ids": index.flatten()}
    q, k, v = (whole + bias).unbind(2)
    rows = picked.flatten(0, 1)
    expected = indexed_attention(x, **forms[0][0], rope=rope, qkv_bias=b).flatten(0, 1)
    torch.testing.assert_close(indexed_attention(rows, **flat, qkv_bias=b), expected)
    torch.testing.assert_close(indexed_attention(*(rows + b).unbind(1), **flat), expected)
    # Queries of fewer rows than keys.
    asked, kept = (t[..., None, None].expand(-1, -1, 2, 24) for t in (few, index))
    parts = q.gather(1, asked), k.gather(1, kept), v.gather(1, kept)
    found = indexed_attention(*parts, rope=rope, ids=(few, index))
    torch.testing.assert_close(found, indexed_attention(q, k, v, q_index=few, kv_index=index, rope=rope))


def test_rows_that_take_no_part_may_hold_anything() -> None:
    case = CASES["ragged index"]
    x = normal(2, 24, 3, 2, 24)
    clean = indexed_attention(x, **case)
    poisoned = torch.full_like(x, math.nan)
    for clip in range(2):
        asked = case["q_index"][clip][: case["q_lengths"][clip]]
        seen = case["kv_index"][clip][: case["kv_lengths"][clip]]
        poisoned[clip, asked, 0] = x[clip, asked, 0]
        poisoned[clip, seen, 1:] = x[clip, seen, 1:]
    leaves = leaf(poisoned)
    # Padding of an index is no row number.
    padded = [
        index.masked_fill(torch.arange(index.shape[1]) >= case[lengths].unsqueeze(1), 10**6)
        for index, lengths in ((case["q_index"], "q_lengths"), (case["kv_index"], "kv_lengths"))
    ]
    out = indexed_attention(leaves, **{**case, "q_index": padded[0], "kv_index": padded[1]})
    assert out.equal(clean)
    upstream = normal(*out.shape, seed=3)
    for clip in range(2):
        upstream[clip, case["q_lengths"][clip] :] = math.nan
    out.backward(upstream)
    assert leaves.grad.isfinite().all()
    assert leaves.grad[poisoned.isnan()].eq(0).all()


def test_a_nan_that_takes_part_is_not_hidden() -> None:
    x = normal(1, 4, 3, 1, 16)
    x[0, 2, 1, 0, 0] = math.nan
    assert indexed_attention(x).isnan().all()


def test_scores_too_large_for_exp() -> None:
    x = normal(1, 9, 3, 2, 16, dtype=torch.float32) * 100
    torch.testing.assert_close(indexed_attention(x), composed(x, None, None))


def test_rope_turns_three_segments_and_leaves_the_rest() -> None:
    """A head of 32 turns 10 channels an axis and leaves 2."""
    x, token = torch.ones(1, 1, 1, 32, dtype=torch.float64), torch.tensor([[3 * 15 + 2 * 5 + 4]])
    case = Inputs(x, x, x, *[None] * 8, 0, 1.0, [4, 3, 5], 1e4, False)
    last = 1e4 ** (-4 / 5)
    for compat in (False, True):
        y = rotate(x, token, case._replace(compat=compat))[0, 0, 0]
        assert y[30:].eq(1).all()
        for axis, place in enumerate((3, 2, 4)):
            second = place * (1e4 ** (-1 / 5) if compat else 1.0)
            assert y[10 * axis].item() == pytest.approx(math.cos(place) - math.sin(place))
            assert y[10 * axis + 1].item() == pytest.approx(math.cos(second) + math.sin(second))
            assert y[10 * axis + 9].item() == pytest.approx(math.cos(place * last) + math.sin(place * last))


def test_gradients_are_the_derivatives() -> None:
    x, bias = leaf(normal(2, 3, 3, 1, 16)), leaf(normal(3, 1, 16, seed=1))
    index, more = chosen(2, 2, 3, 1), chosen(2, 2, 3, 2)
    lengths = torch.tensor([2, 1])
    for rope in (None, Rope((1, 2, 2), theta=10.0, compat=True)):

        def packed(x: Tensor, bias: Tensor, rope=rope) -> Tensor:
            return indexed_attention(
                x, q_index=index, kv_index=more, kv_lengths=lengths, q_lengths=lengths, rope=rope, qkv_bias=bias
            )

        def separate(q: Tensor, k: Tensor, v: Tensor, rope=rope) -> Tensor:
            return indexed_attention(q, k, v, kv_index=more, rope=rope)

        assert torch.autograd.gradcheck(packed, (x, bias))
        assert torch.autograd.gradcheck(separate, tuple(leaf(t) for t in x.unbind(2)))
    flat = {"cu_seqlens": torch.tensor([0, 2, 2, 6]).int(), "max_length": 4}
    assert torch.autograd.gradcheck(lambda x: indexed_attention(x, **flat), (leaf(x.flatten(0, 1)),))


def arguments(
    x: Tensor, bias: Tensor | None, *index: Tensor | None, longest: int = 0, grid=(), ids: Tensor | None = None
) -> tuple:
    return x, None, None, *index, bias, ids, ids, longest, 0.25, list(grid), 1e4, False


@pytest.mark.parametrize("name", ["indexed_attention", "indexed_attention_reference"])
def test_torch_accepts_the_operators(name: str) -> None:
    one = getattr(torch.ops.fastjepa, name).default
    backward = getattr(torch.ops.fastjepa, name.replace("attention", "attention_backward")).default
    x, bias = normal(2, 6, 3, 2, 16, dtype=torch.float32), normal(3, 2, 16, dtype=torch.float32)
    lengths, starts = torch.tensor([2, 3]), torch.tensor([0, 4, 12]).int()
    inputs = [
        arguments(x, bias, chosen(2, 3, 6), chosen(2, 5, 6), lengths, lengths, None, grid=(1, 2, 3)),
        arguments(x, None, None, None, None, None, None),
        arguments(x.flatten(0, 1), bias, *[None] * 4, starts, longest=8, grid=(1, 2, 3), ids=torch.arange(12).flip(0)),
        arguments(x.flatten(0, 1), bias, None, None, None, None, starts, longest=8),
        (*(t.transpose(0, 1) for t in x.unbind(2)), *arguments(x, None, *[None] * 5)[3:]),
    ]
    for given in inputs:
        given = tuple(leaf(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in given)
        library.opcheck(one, given)
        plain = tuple(t.detach() if isinstance(t, Tensor) else t for t in given)
        out, lse = one(*plain)
        assert lse.dtype == torch.float32
        library.opcheck(backward, (torch.ones_like(out), out, lse, *plain, given[8] is not None))


def test_statistics_carry_no_gradient_and_halves_stay_halves() -> None:
    x = leaf(normal(2, 6, 3, 2, 16, dtype=torch.bfloat16))
    out, lse = torch.ops.fastjepa.indexed_attention_reference(*arguments(x, None, *[None] * 5))
    assert (out.dtype, lse.dtype, lse.shape) == (torch.bfloat16, torch.float32, (2, 2, 6))
    assert not lse.requires_grad
    q, k, _ = x.float().unbind(2)
    torch.testing.assert_close(lse, (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25).logsumexp(-1) / math.log(2))
    bias = leaf(normal(3, 2, 16, dtype=torch.float32))
    indexed_attention(x, qkv_bias=bias).sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32)


def test_compiles_whole_with_few_recompiles_over_many_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, index: Tensor, flat: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        out = indexed_attention(x, q_index=index, kv_index=index, rope=Rope(GRID), impl="reference")
        return out, indexed_attention(flat, cu_seqlens=starts, max_length=longest, impl="reference")

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in range(2, 22):
        index, starts = chosen(2, length, 24), torch.tensor([0, length, 3 * length]).int()
        inputs = normal(2, 24, 3, 2, 16), normal(3 * length, 3, 2, 16, seed=1)
        ours, theirs = ([leaf(x) for x in inputs] for _ in range(2))
        results, expected = (
            run(x, index, flat, starts, 2 * length) for run, (x, flat) in ((compiled, ours), (step, theirs))
        )
        sum((result * result.cos()).sum() for result in results).backward()
        sum((result * result.cos()).sum() for result in expected).backward()
        for mine, other in zip((*results, *(x.grad for x in ours)), (*expected, *(x.grad for x in theirs))):
            torch.testing.assert_close(mine, other)
    assert counter.frame_count <= 2


def test_repeats_bit_by_bit() -> None:
    def gradients() -> list[Tensor]:
        x, bias = leaf(normal(2, 24, 3, 2, 24)), leaf(normal(3, 2, 24, seed=1))
        indexed_attention(x, **CASES["two indices"], qkv_bias=bias).sin().sum().backward()
        return [x.grad, bias.grad]

    assert all(one.equal(other) for one, other in zip(gradients(), gradients()))


def mistakes() -> list:
    index, lengths, starts = torch.zeros(2, 3).long(), torch.ones(2).long(), torch.tensor([0, 2, 4]).int()
    return [
        (lambda x: indexed_attention(x[:, :, 0]), "packed q"),
        (lambda x: indexed_attention(x[:, :, :2]), "packed q"),
        (lambda x: indexed_attention(x, x[:, :, 0]), "come together"),
        (lambda x: indexed_attention(x[:, :, 0], x[:, :, 0], x[:, :2, 0]), "q, k and v"),
        (lambda x: indexed_attention(x[:1, :, 0], x[:, :, 0], x[:, :, 0]), "q, k and v"),
        (lambda x: indexed_attention(x[:, :, 0], x[:, :, 0], x[:, :, 0].half()), "one dtype"),
        (lambda x: indexed_attention(x.int()), "floating dtype"),
        (lambda x: indexed_attention(x[..., :12]), "steps of 8, got 12"),
        (lambda x: indexed_attention(x[..., :8]), "16 to 128"),
        (lambda x: indexed_attention(x, ids=index), "ids are token numbers, which rope alone reads"),
        (lambda x: indexed_attention(x, rope=Rope(GRID), ids=index), r"expected ids \[2, \d+\] for q"),
        (lambda x: indexed_attention(x, rope=Rope(GRID), ids=index.float()), "ids must be int32 or int64"),
        (lambda x: indexed_attention(x, q_index=index.float()), "index must be int32"),
        (lambda x: indexed_attention(x, kv_index=index.to("meta")), "index on meta"),
        (lambda x: indexed_attention(x, q_index=index[:1]), r"q_index \[2, K\]"),
        (lambda x: indexed_attention(x, kv_index=lengths), r"kv_index \[2, K\]"),
        (lambda x: indexed_attention(x, q_lengths=index), r"q_lengths \[2\]"),
        (lambda x: indexed_attention(x, kv_lengths=lengths.float()), "kv_lengths must be"),
        (lambda x: indexed_attention(x[0], cu_seqlens=starts), "with max_length"),
        (lambda x: indexed_attention(x, max_length=3), "goes with cu_seqlens"),
        (lambda x: indexed_attention(x[0], cu_seqlens=starts, max_length=2, q_lengths=lengths), "without index"),
        (lambda x: indexed_attention(x, cu_seqlens=starts, max_length=2), "packed q"),
        (lambda x: indexed_attention(x[0], cu_seqlens=starts.float(), max_length=2), "cu_seqlens must be"),
        (lambda x: indexed_attention(x[0], cu_seqlens=starts[None], max_length=2), r"cu_seqlens \[B \+ 1\]"),
        (lambda x: indexed_attention(x, qkv_bias=x[0, 0, 0]), "qkv_bias"),
        (lambda x: indexed_attention(x, qkv_bias=x[0, 0].int()), "qkv_bias"),
        (lambda x: indexed_attention(*x.unbind(2), qkv_bias=x[0, 0]), "qkv_bias"),
        (lambda x: indexed_attention(x, impl="triton"), "CUDA device"),
        (lambda x: indexed_attention(x, impl="fast"), "impl must be one of"),
        (lambda x: Rope((1, 2)), "grid must be"),
        (lambda x: Rope((1, 2, 0)), "grid must be"),
        (lambda x: Rope((1, 2, 3), theta=0.0), "theta must be"),
    ]


@pytest.mark.parametrize(("call", "words"), mistakes())
def test_mistakes_are_sentences(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(normal(2, 4, 3, 2, 16, dtype=torch.float32))


def test_flops_are_of_the_rows_that_take_part() -> None:
    one = 2 * 7 * 9 * 16 * 2 * 2
    x = leaf(normal(2, 24, 3, 2, 16))
    both = {"q_index": chosen(2, 7, 24), "kv_index": chosen(2, 9, 24)}
    for inputs, more, product in (
        ((x,), both, one),
        (x.unbind(2), both, one),
        ((x[:, :7, 0], x[:, :9, 1], x[:, :9, 2]), {}, one),
        ((x,), {}, 2 * 24 * 24 * 16 * 2 * 2),
        ((x[0],), {"cu_seqlens": torch.tensor([0, 10, 24]).int(), "max_length": 14}, 2 * 24 * 14 * 16 * 2),
    ):
        with FlopCounterMode(display=False) as counter:
            out = indexed_attention(*inputs, **more)
        assert counter.get_total_flops() == 2 * product
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 5 * product


def test_autocast_does_not_reach_the_products_of_the_reference():
    x = torch.randn(1, 33, 3, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = indexed_attention(x, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert indexed_attention(x, impl="reference").equal(plain)
