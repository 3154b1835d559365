import pytest
import torch

from fastjepa_kernels import gather_tokens, scatter_tokens
from fastjepa_kernels._triton import gather as kernels
from fastjepa_kernels.reference import gather as reference
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check

SIZES = [(1, 1, 1, 1), (1, 2, 9, 7), (2, 3, 40, 33), (3, 1, 8, 8)]  # masks, clips, tokens, kept


def index_of(masks, clips, tokens, kept, dtype=torch.int64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(masks, clips, tokens, generator=generator).argsort(dim=-1)
    return order[..., :kept].to(dtype)


def values(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(x, index):
    """NaN in every row that no mask names."""
    named = torch.zeros(x.shape[:2], dtype=torch.bool)
    for mask in index.long():
        named.scatter_(1, mask, True)
    return torch.where(named.unsqueeze(-1), x, float("nan"))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("width", [24, 40, 96, 1000, 1408])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_those_of_the_reference_bit_for_bit(sizes, width, dtype):
    _masks, clips, tokens, _kept = sizes
    index = guarded(index_of(*sizes, torch.int32 if dtype is torch.float16 else torch.int64))
    x = guarded(poisoned(values(clips, tokens, width, dtype=dtype), index))
    assert torch.equal(kernels.gather(x, index), reference.gather(x, index))
    assert intact(x)
    assert intact(index)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("width", [24, 1000])
def test_the_gradient_is_as_exact_as_that_of_torch(sizes, width):
    masks, clips, tokens, kept = sizes
    index = index_of(*sizes)
    for dtype in (torch.float32, torch.float16):
        gradient = guarded(values(masks * clips, kept, width, dtype=dtype))
        for unique in (True, False):
            check(
                lambda g, unique=unique: kernels.gather_backward(g, index, tokens, unique),
                lambda g: reference.gather_backward(g, index, tokens, True),
                gradient,
            )
        assert intact(gradient)


def test_a_token_that_is_named_twice_gets_both_gradients():
    index = torch.tensor([[[2, 0, 2, 2]], [[1, 1, 3, 2]]])
    gradient = values(2, 4, 24)
    want = reference.gather_backward(gradient, index, 5, False)
    assert torch.allclose(kernels.gather_backward(gradient, index, 5, False), want, atol=1e-6)
    assert not torch.allclose(kernels.gather_backward(gradient, index, 5, True), want, atol=1e-3)
    assert (want[0, 4] == 0).all()


def test_strided_tokens_are_read_in_place():
    packed = values(2, 9, 3, 40)
    index = index_of(1, 2, 9, 5)
    assert torch.equal(kernels.gather(packed[:, :, 1], index), reference.gather(packed[:, :, 1], index))
    turned = values(2, 40, 9).transpose(1, 2)
    assert torch.equal(kernels.gather(turned, index), reference.gather(turned, index))


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("sizes", [(1, 2, 9, 7), (1, 3, 40, 33), (1, 1, 4, 4), (1, 2, 5, 0)])
def test_scattered_rows_are_those_of_the_reference(sizes, fill):
    _, clips, tokens, kept = sizes
    for width in (24, 1000):
        x = guarded(values(clips, kept, width))
        row = guarded(values(width, seed=2)) if fill else None
        index = index_of(*sizes)[0]
        assert torch.equal(kernels.scatter(x, index, tokens, row), reference.scatter(x, index, tokens, row))
        assert intact(x)


def test_nothing_kept_is_an_empty_result_with_a_gradient():
    x = values(2, 9, 24).requires_grad_()
    gather_tokens(x, torch.zeros(2, 0, dtype=torch.int64)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_the_public_functions_run_the_kernels(monkeypatch):
    launched = []
    for name in ("gather", "gather_backward", "scatter"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, real=real: launched.append(name) or real(*a))
    x = values(2, 9, 24).requires_grad_()
    fill = values(24, seed=2).requires_grad_()
    index = index_of(1, 2, 9, 5)[0]
    scatter_tokens(gather_tokens(x, index), index, 9, fill).square().sum().backward()
    assert launched == ["gather", "scatter", "gather", "gather_backward"]
    ours = x.grad, fill.grad
    x.grad = fill.grad = None
    out = scatter_tokens(gather_tokens(x, index, impl="reference"), index, 9, fill, impl="reference")
    out.square().sum().backward()
    assert len(launched) == 4
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, (x.grad, fill.grad)))


def test_two_runs_are_the_same_bit_for_bit():
    index = index_of(3, 2, 20, 15)
    gradient = values(6, 15, 40)
    first, second = (kernels.gather_backward(gradient, index, 20, True) for _ in range(2))
    assert torch.equal(first, second)
