"""A feed-forward layer: what it computes, what it refuses, and how it lives with torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastjepa_kernels import config, mlp
from fastjepa_kernels.traffic import traffic


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def layer(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x [shape], w1 [7, I], b1 [7] and w2 [3, 7]."""
    w1, b1 = normal(7, shape[-1], dtype=dtype, seed=1), normal(7, dtype=dtype, seed=2)
    return [normal(*shape, dtype=dtype), w1, b1, normal(3, 7, dtype=dtype, seed=3)]


def eager(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2)


class Calls(TorchDispatchMode):
    """The names of our operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastjepa":
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5)])
def test_it_is_two_linear_layers_and_a_gelu_with_their_gradients(with_bias, shape):
    given = layer(*shape, dtype=torch.float64)
    ours, theirs = leaves(*given), leaves(*given)
    if not with_bias:
        ours[2] = theirs[2] = None
    out, expected = mlp(*ours), eager(*theirs)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected)
    (out * out.cos()).sum().backward()
    (expected * expected.cos()).sum().backward()
    for mine, other in zip(ours, theirs):
        if mine is not None:
            torch.testing.assert_close(mine.grad, other.grad)


def test_gradients_in_double_precision():
    torch.autograd.gradcheck(mlp, leaves(*layer(4, 5, dtype=torch.float64)))


@pytest.mark.parametrize("wanted", range(1, 16))
def test_each_gradient_comes_alone_or_with_others(wanted):
    given = layer(4, 5)
    chosen = [n for n in range(4) if wanted >> n & 1]
    ours, theirs = ([t.clone().requires_grad_(n in chosen) for n, t in enumerate(given)] for _ in range(2))
    with Calls() as calls:
        mlp(*ours).sin().sum().backward()
    eager(*theirs).sin().sum().backward()
    for n in range(4):
        if n in chosen:
            torch.testing.assert_close(ours[n].grad, theirs[n].grad)
        else:
            assert ours[n].grad is None
    # The last weight's gradient needs nothing of the GELU's.
    assert ("gelu_product_backward_reference" in calls.names) == (chosen != [3])


@pytest.mark.parametrize("suffix", ["", "_reference"])
@pytest.mark.parametrize("grad", [True, False])
def test_the_operators_are_what_torch_expects(suffix, grad):
    operators = torch.ops.fastjepa
    x, w1, b1, w2 = (t.requires_grad_(grad) for t in layer(6, 5))
    for bias in (b1, None):
        library.opcheck(getattr(operators, f"mlp{suffix}").default, (x, w1, bias, w2, True))
    back = getattr(operators, f"gelu_product_backward{suffix}").default
    for wanted in (True, False):
        library.opcheck(back, (normal(6, 3), normal(3, 7, seed=1), normal(6, 7, seed=2), wanted))


def test_it_compiles_whole_and_for_any_length():
    counter = CompileCounter()
    run = torch.compile(mlp, fullgraph=True, backend=counter)
    torch._dynamo.reset()
    weights = leaves(*layer(4, 5)[1:])
    for length in range(2, 22):
        (x,) = leaves(normal(length, 5, seed=length))
        torch._dynamo.mark_dynamic(x, 0)
        out = run(x, *weights)
        torch.testing.assert_close(out, eager(x, *weights))
        out.sum().backward()
    assert counter.frame_count <= 2


def test_compiled_gradients_are_the_eager_ones():
    ours, theirs = leaves(*layer(6, 5)), leaves(*layer(6, 5))
    torch.compile(mlp, fullgraph=True, backend="aot_eager")(*ours).sin().sum().backward()
    mlp(*theirs).sin().sum().backward()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad)


def test_products_are_counted():
    with FlopCounterMode(display=False) as counter:
        out = mlp(*leaves(*layer(4, 5)))
        assert counter.get_total_flops() == 2 * 4 * 7 * (5 + 3)
        out.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 7 * (5 + 3)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_is_what_it_is_for_linear_layers(weights):
    """Biases are float32 whatever the weights are."""
    x, w1, b1, w2 = layer(4, 5)
    ours, theirs = (leaves(x, w1.to(weights), b1, w2.to(weights)) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = mlp(*ours), eager(*theirs)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    out.sum().backward()
    expected.sum().backward()
    for mine, other in zip(ours, theirs):
        assert mine.grad.dtype == mine.dtype
        torch.testing.assert_close(mine.grad, other.grad, rtol=3e-2, atol=3e-2)


def test_weights_of_half_precision_have_gradients_of_it():
    x, w1, b1, w2 = layer(4, 5, dtype=torch.bfloat16)
    given = leaves(x, w1, b1.float(), w2)
    mlp(*given).sum().backward()
    assert [t.grad.dtype for t in given] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    exact = leaves(*(t.detach().double() for t in given))
    eager(*exact).sum().backward()
    for mine, other in zip(given, exact):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=3e-2, atol=3e-2)


def test_without_gradients_nothing_is_kept():
    kept = []

    class Kept(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.namespace == "fastjepa":
                kept.append([t.numel() for t in out[1:]])
            return out

    given = layer(4, 5)
    with Kept():
        mlp(*given)
        with torch.no_grad():
            mlp(*leaves(*given))
        mlp(*given[:3], *leaves(given[3]))
    assert kept == [[0, 0], [0, 0], [28, 28]]
    out, *_ = torch.ops.fastjepa.mlp(*leaves(*given), False)
    with pytest.raises(RuntimeError, match="keep=True"):
        out.sum().backward()


def test_recomputation_gives_out_each_kept_tensor_once():
    ours, theirs = leaves(*layer(4, 5)), leaves(*layer(4, 5))
    with Calls() as calls:
        checkpoint(mlp, *ours, use_reentrant=False).sin().sum().backward()
    mlp(*theirs).sin().sum().backward()
    for mine, other in zip(ours, theirs):
        assert mine.grad.equal(other.grad)
    assert calls.names == ["mlp_reference", "mlp_reference", "gelu_product_backward_reference"]


def test_declared_traffic_is_that_of_the_products_and_of_the_sum_before():
    """The gradient of the GELU's result is nowhere in it; the bias costs a row of sums, twice, a row of tiles."""
    rows, width, outer = 1000, 64, 256
    values = {"device": "meta", "dtype": torch.bfloat16}
    x, w1, w2 = (torch.empty(size, **values) for size in ((rows, width), (outer, width), (width, outer)))
    wide, b1, nothing = torch.empty(rows, outer, **values), torch.empty(outer, device="meta"), torch.empty(0, **values)
    ends, middle = 2 * (x.numel() + w2.numel()), 2 * wide.numel()
    with config.forced("gelu_product_backward", BLOCK_M=100):
        assert traffic("gelu_product_backward", (x, w2, wide, True), (wide, b1)) == (
            2, ends + 2 * middle + 4 * outer + 2 * 10 * 4 * outer,
        )  # fmt: skip
        assert traffic("gelu_product_backward", (x, w2, wide, False), (wide, nothing)) == (1, ends + 2 * middle)
        twice = torch.empty(outer, width, **values).t()
        assert traffic("gelu_product_backward", (x, twice, wide, False), (wide, nothing)).launches == 2
    whole = 2 * (2 * x.numel() + 2 * w2.numel()) + 4 * outer
    assert traffic("mlp", (x, w1, b1, w2, True), (x, wide, wide)) == (2, whole + 3 * middle)
    assert traffic("mlp", (x, w1, b1, w2, False), (x, nothing, nothing)) == (2, whole + 2 * middle)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, w1, b1, w2: mlp(x, w1[0], b1, w2), r"w1 \[O, I\], got \[4, 5\] and \[5\]"),
        (lambda x, w1, b1, w2: mlp(x[:, :2], w1, b1, w2), r"x \[\.\.\., I\]"),
        (lambda x, w1, b1, w2: mlp(x, w1, b1[:2], w2), r"b1 \[7\], got \[2\]"),
        (lambda x, w1, b1, w2: mlp(x, w1, b1, w2.t()), r"w2 \[D, 7\], got \[7, 3\]"),
        (lambda x, w1, b1, w2: mlp(x, w1, b1, w2[0]), r"w2 \[D, 7\], got \[7\]"),
        (lambda x, w1, b1, w2: mlp(x, w1, b1, w2[:0]), r"w2 \[D, 7\], got \[0, 7\]"),
        (lambda x, w1, b1, w2: mlp(x.int(), w1, b1, w2), "floating x"),
        (lambda x, w1, b1, w2: mlp(x, w1, b1, w2.to("meta")), "floating w2 on cpu"),
        (lambda x, w1, b1, w2: mlp(x, w1, b1.int(), w2), "floating b1"),
        (lambda x, w1, b1, w2: mlp(x, w1.half(), b1, w2), "one dtype, got torch.float32, torch.float16 and"),
        (lambda x, w1, b1, w2: mlp(x, w1, b1, w2.half()), "one dtype"),
        (lambda x, w1, b1, w2: mlp(x, w1, b1, w2, impl="fast"), "impl must be one of"),
        (lambda x, w1, b1, w2: mlp(x, w1, b1, w2, impl="triton"), "CUDA device"),
    ],
)
def test_mistakes_are_sentences(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call(*layer(4, 5))
    assert str(caught.value).startswith("mlp: ")
    assert "\n" not in str(caught.value)
