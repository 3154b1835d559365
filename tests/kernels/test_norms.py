"""Layer normalisation: what it computes, what it refuses, and how it lives with autograd and torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastjepa_kernels import add_layer_norm, layer_norm, layer_norm_through

SHAPES = [(24,), (7, 40), (2, 33, 96), (2, 3, 1, 24)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [(False, False), (True, False), (False, True), (True, True)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], affine: tuple[bool, bool]) -> None:
    width = shape[-1]
    inputs = [
        normal(*shape) * 3 + 5,
        *(normal(width, seed=1 + n) + 1 if given else None for n, given in enumerate(affine)),
    ]
    ours, theirs = ([None if x is None else leaf(x) for x in inputs] for _ in range(2))
    upstream = normal(*shape, seed=9)
    out = layer_norm(*ours)
    expected = F.layer_norm(theirs[0], (width,), *theirs[1:], eps=1e-6)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.backward(upstream)
    expected.backward(upstream)
    for mine, other in zip(ours, theirs):
        if mine is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_its_normalised_form_are_those_of_two_steps(shape: tuple[int, ...]) -> None:
    width = shape[-1]
    inputs = normal(*shape), normal(*shape, seed=1) * 2 - 3, normal(width, seed=2) + 1, normal(width, seed=3)
    ours, theirs = ([leaf(x) for x in inputs] for _ in range(2))
    out, total = add_layer_norm(*ours)
    expected_total = theirs[0] + theirs[1]
    expected = F.layer_norm(expected_total, (width,), *theirs[2:], eps=1e-6)
    assert total.equal(expected_total)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    first, second = normal(*shape, seed=8), normal(*shape, seed=9)
    torch.autograd.backward([out, total], [first, second])
    torch.autograd.backward([expected, expected_total], [first, second])
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_a_norm_that_hands_its_rows_on_adds_their_gradient_in_its_own_pass(used: tuple[bool, bool]) -> None:
    inputs = normal(2, 33, 96), normal(96, seed=2) + 1, normal(96, seed=3)
    ours, theirs = ([leaf(x) for x in inputs] for _ in range(2))
    results = layer_norm_through(*ours)
    expected = F.layer_norm(theirs[0], (96,), *theirs[1:], eps=1e-6), theirs[0] * 1
    assert results[1].equal(ours[0])
    for found, wanted in zip(results, expected):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    upstream = normal(2, 33, 96, seed=8), normal(2, 33, 96, seed=9)
    calls = Calls()
    with calls:
        torch.autograd.backward(
            [one for one, use in zip(results, used) if use], [one for one, use in zip(upstream, used) if use]
        )
    torch.autograd.backward(
        [one for one, use in zip(expected, used) if use], [one for one, use in zip(upstream, used) if use]
    )
    for mine, other in zip(ours, theirs):
        if other.grad is None:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert calls.names.count("layer_norm_backward_reference") == used[0]
    assert "add" not in calls.names


class Calls(TorchDispatchMode):
    """Which operators are called, from outside those of the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_a_norm_that_hands_its_rows_on_compiles_and_refuses_as_the_plain_one() -> None:
    x, weight = leaf(normal(7, 40)), leaf(normal(40, seed=1))
    plain = layer_norm_through(x, weight)
    compiled = torch.compile(layer_norm_through, backend="aot_eager", fullgraph=True)(x, weight)
    for one, other in zip(plain, compiled):
        assert one.equal(other)
    with pytest.raises(ValueError, match=r"layer_norm_through: expected a floating weight \[40\]"):
        layer_norm_through(x, normal(41))


