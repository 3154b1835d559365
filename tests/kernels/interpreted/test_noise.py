"""The kernels of the noise in Triton's interpreter, against the reference. float32 and float16 only."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels import config, gather_norm_noise, layer_norm_noise, philox_normal, row_keys
from fastjepa_kernels._triton import noise as kernels
from fastjepa_kernels._triton import philox as philox_kernels
from fastjepa_kernels.reference import noise as reference
from fastjepa_kernels.reference import philox as philox_reference
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check

pytestmark = pytest.mark.usefixtures("results_are_poisoned")

DTYPES = [torch.float32, torch.float16]
SIZES = [(1, 24), (7, 40), (33, 96), (33, 3), (1, 1001)]  # kept tokens, width
EPS = 1e-5


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def index_of(clips: int, tokens: int, kept: int) -> Tensor:
    return torch.rand(clips, tokens, generator=torch.Generator().manual_seed(7)).argsort(dim=-1)[:, :kept].contiguous()


@triton.jit
def words_kernel(counter, key, out, count, BLOCK: tl.constexpr):
    """counter, out [4, count] and key [2, count] as int64."""
    lane = tl.arange(0, BLOCK)
    used = lane < count
    c0 = tl.load(counter + lane, mask=used, other=0).to(tl.uint32)
    c1 = tl.load(counter + count + lane, mask=used, other=0).to(tl.uint32)
    c2 = tl.load(counter + 2 * count + lane, mask=used, other=0).to(tl.uint32)
    c3 = tl.load(counter + 3 * count + lane, mask=used, other=0).to(tl.uint32)
    k0 = tl.load(key + lane, mask=used, other=0).to(tl.uint32)
    k1 = tl.load(key + count + lane, mask=used, other=0).to(tl.uint32)
    w0, w1, w2, w3 = philox_kernels.philox(c0, c1, c2, c3, k0, k1)
    tl.store(out + lane, w0.to(tl.int64), mask=used)
    tl.store(out + count + lane, w1.to(tl.int64), mask=used)
    tl.store(out + 2 * count + lane, w2.to(tl.int64), mask=used)
    tl.store(out + 3 * count + lane, w3.to(tl.int64), mask=used)


@triton.jit
def row_words_kernel(row_key, seed, out, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """out [4, ROWS, GROUPS], the words that the noise of whole rows is made of."""
    row, group = tl.arange(0, ROWS), tl.arange(0, GROUPS)
    w0, w1, w2, w3 = philox_kernels.words(tl.load(row_key + row), tl.load(seed), group)
    at = out + row[:, None] * GROUPS + group[None, :]
    tl.store(at, w0.to(tl.int64))
    tl.store(at + ROWS * GROUPS, w1.to(tl.int64))
    tl.store(at + 2 * ROWS * GROUPS, w2.to(tl.int64))
    tl.store(at + 3 * ROWS * GROUPS, w3.to(tl.int64))


@triton.jit
def pair_kernel(first, second, out, count, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    used = lane < count
    one = tl.load(first + lane, mask=used, other=0).to(tl.uint32)
    two = tl.load(second + lane, mask=used, other=0).to(tl.uint32)
    across, along = philox_kernels.pair_of_normals(one, two)
    tl.store(out + lane, across, mask=used)
    tl.store(out + count + lane, along, mask=used)


def test_words_are_the_published_ones_and_those_of_the_reference() -> None:
    full = 2**32 - 1
    counters = [(0, 0, 0, 0), (full,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    keys = [(0, 0), (full, full), (0xA4093822, 0x299F31D0)]
    published = [
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ]
    random = torch.randint(0, 2**32, (6, 200), generator=torch.Generator().manual_seed(0))
    counter = torch.cat([torch.tensor(counters).T, random[:4]], dim=1).contiguous()
    key = torch.cat([torch.tensor(keys).T, random[4:]], dim=1).contiguous()
    out = torch.full_like(counter, -1)
    words_kernel[(1,)](counter, key, out, counter.shape[1], BLOCK=256)
    assert [tuple(words) for words in out[:, :3].T.tolist()] == published
    assert out.equal(torch.stack(philox_reference.philox(tuple(counter), tuple(key))))


def test_words_of_rows_are_those_of_the_reference_bit_by_bit() -> None:
    keys = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**62 + 5, 2**63 - 1, -1])
    for start in (0, 5, 2**31, 2**32 + 7, 2**63 - 1):
        seed, out = torch.tensor(start), torch.full((4, 8, 16), -1)
        row_words_kernel[(1,)](keys, seed, out, ROWS=8, GROUPS=16)
        assert out.permute(1, 2, 0).equal(philox_reference.philox_words(keys, 64, seed))


def test_normals_are_exact_in_every_part_of_the_turn_and_far_out() -> None:
    """Near the float64 of the same words; the error of an angle is small beside the whole turn."""
    turns = [n * 2**28 + d for n in range(17) for d in (-2, -1, 0, 1, 2) if 0 <= n * 2**28 + d < 2**32]
    radii = [0, 1, 2, 100, 2**16, 2**24, 2**30, 2**31, 2**32 - 2**20, 2**32 - 256, 2**32 - 1]
    first, second = (
        grid.flatten().contiguous() for grid in torch.meshgrid(torch.tensor(radii), torch.tensor(turns), indexing="ij")
    )
    out = torch.full((2, len(first)), float("nan"))
    pair_kernel[(1,)](first, second, out, len(first), BLOCK=1024)
    exact = philox_reference.normals(torch.stack([first, second] * 2, dim=-1))[:, :2].T
    assert (out - exact).abs().max() < 1e-6


@pytest.mark.parametrize("width", [1, 3, 24, 37, 200])
@pytest.mark.parametrize("rows", [0, 1, 7, 33])
def test_normal_rows_are_those_of_the_reference(rows: int, width: int) -> None:
    keys = guarded(row_keys(torch.arange(rows) + 2**30, torch.arange(rows), 3))
    seed = torch.tensor(2**40 + 11)
    ours, theirs = (philox_normal(keys, width, seed, impl=impl) for impl in ("triton", "reference"))
    assert ours.shape == (rows, width)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert intact(keys)


@pytest.mark.parametrize("tile", [64, 256, 4096])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    keys, x, alpha = (
        torch.arange(9) * 2**33,
        normal(9, 40),
        torch.rand(9, generator=torch.Generator().manual_seed(2)),
    )
    whole, mixed = philox_normal(keys, 40, 5), layer_norm_noise(x, alpha, keys, 5)
    monkeypatch.setitem(config._forced, "philox_normal", {"ROWS": max(1, tile // 64)})
    assert philox_normal(keys, 40, 5).equal(whole)
    assert philox_normal(keys.flip(0), 24, 5).equal(whole.flip(0)[:, :24])
    torch.testing.assert_close(layer_norm_noise(x, alpha, keys, 5), mixed)
    silent = torch.zeros(9)
    assert layer_norm_noise(x, silent, keys, 5).equal(whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kept", "width"), SIZES)
def test_forward_and_backward_are_as_exact_as_eager(dtype: torch.dtype, kept: int, width: int) -> None:
    clips, tokens = 2, kept + 3
    index = guarded(index_of(clips, tokens, kept))
    left_out = torch.ones(clips, tokens, dtype=torch.bool).scatter_(1, index, False).unsqueeze(-1)
    x = guarded((normal(clips, tokens, width, dtype=dtype) * 2 + 3).masked_fill(left_out, float("nan")))
    rows = guarded(normal(clips, kept, width, dtype=dtype, seed=1) * 2 + 3)
    table, noise = guarded(normal(tokens, width, seed=2)), guarded(normal(clips, kept, width, dtype=dtype, seed=3))
    keys, seed = guarded(row_keys(torch.arange(clips)[:, None], index)), torch.tensor(13)
    alpha = guarded(torch.tensor([0.3, 0.8]))

    drawn, recorded = (keys, seed, None), (None, None, noise)
    for source, draw, place, where in (
        (x, drawn, table, index),
        (x, recorded, None, index),
        (rows, drawn, None, None),
        (rows, recorded, guarded(table[:kept]), None),
    ):
        name, more = ("layer_norm_noise", ()) if where is None else ("gather_norm_noise", (where,))
        results = getattr(kernels, name)(source, *more, alpha, *draw, place, EPS, dtype)
        for part, result in enumerate(results):

            def expected(
                x: Tensor, n: str = name, m: tuple = more, d: tuple = draw, p=place, part: int = part
            ) -> Tensor:
                return getattr(reference, n)(x, *m, alpha, *d, p, EPS, x.dtype)[part]

            check(lambda x, result=result: result, expected, source)
    gradient = guarded(normal(clips, kept, width, dtype=dtype, seed=4))
    for source, where in ((x, index), (rows, None)):
        _, mean, rstd = reference.layer_norm_noise(
            rows if where is None else torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, width)),
            alpha, None, None, noise, None, EPS, dtype,
        )  # fmt: skip
        mean, rstd = guarded(mean), guarded(rstd)
        exact = source if where is None else source.nan_to_num(0.0)
        check(
            lambda g, s=source, w=where, m=mean, r=rstd: kernels.noise_backward(g, s, w, alpha, m, r),
            lambda g, s=exact, w=where, m=mean, r=rstd: reference.noise_backward(
                g, s.to(g.dtype), w, alpha.to(g.dtype) if g.dtype == torch.float64 else alpha,
                m.to(torch.promote_types(g.dtype, torch.float32)), r.to(torch.promote_types(g.dtype, torch.float32)),
            ),
            gradient,
        )  # fmt: skip
    assert all(intact(t) for t in (x, rows, index, table, noise, keys, alpha, gradient))


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
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_strided_rows_and_gradients_and_any_alpha(view, dims: int) -> None:
    x = view(guarded(normal(3, 8, 48)))
    if dims >= x.ndim:
        return
    alpha = torch.rand(x.shape[:dims], generator=torch.Generator().manual_seed(5))
    keys = torch.arange(x.numel() // x.shape[-1]).view(x.shape[:-1]) + 2**40
    place = normal(*x.shape[1:], seed=3) if x.ndim > 1 else normal(*x.shape, seed=3)
    upstream = normal(*x.shape[:-1], x.shape[-1] + 5, seed=4)[..., 5:]
    results = []
    for impl in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        out = layer_norm_noise(leaf, alpha, keys, 7, position=place, impl=impl)
        out.backward(upstream)
        results.append((out, leaf.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert results[0][0].is_contiguous()


@pytest.mark.parametrize("kept", [0, 1, 5, 9])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gathered_rows_with_their_gradients(kept: int, dtype: torch.dtype) -> None:
    index = index_of(2, 9, kept)
    wide, table, noise = normal(2, 9, 3, 40), normal(9, 40, seed=1), normal(2, kept, 40, seed=2)
    keys = row_keys(torch.arange(2)[:, None], index, 2)
    for alpha in (torch.tensor(0.4), torch.tensor([0.2, 0.9]), torch.rand(2, kept)):
        for draw in ({"row_key": keys, "seed": 3}, {"noise": noise.half()}):
            results = []
            for impl in ("triton", "reference"):
                leaf = wide.detach().requires_grad_()
                given = leaf[:, :, 1], index.to(dtype), alpha
                out = gather_norm_noise(*given, position=table, out_dtype=torch.float32, impl=impl, **draw)
                out.sin().sum().backward()
                results.append((out, leaf.grad))
            for ours, theirs in zip(*results):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_noise_of_a_row_is_the_same_gathered_or_not_and_repeats() -> None:
    x, index, alpha = normal(2, 9, 40), index_of(2, 9, 5), torch.tensor([0.2, 0.9])
    keys = row_keys(torch.arange(2)[:, None], index, 2)
    rows = torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, 40))
    first = gather_norm_noise(x, index, alpha, keys, 3)
    assert first.equal(gather_norm_noise(x, index, alpha, keys, 3))
    assert first.equal(layer_norm_noise(rows, alpha, keys, 3))
    assert first[:, [3, 1]].equal(layer_norm_noise(rows[:, [3, 1]], alpha, keys[:, [3, 1]], 3))
    assert not first.equal(gather_norm_noise(x, index, alpha, keys, 4))


def test_the_kernels_run_when_the_public_functions_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("layer_norm_noise", "gather_norm_noise", "noise_backward"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, real=real: ran.append(name) or real(*a))
    x, index = normal(2, 9, 24).requires_grad_(), index_of(2, 9, 5)
    keys = row_keys(torch.arange(2)[:, None], index)
    rows = gather_norm_noise(x, index, torch.rand(2), keys, 1)
    layer_norm_noise(rows, torch.rand(2), keys, 1).square().sum().backward()
    assert ran == ["gather_norm_noise", "layer_norm_noise", "noise_backward", "noise_backward"]


def test_what_triton_does_not_take_is_refused() -> None:
    alpha = torch.rand(1)
    for x, words in ((normal(1, 8193), "at most 8192 channels"), (normal(1, 8).double(), "float64")):
        with pytest.raises(ValueError, match=words):
            layer_norm_noise(x, alpha, noise=x, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        layer_norm_noise(normal(1, 8), alpha, noise=normal(1, 8).double(), impl="triton")
    with pytest.raises(ValueError, match="at most 8192 channels"):
        philox_normal(torch.arange(1), 8193, 0, impl="triton")
    assert layer_norm_noise(normal(1, 8192), alpha, torch.arange(1), 0, impl="triton").isfinite().all()
