"""The Triton kernels of the feed-forward half in the interpreter, against the reference. float32 and float16 only."""

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import config, linear_gelu
from fastjepa_kernels._triton import linear_gelu as product_kernel
from fastjepa_kernels._triton import mlp as kernels
from fastjepa_kernels.reference import mlp as reference
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check

pytestmark = pytest.mark.usefixtures("results_are_poisoned")

DTYPES = [torch.float32, torch.float16]
SIZES = [(1, 24), (7, 40), (33, 300)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_bias_and_gelu_are_as_exact_as_eager(dtype, rows, width, with_bias):
    product = guarded(normal(rows, width, dtype=dtype) * 2)
    bias = [guarded(normal(width, dtype=dtype, seed=1))] if with_bias else []

    def forward(impl):
        return lambda p, *b: impl.bias_gelu(p, b[0] if b else None)

    check(forward(kernels), forward(reference), product, *bias)
    gradient = guarded(normal(rows, width, dtype=dtype, seed=2))
    for part in (0, 1):

        def backward(impl, part=part):
            return lambda g, p, *b: impl.bias_gelu_backward(g, p, b[0] if b else None, True)[part]

        check(backward(kernels), backward(reference), gradient, product, *bias)
    assert kernels.bias_gelu_backward(gradient, product, None, False)[1].shape == (0,)
    assert all(intact(t) for t in (product, gradient, *bias))


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_rows_shared_by_few_programs(monkeypatch, programs):
    monkeypatch.setitem(config._forced, "bias_gelu_backward", {"PROGRAMS": programs})
    arguments = normal(45, 40), normal(45, 40, seed=1), normal(40, seed=2), True
    one, two = (kernels.bias_gelu_backward(*arguments) for _ in range(2))
    for ours, again, theirs in zip(one, two, reference.bias_gelu_backward(*arguments)):
        assert ours.equal(again)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 8, 7), (7, 33, 40), (70, 40, 33), (33, 70, 70)])
def test_the_product_with_its_epilogue_is_as_exact_as_eager(monkeypatch, dtype, rows, inner, outer):
    tile = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32, "GROUP": 2}
    monkeypatch.setitem(config._forced, "linear_gelu", tile)
    x, weight = guarded(normal(rows, inner, dtype=dtype)), guarded(normal(outer, inner, dtype=dtype, seed=1) * 0.3)
    bias = guarded(normal(outer, dtype=dtype, seed=2))
    for part in (0, 1):

        def run(impl, part=part):
            return lambda *t: impl.linear_gelu(*t, True)[part]

        check(run(product_kernel), run(reference), x, weight, bias)
    assert product_kernel.linear_gelu(x, weight, None, False)[1].shape == (0,)
    assert all(intact(t) for t in (x, weight, bias))


@pytest.mark.parametrize("form", ["library", "fused"])
def test_gradients_through_the_public_function(form):
    given = normal(3, 11, 24)[:, ::2], normal(40, 24, seed=1), normal(40, seed=2)
    results = []
    for impl in ("triton", "reference"):
        inputs = [t.detach().clone().requires_grad_() for t in given]
        out = linear_gelu(*inputs, form=form, impl=impl)
        out.sin().sum().backward()
        results.append([out, *(t.grad for t in inputs)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_rows():
    assert linear_gelu(normal(0, 8), normal(5, 8), normal(5), form="fused", impl="triton").shape == (0, 5)
    dproduct, dbias = kernels.bias_gelu_backward(normal(0, 5), normal(0, 5), None, True)
    assert dproduct.shape == (0, 5)
    assert dbias.equal(torch.zeros(5))
