"""The Triton kernels of layer normalisation in the interpreter, against the reference. float32 and float16 only."""

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import add_layer_norm, explain, layer_norm
from fastjepa_kernels._triton import norms as kernels
from fastjepa_kernels.config import forced
from fastjepa_kernels.reference import norms as reference
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check

pytestmark = pytest.mark.usefixtures("results_are_poisoned")

DTYPES = [torch.float32, torch.float16]
SIZES = [(1, 24), (33, 24), (7, 40), (33, 96), (1, 1000), (7, 1000)]
EPS = 1e-6


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(ours, theirs, *inputs: Tensor) -> None:
    """The yardstick for each result of two functions that give the same results; the kernels run once."""
    results, eager = ours(*inputs), theirs(*inputs)
    exact = theirs(*(x.double() for x in inputs))
    for part, result in enumerate(results):
        if not result.numel():
            continue
        assert result.dtype == eager[part].dtype

        def reference_part(x: Tensor, exact=exact[part], eager=eager[part]) -> Tensor:
            return exact if x.dtype == torch.float64 else eager

        check(lambda x, result=result: result, reference_part, inputs[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "width"), SIZES)
def test_forward_is_as_exact_as_eager(dtype: torch.dtype, length: int, width: int) -> None:
    x = guarded(normal(length, width, dtype=dtype) * 2 + 3)
    residual = guarded(normal(length, width, dtype=dtype, seed=1))
    weight, bias = guarded(normal(width, seed=2) + 1), guarded(normal(width, seed=3))

    def full(norm):
        return lambda x, w, b: norm(x, w, b, EPS, x.dtype)

    compare(full(kernels.layer_norm), full(reference.layer_norm), x, weight, bias)
    for w, b in ((None, None), (weight, None), (None, bias)):
        ours, theirs = (impl.layer_norm(x, w, b, EPS, torch.float32) for impl in (kernels, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    def added(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        # Normalised is the sum as it was rounded, also in the exact run.
        total = (x.float() + residual.float()).to(dtype)
        out, mean, rstd = reference.layer_norm(total.to(x.dtype), w, b, EPS, x.dtype)
        return out, total.to(x.dtype), mean, rstd

    plain = EPS, None, None, None, dtype
    compare(lambda *given: kernels.add_layer_norm(*given, *plain), added, x, residual, weight, bias)
    assert all(intact(t) for t in (x, residual, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "width"), SIZES)
def test_backward_is_as_exact_as_eager(dtype: torch.dtype, length: int, width: int) -> None:
    x, extra = (guarded(normal(length, width, dtype=dtype, seed=n) * 2 + 3) for n in range(2))
    gradient, weight = guarded(normal(length, width, dtype=dtype, seed=5)), guarded(normal(width, seed=6))
    _, mean, rstd = reference.layer_norm(x, None, None, EPS, dtype)
    mean, rstd = guarded(mean), guarded(rstd)

    def full(impl):
        return lambda *given: impl.layer_norm_backward(*given, True, True)

    def plain(impl):
        return lambda g, x, m, r: impl.layer_norm_backward(g, None, x, None, m, r, False, False)

    compare(full(kernels), full(reference), gradient, extra, x, weight, mean, rstd)
    compare(plain(kernels), plain(reference), gradient, x, mean, rstd)
    assert all(intact(t) for t in (gradient, extra, x, weight, mean, rstd))


@pytest.mark.parametrize("programs", [1, 3, 4])
def test_rows_shared_by_few_programs(programs: int) -> None:
    """Several tiles a program, a last program with less, and more partial rows than the second kernel takes at once."""
    gradient, x, weight = normal(77, 96), normal(77, 96, seed=1), normal(96, seed=2)
    _, mean, rstd = reference.layer_norm(x, None, None, EPS, x.dtype)
    arguments = gradient, None, x, weight, mean, rstd, True, True
    with forced("layer_norm_backward", PROGRAMS=programs), forced("layer_norm_sum", ROWS=2):
        one, two = (kernels.layer_norm_backward(*arguments) for _ in range(2))
    for ours, theirs in zip(one, reference.layer_norm_backward(*arguments)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(a.equal(b) for a, b in zip(one, two))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2, 8:48],
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(1, 2),
        lambda x: x[0],
        lambda x: x[1, 3],
        lambda x: x[:, :1].expand(-1, 5, -1),
        lambda x: x.view(3, 2, 4, 48).transpose(1, 2),
        lambda x: x[:, :0],
    ],
)
def test_strided_rows_with_their_gradients(view) -> None:
    x, residual = view(guarded(normal(3, 8, 48))), view(guarded(normal(3, 8, 48, seed=1)))
    weight, bias = normal(x.shape[-1], seed=2), normal(x.shape[-1], seed=3)
    results = []
    for impl in ("triton", "reference"):
        inputs = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
        out, total = add_layer_norm(*inputs, impl=impl)
        again = layer_norm(inputs[0], *inputs[2:], impl=impl)
        (out.sin() + total.cos() + again.exp()).sum().backward()
        results.append([out, total, again, *(t.grad for t in inputs)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert results[0][0].is_contiguous()


def test_mixed_dtypes() -> None:
    x, residual = normal(5, 40, dtype=torch.float16), normal(5, 40, seed=1)
    weight, bias = normal(40, seed=2), normal(40, dtype=torch.float16, seed=3)
    results = []
    for impl in ("triton", "reference"):
        inputs = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
        out, total = add_layer_norm(*inputs, impl=impl)
        wide = layer_norm(inputs[0], out_dtype=torch.float32, impl=impl)
        (out.float().sin() + total.cos() + wide).sum().backward()
        results.append([out, total, wide, *(t.grad for t in inputs)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_a_row_far_from_zero_keeps_its_variance() -> None:
    """The variance is of centred values: a mean of squares less a square of the mean would lose it all."""
    x = normal(4, 1000) + 10_000
    exact = reference.layer_norm(x.double(), None, None, EPS, torch.float64)[0]
    assert (kernels.layer_norm(x, None, None, EPS, x.dtype)[0] - exact).abs().max() < 2e-3


def test_what_triton_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 8192 channels"):
        layer_norm(normal(1, 8193), impl="triton")
    with pytest.raises(ValueError, match="float64"):
        layer_norm(normal(1, 8).double(), impl="triton")
    assert layer_norm(normal(1, 8192), impl="triton").isfinite().all()


def test_what_triton_does_not_take_runs_through_the_reference_where_the_choice_is_free() -> None:
    for x in (normal(2, 8193), normal(2, 8).double()):
        assert torch.equal(layer_norm(x), layer_norm(x, impl="reference"))
        assert explain("layer_norm", x.double()) == (
            "layer_norm: reference, because the kernels compute in float32, got float64"
        )