@pytest.mark.parametrize("used", ["normalised", "sum"])
def test_a_result_that_is_not_used_has_no_part_in_the_gradient(used: str) -> None:
    x, residual, weight = leaf(normal(5, 24)), leaf(normal(5, 24, seed=1)), leaf(normal(24, seed=2))
    out, total = add_layer_norm(x, residual, weight)
    (out if used == "normalised" else total).sin().sum().backward()
    a, b, w = leaf(x), leaf(residual), leaf(weight)
    expected = F.layer_norm(a + b, (24,), w, eps=1e-6) if used == "normalised" else a + b
    expected.sin().sum().backward()
    torch.testing.assert_close(x.grad, a.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(residual.grad, b.grad, rtol=1e-4, atol=1e-5)
    if used == "sum":
        assert weight.grad is None
    else:
        torch.testing.assert_close(weight.grad, w.grad, rtol=1e-4, atol=1e-5)


def test_statistics_of_half_precision_are_of_float32_and_carry_no_gradient() -> None:
    x = leaf(normal(3, 40, dtype=torch.bfloat16) + 100)
    out, mean, rstd = torch.ops.fastjepa.layer_norm_reference(x, None, None, 1e-6, torch.float32)
    assert (out.dtype, mean.dtype, rstd.dtype) == (torch.float32,) * 3
    assert out.requires_grad
    assert not mean.requires_grad
    assert not rstd.requires_grad
    torch.testing.assert_close(out, F.layer_norm(x.float(), (40,), eps=1e-6), rtol=1e-5, atol=1e-5)


def test_dtypes_of_results_and_gradients() -> None:
    x, residual = leaf(normal(3, 40, dtype=torch.bfloat16)), leaf(normal(3, 40))
    weight, bias = leaf(normal(40, dtype=torch.float16)), leaf(normal(40))
    out, total = add_layer_norm(x, residual, weight, bias)
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    (out.float() + total).sum().backward()
    assert [t.grad.dtype for t in (x, residual, weight, bias)] == [t.dtype for t in (x, residual, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer_norm(x, weight, bias).dtype == torch.bfloat16
    assert layer_norm(residual, out_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_no_gradient_is_computed_that_nobody_asked_for() -> None:
    x, weight = leaf(normal(3, 24)), normal(24)
    layer_norm(x, weight, leaf(normal(24))).sum().backward()
    assert weight.grad is None


def test_strided_and_empty_inputs() -> None:
    x = normal(3, 8, 48)
    for view in (x[:, ::2, 4:28], x.transpose(0, 1), x.transpose(1, 2), x[0, 0].expand(4, 5, 48)):
        out = layer_norm(view)
        assert out.is_contiguous()
        torch.testing.assert_close(out, F.layer_norm(view, view.shape[-1:], eps=1e-6), rtol=1e-5, atol=1e-5)
    empty, weight = leaf(normal(0, 24)), leaf(normal(24))
    layer_norm(empty, weight).sum().backward()
    assert empty.grad.shape == (0, 24)
    assert weight.grad.equal(torch.zeros(24))


def test_gradients_are_the_derivatives() -> None:
    x, residual, weight, bias = (
        leaf(normal(*shape, dtype=torch.float64, seed=n)) for n, shape in enumerate([(2, 3, 5), (2, 3, 5), (5,), (5,)])
    )
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias))
    assert torch.autograd.gradcheck(layer_norm, (x,))
    assert torch.autograd.gradcheck(add_layer_norm, (x, residual, weight, bias))
    assert torch.autograd.gradcheck(lambda *both: add_layer_norm(*both, None, bias), (x, residual))


@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_reference"])
def test_torch_accepts_the_operators(name: str) -> None:
    x, weight, bias = leaf(normal(2, 3, 8)), leaf(normal(8)), leaf(normal(8))
    one = getattr(torch.ops.fastjepa, name).default
    library.opcheck(one, (x, weight, bias, 1e-6, torch.bfloat16))
    library.opcheck(one, (x.detach().transpose(0, 1), None, None, 1e-6, torch.float32))
    add = getattr(torch.ops.fastjepa, f"add_{name}").default
    residual = leaf(normal(2, 3, 8, dtype=torch.bfloat16))
    library.opcheck(add, (x, residual, weight, bias, 1e-6, None, None, None, torch.float32))
    backward = getattr(torch.ops.fastjepa, name.replace("norm", "norm_backward")).default
    mean = normal(2, 3)
    for extra, factor, flags in ((None, None, (False, False)), (normal(2, 3, 8), normal(8), (True, True))):
        library.opcheck(backward, (normal(2, 3, 8), extra, x.detach(), factor, mean, mean.exp(), *flags))


def test_compiles_whole_with_few_recompiles_over_many_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, total = add_layer_norm(x, residual, weight, bias, impl="reference")
        return layer_norm(out, weight, out_dtype=torch.bfloat16, impl="reference").float(), total

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in range(2, 22):
        inputs = normal(2, length, 24), normal(2, length, 24, seed=1), normal(24, seed=2), normal(24, seed=3)
        ours, theirs = ([leaf(x) for x in inputs] for _ in range(2))
        results, expected = compiled(*ours), step(*theirs)
        sum((result * result.cos()).sum() for result in results).backward()
        sum((result * result.cos()).sum() for result in expected).backward()
        for mine, other in zip((*results, *(x.grad for x in ours)), (*expected, *(x.grad for x in theirs))):
            torch.testing.assert_close(mine, other)
    assert counter.frame_count <= 2


def test_repeats_bit_by_bit() -> None:
    def gradients() -> list[Tensor]:
        inputs = [leaf(normal(65, 24)), leaf(normal(24)), leaf(normal(24))]
        layer_norm(*inputs).sin().sum().backward()
        return [x.grad for x in inputs]

    assert all(one.equal(other) for one, other in zip(gradients(), gradients()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: layer_norm(x.int()), "floating dtype"),
        (lambda x: layer_norm(x[0, 0]), "at least one channel"),
        (lambda x: layer_norm(x[:, :0]), "at least one channel"),
        (lambda x: layer_norm(x, x[0, :3]), r"weight \[8\]"),
        (lambda x: layer_norm(x, None, x[:1]), r"bias \[8\]"),
        (lambda x: layer_norm(x, x[0].long()), "floating weight"),
        (lambda x: layer_norm(x, eps=-1.0), "negative"),
        (lambda x: layer_norm(x, out_dtype=torch.int32), "out_dtype"),
        (lambda x: layer_norm(x, impl="triton"), "CUDA device"),
        (lambda x: layer_norm(x, impl="fast"), "impl must be one of"),
        (lambda x: add_layer_norm(x, x[0]), "floating residual"),
        (lambda x: add_layer_norm(x, x.long()), "floating residual"),
        (lambda x: add_layer_norm(x, x.to("meta")), "floating residual"),
    ],
)
def test_mistakes_are_sentences(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(normal(4, 8))


def test_flops_are_counted_as_for_torch_own() -> None:
    with FlopCounterMode(display=False) as counter:
        layer_norm(leaf(normal(4, 8))).sum().backward()
    assert counter.get_total_flops() == 0
