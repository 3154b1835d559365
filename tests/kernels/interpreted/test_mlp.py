"""The gradient of the GELU inside its product, in the interpreter, against the reference. float32 and float16 only."""

import math

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import config, mlp
from fastjepa_kernels._triton import gelu_product as kernels
from fastjepa_kernels.reference import mlp as reference
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check

pytestmark = pytest.mark.usefixtures("results_are_poisoned")

DTYPES = [torch.float32, torch.float16]
# Rows, inner and outer: below, at, and beyond the edges of tiles of 32 x 16 and of their quarters of 32 x 4.
SIZES = [(1, 8, 7), (7, 33, 40), (70, 40, 33), (33, 70, 70), (32, 32, 16), (100, 5, 25)]
TILE = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32, "GROUP": 2}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(rows: int, inner: int, outer: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """gradient [R, D], weight [D, O] and the sum before the GELU [R, O], on both sides of its bend."""
    weight = normal(inner, outer, seed=1) * inner**-0.5
    return normal(rows, inner, dtype=dtype), weight.to(dtype), normal(rows, outer, dtype=dtype, seed=2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for operation in ("gelu_product_backward", "linear_gelu"):
        monkeypatch.setitem(config._forced, operation, TILE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "outer"), SIZES)
def test_it_is_as_exact_as_eager(dtype, rows, inner, outer):
    given = tuple(guarded(t) for t in arguments(rows, inner, outer, dtype))
    for part in (0, 1):

        def run(impl, part=part):
            return lambda *t: impl.gelu_product_backward(*t, True)[part]

        check(run(kernels), run(reference), *given)
    dsum, nothing = kernels.gelu_product_backward(*given, False)
    assert nothing.shape == (0,)
    assert dsum.equal(kernels.gelu_product_backward(*given, True)[0])
    assert all(intact(t) for t in given)


@pytest.mark.parametrize("height", [4, 8, 16])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_every_row_of_tiles_leaves_its_sums(monkeypatch, height, group):
    """The bias's gradient alone tells which rows went into it: each row counts for a power of two."""
    monkeypatch.setitem(config._forced, "gelu_product_backward", {**TILE, "BLOCK_M": height, "GROUP": group})
    rows = 5 * height - 1
    gradient, weight = (2.0 ** -(torch.arange(rows) % 20))[:, None], torch.ones(1, 40)
    far = torch.full((rows, 40), 20.0)  # where the slope is one
    dsum, dbias = kernels.gelu_product_backward(gradient, weight, far, True)
    assert dsum.equal(gradient.expand(-1, 40))
    assert dbias.equal(gradient.sum(0).expand(40))


def test_the_product_is_rounded_once():
    """In half precision, as the library rounds it before the GELU's gradient, every third value would be another."""
    given = arguments(70, 40, 33, torch.float16)
    exact, _ = reference.gelu_product_backward(*(t.double() for t in given), False)
    ours, _ = kernels.gelu_product_backward(*given, False)
    twice, _ = reference.gelu_product_backward(*given, False)
    assert (ours == exact.half()).double().mean() > 0.99
    assert (twice == exact.half()).double().mean() < 0.8


def test_sums_are_of_values_that_are_not_rounded():
    given = arguments(100, 40, 33, torch.float16)
    _, exact = reference.gelu_product_backward(*(t.double() for t in given), True)
    _, ours = kernels.gelu_product_backward(*given, True)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 2, 3, 7])
def test_results_repeat_bit_for_bit_and_whatever_the_number_of_programs(monkeypatch, programs):
    given = arguments(100, 40, 70)
    first = kernels.gelu_product_backward(*given, True)
    monkeypatch.setattr(kernels, "processors", lambda device: programs)
    for _ in range(2):
        assert all(one.equal(two) for one, two in zip(first, kernels.gelu_product_backward(*given, True)))


def test_any_strides():
    gradient, weight, before = arguments(33, 40, 24)
    plain = kernels.gelu_product_backward(gradient, weight, before, True)
    turned = (t.t().contiguous().t() for t in (gradient, weight, before))
    for one, two in zip(plain, kernels.gelu_product_backward(*turned, True)):
        assert one.equal(two)


def test_a_gradient_that_is_not_finite_reaches_its_row_and_all_sums():
    gradient, weight, before = arguments(40, 8, 24)
    gradient[3, 2] = float("nan")
    dsum, dbias = kernels.gelu_product_backward(gradient, weight, before, True)
    assert not dsum[3].isfinite().any()
    assert dsum[:3].isfinite().all()
    assert dsum[4:].isfinite().all()
    assert not dbias.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "hidden", "outer"), [(7, 8, 40, 5), (33, 40, 70, 24)])
def test_the_layer_is_as_exact_as_eager(dtype, rows, inner, hidden, outer):
    x, w1 = guarded(normal(rows, inner, dtype=dtype)), guarded(normal(hidden, inner, dtype=dtype, seed=1) * 0.3)
    b1, w2 = guarded(normal(hidden, dtype=dtype, seed=2)), guarded(normal(outer, hidden, dtype=dtype, seed=3) * 0.2)
    for part in range(3):

        def run(impl, part=part):
            return lambda *t: impl.mlp(*t, True)[part]

        check(run(kernels), run(reference), x, w1, b1, w2)
    plain = kernels.mlp(x, w1, None, w2, False)
    assert [t.shape for t in plain[1:]] == [(0,), (0,)]
    assert plain[0].equal(kernels.mlp(x, w1, None, w2, True)[0])
    assert all(intact(t) for t in (x, w1, b1, w2))


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_through_the_public_function(with_bias):
    given = normal(3, 11, 24)[:, ::2], normal(40, 24, seed=1), normal(40, seed=2), normal(9, 40, seed=3)
    results = []
    for impl in ("triton", "reference"):
        x, w1, b1, w2 = (t.detach().clone().requires_grad_() for t in given)
        out = mlp(x, w1, b1 if with_bias else None, w2, impl=impl)
        out.sin().sum().backward()
        results.append([out, *(t.grad for t in ((x, w1, b1, w2) if with_bias else (x, w1, w2)))])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_two_launches_backward_and_one_without_a_bias(launches):
    given = arguments(33, 8, 24)
    kernels.gelu_product_backward(*given, True)
    assert launches == {"gelu_product_backward_kernel": 1, "sum_kernel": 1}
    kernels.gelu_product_backward(*given, False)
    assert launches == {"gelu_product_backward_kernel": 2, "sum_kernel": 1}


def test_partial_sums_are_a_row_for_each_row_of_tiles(monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "sum_parts", lambda parts, out, count: seen.append((tuple(parts.shape), count)))
    kernels.gelu_product_backward(*arguments(70, 8, 24), True)
    rows = math.ceil(70 / TILE["BLOCK_M"])
    assert seen == [((rows, 24), rows)]


def test_no_rows():
    x = normal(0, 8).requires_grad_()
    assert mlp(x, normal(5, 8), normal(5), normal(3, 5), impl="triton").shape == (0, 3)
    dsum, dbias = kernels.gelu_product_backward(normal(0, 3), normal(3, 5), normal(0, 5), True)
    assert dsum.shape == (0, 5)
    assert dbias.equal(torch.zeros(5))
