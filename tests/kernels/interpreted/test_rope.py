"""The Triton kernel of rotary positions in the interpreter, against the reference. float32 and float16 only."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels import Rope, rope3d
from fastjepa_kernels._triton import rope as kernels
from fastjepa_kernels._triton.angles import sine_cosine
from fastjepa_kernels.reference import rope as reference
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check

pytestmark = pytest.mark.usefixtures("results_are_poisoned")

DTYPES = [torch.float32, torch.float16]
SIZES = [(1, 24), (33, 24), (7, 32), (1, 64), (7, 80), (7, 88), (1, 104), (7, 128), (33, 7)]
HEIGHT, WIDTH = 14, 11


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 16 * HEIGHT * WIDTH, shape, generator=torch.Generator().manual_seed(seed))


@triton.jit
def angles_kernel(angle, sine, cosine, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    first, second = sine_cosine(tl.load(angle + place))
    tl.store(sine + place, first)
    tl.store(cosine + place, second)


def test_sine_and_cosine_are_exact_to_a_rounding() -> None:
    angle = torch.cat([torch.linspace(0, 8, 2048), torch.rand(2048, generator=torch.Generator().manual_seed(0)) * 1e4])
    sine, cosine = torch.empty_like(angle), torch.empty_like(angle)
    angles_kernel[(1,)](angle, sine, cosine, COUNT=4096)
    for result, exact in ((sine, angle.double().sin()), (cosine, angle.double().cos())):
        assert (result - exact).abs().max() < 1.3e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("length", "head"), SIZES)
def test_as_exact_as_eager(dtype: torch.dtype, compat: bool, back: bool, length: int, head: int) -> None:
    q, k = (guarded(normal(2, length, heads, head, dtype=dtype, seed=heads)) for heads in (3, 2))
    ids = guarded(numbers(2, length))
    settings = HEIGHT, WIDTH, 10000.0, compat, back
    for part in range(2):
        check(
            lambda q, k, part=part: kernels.rope3d(q, k, ids, *settings)[part],
            lambda q, k, part=part: reference.rope3d(q, k, ids, *settings)[part],
            q, k,
        )  # fmt: skip
    check(
        lambda q: kernels.rope3d(q, None, ids, *settings)[0],
        lambda q: reference.rope3d(q, None, ids, *settings)[0],
        q,
    )
    assert all(intact(t) for t in (q, k, ids))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: (x[:, :, 0], x[:, :, 1]),
        lambda x: (x[:, ::2, 2], x[:, 1::2, 0, :3]),
        lambda x: (x[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2), x[:, :, 1]),
        lambda x: (x[:1, :, 0].expand(2, -1, -1, -1), x[..., 1, :, 4:28].contiguous().repeat(1, 1, 1, 2)[..., :32]),
        lambda x: (x[:, :0, 0], x[:, :0, 1]),
    ],
)
@pytest.mark.parametrize("compat", [False, True])
def test_strided_inputs_with_their_gradients(view, compat: bool) -> None:
    qkv = guarded(normal(2, 6, 3, 4, 32))
    results = []
    for impl in ("triton", "reference"):
        leaf = qkv.detach().requires_grad_()
        q, k = view(leaf)
        ids = numbers(2, 2 * q.shape[1])[:, ::2].int()
        rope = Rope((16, HEIGHT, WIDTH), theta=500.0, compat=compat)
        first, second = rope3d((q, k), ids, rope, impl=impl)
        alone = rope3d(k, ids[1], rope, impl=impl)
        (first.sin().sum() + second.cos().sum() + (alone * alone).sum()).backward()
        results.append([first, second, alone, leaf.grad])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert results[0][0].is_contiguous()


def test_a_bad_value_stays_in_its_pair_and_an_infinity_that_does_not_turn_stays_one() -> None:
    x, ids = normal(1, 2, 1, 32), numbers(1, 2)
    x[0, 0, 0, 4], x[0, 1, 0, 31] = float("nan"), float("inf")
    out = rope3d(x, ids, Rope((16, HEIGHT, WIDTH)), impl="triton")
    assert out.isnan().nonzero().tolist() == [[0, 0, 0, 4], [0, 0, 0, 5]]
    assert out[0, 1, 0, 31] == float("inf")


def test_repeats_bit_by_bit() -> None:
    x, ids = normal(2, 33, 3, 88), numbers(2, 33)
    one, two = (rope3d(x, ids, Rope((16, HEIGHT, WIDTH)), impl="triton") for _ in range(2))
    assert one.equal(two)
