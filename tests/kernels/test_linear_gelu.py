"""The first half of a feed-forward layer: what it computes, what it refuses, and how it lives with torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from fastjepa_kernels import linear_gelu

FORMS = ["library", "fused"]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_it_is_gelu_of_linear_with_its_gradients(form, with_bias, shape):
    given = [normal(*shape), normal(7, 5, seed=1), *([normal(7, seed=2)] if with_bias else [])]
    ours, theirs = leaves(*given), leaves(*given)
    out, expected = linear_gelu(*ours, form=form), F.gelu(F.linear(*theirs))
    torch.testing.assert_close(out, expected)
    (out * out.cos()).sum().backward()
    (expected * expected.cos()).sum().backward()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_in_double_precision(form):
    given = leaves(normal(4, 5).double(), normal(3, 5, seed=1).double(), normal(3, seed=2).double())
    torch.autograd.gradcheck(lambda *t: linear_gelu(*t, form=form), given)


@pytest.mark.parametrize("suffix", ["", "_reference"])
@pytest.mark.parametrize("grad", [True, False])
def test_the_operators_are_what_torch_expects(suffix, grad):
    operators = torch.ops.fastjepa
    x, weight, bias = (t.requires_grad_(grad) for t in (normal(6, 5), normal(7, 5, seed=1), normal(7, seed=2)))
    library.opcheck(getattr(operators, f"linear_gelu{suffix}").default, (x, weight, bias, True))
    product = normal(6, 7).requires_grad_(grad)
    library.opcheck(getattr(operators, f"bias_gelu{suffix}").default, (product, bias))
    back = getattr(operators, f"bias_gelu_backward{suffix}").default
    library.opcheck(back, (normal(6, 7), normal(6, 7, seed=3), normal(7), True))


@pytest.mark.parametrize("form", FORMS)
def test_it_compiles_whole_and_for_any_length(form):
    counter = CompileCounter()
    run = torch.compile(lambda *t: linear_gelu(*t, form=form), fullgraph=True, backend=counter)
    torch._dynamo.reset()
    weight, bias = leaves(normal(7, 5, seed=1), normal(7, seed=2))
    for length in range(2, 22):
        (x,) = leaves(normal(length, 5, seed=length))
        torch._dynamo.mark_dynamic(x, 0)
        out = run(x, weight, bias)
        torch.testing.assert_close(out, F.gelu(F.linear(x, weight, bias)))
        out.sum().backward()
    assert counter.frame_count <= 2


def test_compiled_gradients_are_the_eager_ones():
    for form in FORMS:
        ours, theirs = (leaves(normal(6, 5), normal(7, 5, seed=1), normal(7, seed=2)) for _ in range(2))
        run = torch.compile(lambda *t, form=form: linear_gelu(*t, form=form), fullgraph=True, backend="aot_eager")
        run(*ours).sin().sum().backward()
        linear_gelu(*theirs, form=form).sin().sum().backward()
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("form", FORMS)
def test_products_are_counted(form):
    given = leaves(normal(4, 5), normal(7, 5, seed=1), normal(7, seed=2))
    with FlopCounterMode(display=False) as counter:
        linear_gelu(*given, form=form).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 5 * 7


@pytest.mark.parametrize("form", FORMS)
def test_autocast_is_what_it_is_for_a_linear_layer(form):
    given = normal(4, 5), normal(7, 5, seed=1), normal(7, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = linear_gelu(*given, form=form), F.gelu(F.linear(*given))
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("form", FORMS)
def test_the_gelu_is_the_exact_one(form):
    """The tanh form is off by up to 5e-4."""
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)[:, None]
    exact = x * torch.special.ndtr(x)
    assert (linear_gelu(x, torch.ones(1, 1).double(), form=form) - exact).abs().max() < 1e-12


def test_without_gradients_nothing_is_kept():
    out, before = torch.ops.fastjepa.linear_gelu(normal(4, 5), normal(7, 5), None, False)
    assert before.numel() == 0
    x = leaves(normal(4, 5))[0]
    out, _ = torch.ops.fastjepa.linear_gelu(x, normal(7, 5), None, False)
    with pytest.raises(RuntimeError, match="keep=True"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, w, b: linear_gelu(x, w[0]), r"weight \[O, I\]"),
        (lambda x, w, b: linear_gelu(x[:, :3], w), r"x \[\.\.\., I\]"),
        (lambda x, w, b: linear_gelu(x, w, b[:2]), r"bias \[7\]"),
        (lambda x, w, b: linear_gelu(x.int(), w), "floating x"),
        (lambda x, w, b: linear_gelu(x, w.to("meta")), "floating weight on cpu"),
        (lambda x, w, b: linear_gelu(x, w.half()), "one dtype"),
        (lambda x, w, b: linear_gelu(x, w, b, form="tanh"), "form must be one of auto, library, fused"),
        (lambda x, w, b: linear_gelu(x, w, b, impl="fast"), "impl must be one of"),
        (lambda x, w, b: linear_gelu(x, w, b, impl="triton"), "CUDA device"),
    ],
)
def test_mistakes_are_sentences(call, words):
    with pytest.raises(ValueError, match=words):
        call(normal(4, 5), normal(7, 5), normal(7))
