"""The factors of `add_layer_norm` in the interpreter, against the reference. float32 and float16 only."""

from itertools import product

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import add_layer_norm, config
from fastjepa_kernels._triton import norms as kernels
from fastjepa_kernels.reference import norms as reference
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import distance

pytestmark = pytest.mark.usefixtures("results_are_poisoned")

CHOICES = list(product((False, True), repeat=3))
SIZES = [(1, 1, 24), (3, 33, 24), (3, 7, 40), (2, 33, 96), (2, 7, 1000)]
EPS = 1e-6


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factors(clips: int, width: int, dtype: torch.dtype, given: tuple[bool, bool, bool] = (True,) * 3) -> list:
    """x_bias, scale and row_scale; the first clip of several is dropped."""
    made = (
        guarded(normal(width, dtype=dtype, seed=4)),
        guarded(normal(width, seed=5) + 0.5),
        guarded(torch.tensor([0.0, 1.25, 2.0])[-clips:]),
    )
    return [value if there else None for value, there in zip(made, given)]


def choices(shape: tuple[int, ...]) -> list:
    """Every choice of factors for the smallest shape; the others take all."""
    return CHOICES if shape == SIZES[0] else CHOICES[-1:]


def wide(given: list) -> list:
    return [value.double() if isinstance(value, Tensor) else value for value in given]


