"""Gather and scatter of tokens as operators of torch: values, gradients, compile, refusals."""

import pytest
import torch
from torch import library

from fastjepa.masks import apply_masks
from fastjepa_kernels import explain, gather_tokens, scatter_tokens, use

OPS = torch.ops.fastjepa


def index_of(*shape, tokens, dtype=torch.int64):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(*shape[:-1], tokens, generator=generator).argsort(dim=-1)[..., : shape[-1]].to(dtype)


def values(*shape, dtype=torch.float64, **more):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype, **more)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_it_keeps_what_apply_masks_keeps_in_its_order(dtype):
    x, index = values(2, 9, 6), index_of(3, 2, 5, tokens=9)
    assert torch.equal(gather_tokens(x, index.to(dtype)), apply_masks(x, list(index)))
    assert torch.equal(gather_tokens(x, index[0].to(dtype)), apply_masks(x, index[0]))


def test_scattered_tokens_stand_where_they_were_and_the_fill_elsewhere():
    x, index, fill = values(2, 9, 6), index_of(2, 5, tokens=9), values(6)
    out = scatter_tokens(gather_tokens(x, index), index, 9, fill)
    kept = torch.zeros(2, 9, dtype=torch.bool).scatter_(1, index, True)
    assert torch.equal(out[kept], x[kept])
    assert (out[~kept] == fill).all()
    assert (scatter_tokens(gather_tokens(x, index), index, 9)[~kept] == 0).all()


def test_gradients_in_float64():
    x, fill = values(2, 7, 4, requires_grad=True), values(4, requires_grad=True)
    many, one, twice = index_of(2, 2, 5, tokens=7), index_of(2, 5, tokens=7), torch.tensor([[0, 3, 3], [6, 6, 6]])
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, many), x)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, twice, assume_unique=False), x)
    y = values(2, 5, 4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, fill: scatter_tokens(y, one, 7, fill), (y, fill))
    assert torch.autograd.gradcheck(lambda y: scatter_tokens(y, one, 7), y)


@pytest.mark.parametrize("name", ["", "_reference"])
@pytest.mark.parametrize("kept", [0, 1, 5])
def test_the_operators_keep_their_contract(name, kept):
    x = values(2, 9, 6, dtype=torch.float32, requires_grad=True)
    index = index_of(3, 2, kept, tokens=9)
    library.opcheck(getattr(OPS, f"gather_tokens{name}").default, (x, index, True))
    library.opcheck(
        getattr(OPS, f"gather_tokens{name}").default,
        (x.detach().transpose(0, 1).contiguous().transpose(0, 1), index, True),
    )
    library.opcheck(
        getattr(OPS, f"gather_tokens_backward{name}").default, (values(6, kept, 6, dtype=torch.float32), index, 9, True)
    )
    y = values(2, kept, 6, dtype=torch.float32, requires_grad=True)
    fill = values(6, dtype=torch.float32, requires_grad=True)
    library.opcheck(getattr(OPS, f"scatter_tokens{name}").default, (y, index[0], 9, fill))
    library.opcheck(getattr(OPS, f"scatter_tokens{name}").default, (y, index[0], 9, None))


def test_a_whole_graph_is_compiled_and_lengths_are_dynamic():
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    def step(x, index):
        return scatter_tokens(gather_tokens(x, index) * 2, index, 64)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    x = values(2, 64, 6)
    for kept in range(2, 22):
        index = index_of(2, kept, tokens=64)
        assert torch.equal(compiled(x, index), step(x, index))
    assert len(frames) <= 2
    torch._dynamo.reset()


def test_gradients_come_through_a_compiled_graph():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, i: gather_tokens(x, i).square().sum(), fullgraph=True, backend="aot_eager")
    index = index_of(3, 2, 5, tokens=9)
    eager, graph = (values(2, 9, 6).requires_grad_() for _ in range(2))
    gather_tokens(eager, index).square().sum().backward()
    compiled(graph, index).backward()
    assert torch.equal(eager.grad, graph.grad)
    torch._dynamo.reset()


def test_rows_that_are_not_kept_do_not_matter():
    x, index = values(1, 5, 4), torch.tensor([[0, 2]])
    x[0, [1, 3, 4]] = float("nan")
    x.requires_grad_()
    out = gather_tokens(x, index)
    assert out.isfinite().all()
    out.sum().backward()
    assert torch.equal(x.grad[0, :, 0], torch.tensor([1.0, 0, 1, 0, 0], dtype=torch.float64))


def test_the_choice_is_said_and_a_name_is_an_order():
    x, index = values(1, 5, 4), torch.tensor([[0, 2]])
    assert explain("gather_tokens", x).startswith("gather_tokens: reference, because ")
    with pytest.raises(ValueError, match="gather_tokens: impl='triton' was asked for, but "):
        gather_tokens(x, index, impl="triton")
    with use("triton"), pytest.raises(ValueError, match="scatter_tokens: impl='triton' was asked for"):
        scatter_tokens(x[:, :2], index, 5)
    with use("reference"):
        assert explain("gather_tokens", x) == "gather_tokens: reference, asked for by name"
        gather_tokens(x, index)
    with pytest.raises(ValueError, match="impl must be one of auto, triton, reference, got 'fast'"):
        gather_tokens(x, index, impl="fast")
    with pytest.raises(ValueError, match="got 'fast'"), use("fast"):
        pass


X, INDEX = torch.zeros(2, 9, 6), torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gather_tokens(X[0], INDEX), r"expected x \[B, N, D\] and index .* got \[9, 6\] and \[2, 5\]"),
        (lambda: gather_tokens(X, INDEX[:1]), r"got \[2, 9, 6\] and \[1, 5\]"),
        (lambda: gather_tokens(X, INDEX.float()), "index must be int32 or int64, got torch.float32"),
        (lambda: gather_tokens(X, INDEX.bool()), "index must be int32 or int64, got torch.bool"),
        (lambda: gather_tokens(X.long(), INDEX), "x must be of a floating dtype, got torch.int64"),
        (lambda: gather_tokens(X, INDEX.to("meta")), "x is on cpu, index on meta"),
        (lambda: scatter_tokens(X, INDEX, 9), r"expected x \[B, K, D\] and index \[B, K\]"),
        (lambda: scatter_tokens(X[:, :5], INDEX, 4), "5 kept tokens do not fit into 4"),
        (lambda: scatter_tokens(X[:, :5], INDEX, 9, torch.zeros(5)), r"expected fill \[6\] on cpu, got \[5\]"),
    ],
)
def test_what_does_not_fit_is_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()