def as_exact(ours: tuple[Tensor, ...], eager: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    assert len(ours) == len(eager) == len(exact)
    for result, other, truth in zip(ours, eager, exact):
        assert (result.dtype, result.shape) == (other.dtype, other.shape)
        assert result.isfinite().all()
        # A row of parameters' sums each, so that a large one does not hide another.
        rows = zip(result, other, truth) if result.ndim == 2 else [(result, other, truth)]
        for one, two, three in rows:
            assert distance(one, three) <= 2 * distance(two, three) + torch.finfo(result.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SIZES)
def test_forward_is_as_exact_as_eager(dtype, shape):
    x, residual = guarded(normal(*shape, dtype=dtype)), guarded(normal(*shape, seed=1) * 2 + 3)
    weight, bias = guarded(normal(shape[-1], seed=2) + 1), guarded(normal(shape[-1], seed=3))
    for given in choices(shape):
        extra = factors(shape[0], shape[-1], dtype, given)
        inputs = [x, residual, weight, bias, EPS, *extra]
        ours = kernels.add_layer_norm(*inputs, dtype)
        eager, exact = (
            reference.add_layer_norm(*some, kind) for some, kind in ((inputs, dtype), (wide(inputs), torch.float64))
        )
        as_exact(ours, eager, exact)
        assert all(intact(t) for t in inputs if isinstance(t, Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(
    ("arrives", "one_pass"), [("both", True), ("both", False), ("normalised", True), ("sum", True)]
)
def test_backward_is_as_exact_as_eager(monkeypatch, dtype, shape, arrives, one_pass):
    monkeypatch.setattr(kernels, "ONE_PASS", 4096 if one_pass else 0)
    gradient, x = (guarded(normal(*shape, dtype=dtype, seed=n)) for n in (5, 6))
    extra, total = (guarded(normal(*shape, seed=n) * 2 + 3) for n in (7, 8))
    weight, (_, mean, rstd) = guarded(normal(shape[-1], seed=9)), reference.layer_norm(total, None, None, EPS, dtype)
    statistics = guarded(mean), guarded(rstd)
    normed = arrives != "sum"
    for given in choices(shape):
        more = factors(shape[0], shape[-1], dtype, given)
        inputs = [gradient if normed else None, None if arrives == "normalised" else extra, total, weight, *statistics]
        inputs += [x, *more]
        every = normed, normed, True, given[0], given[1]
        for flags in (every, (False, normed, given[1], False, given[1])) if shape == SIZES[0] else (every,):
            ours, eager = (impl.add_layer_norm_backward(*inputs, dtype, *flags) for impl in (kernels, reference))
            as_exact(ours, eager, reference.add_layer_norm_backward(*wide(inputs), torch.float64, *flags))
        assert all(intact(t) for t in inputs if t is not None)


@pytest.mark.parametrize("programs", [1, 3, 4])
def test_rows_shared_by_few_programs(monkeypatch, programs):
    """Several tiles a program, and more partial rows than the second kernel takes at once, for four parameters."""
    monkeypatch.setitem(config._forced, "layer_norm_backward", {"PROGRAMS": programs})
    monkeypatch.setitem(config._forced, "layer_norm_sum", {"ROWS": 2})
    gradient, extra, total, x = (normal(7, 11, 96, seed=n) for n in range(4))
    _, mean, rstd = reference.layer_norm(total, None, None, EPS, x.dtype)
    given = normal(96, seed=4), normal(96, seed=5), torch.arange(7.0)
    inputs = gradient, extra, total, normal(96, seed=6), mean, rstd, x, *given, x.dtype, *[True] * 5
    for ours, theirs in zip(kernels.add_layer_norm_backward(*inputs), reference.add_layer_norm_backward(*inputs)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    one, two = (kernels.add_layer_norm_backward(*inputs) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one, two))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2, 8:48],
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(1, 2),
        lambda x: x[0],
        lambda x: x[:, :1].expand(-1, 5, -1),
        lambda x: x.view(3, 2, 4, 48).transpose(1, 2),
        lambda x: x[:, :0],
    ],
)
@pytest.mark.parametrize("used", ["both", "normalised", "sum"])
def test_strided_rows_with_their_gradients(view, used):
    """x and residual are strided apart, parameters and row factors too; the gradients come through the public form."""
    x, residual = view(guarded(normal(3, 8, 48))), view(guarded(normal(3, 8, 48, seed=1))).clone()
    parameters = [normal(2 * x.shape[-1], seed=2 + n)[::2] for n in range(4)]
    row_scale = torch.arange(2.0 * x.shape[0])[::2]
    results = []
    for impl in ("triton", "reference"):
        inputs = [t.detach().requires_grad_() for t in (x, residual, *parameters)]
        out, total = add_layer_norm(
            *inputs[:4], x_bias=inputs[4], scale=inputs[5], row_scale=row_scale, out_dtype=torch.float32, impl=impl
        )
        chosen = {"both": out.sin() + total.cos(), "normalised": out.sin(), "sum": total.cos()}[used]
        chosen.sum().backward()
        results.append([out, total, *(t.grad for t in inputs)])
    for ours, theirs in zip(*results):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_mixed_dtypes():
    x, residual = normal(2, 5, 40, dtype=torch.float16), normal(2, 5, 40, seed=1)
    parameters = [normal(40, dtype=torch.float16 if n % 2 else torch.float32, seed=2 + n) for n in range(4)]
    results = []
    for impl in ("triton", "reference"):
        inputs = [t.detach().requires_grad_() for t in (x, residual, *parameters)]
        row_scale = torch.tensor([0.0, 2.0], dtype=torch.float16)
        out, total = add_layer_norm(
            *inputs[:4], x_bias=inputs[4], scale=inputs[5], row_scale=row_scale, out_dtype=torch.float32, impl=impl
        )
        (out.sin() + total.cos()).sum().backward()
        results.append([out, total, *(t.grad for t in inputs)])
        assert total.dtype == torch.float32
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    assert results[0][2][0].count_nonzero() == 0


def test_the_longest_row_takes_two_passes_with_the_same_result(monkeypatch):
    monkeypatch.setitem(config._forced, "layer_norm_sum", {"LANES": 2048, "ROWS": 2})
    made = [normal(2, 1, 8192, seed=n) for n in range(2)] + [normal(8192, seed=2 + n) for n in range(4)]
    results = []
    for impl in ("triton", "reference"):
        inputs = [t.detach().requires_grad_() for t in made]
        row_scale = torch.tensor([0.5, 2.0])
        out, total = add_layer_norm(*inputs[:4], x_bias=inputs[4], scale=inputs[5], row_scale=row_scale, impl=impl)
        (out.sin() + total.cos()).sum().backward()
        results.append([out, total, *(t.grad for t in inputs)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
