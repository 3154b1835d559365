"""Normalised rows mixed with noise: what is computed, what is refused, and how it lives with autograd and compile."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from fastjepa.models.predictor import VisionTransformerPredictor
from fastjepa_kernels import gather_norm_noise, layer_norm_noise, philox_normal, row_keys

CLIPS, TOKENS, KEPT, WIDTH = 3, 11, 5, 24


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def index_of(clips: int = CLIPS, tokens: int = TOKENS, kept: int = KEPT) -> Tensor:
    return torch.rand(clips, tokens, generator=torch.Generator().manual_seed(7)).argsort(dim=-1)[:, :kept]


def shares(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def keys_of(index: Tensor) -> Tensor:
    return row_keys(torch.arange(len(index))[:, None] + 40, index, 1)


def mix(x: Tensor, alpha: Tensor, noise: Tensor, eps: float = 1e-5) -> Tensor:
    """By PyTorch's own normalisation; alpha has the dims of x or fewer."""
    share = alpha.reshape(*alpha.shape, *([1] * (x.ndim - alpha.ndim)))
    return share.sqrt() * F.layer_norm(x, x.shape[-1:], eps=eps) + (1 - share).sqrt() * noise


@pytest.mark.parametrize("leading", [(), (CLIPS,), (CLIPS, KEPT)])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("position", [None, (WIDTH,), (KEPT, WIDTH), (CLIPS, KEPT, WIDTH)])
def test_values_and_gradients_are_those_of_separate_steps(
    leading: tuple[int, ...], recorded: bool, position: tuple[int, ...] | None
) -> None:
    x, theirs = (leaf(normal(CLIPS, KEPT, WIDTH) * 3 + 5) for _ in range(2))
    alpha, keys = shares(*leading), keys_of(index_of())
    place = None if position is None else normal(*position, seed=5)
    noise = normal(CLIPS, KEPT, WIDTH, seed=4) if recorded else philox_normal(keys, WIDTH, 9)
    draw = {"noise": noise} if recorded else {"row_key": keys, "seed": 9}
    out = layer_norm_noise(x, alpha, position=place, **draw)
    expected = mix(theirs, alpha, noise) + (0 if place is None else place)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    upstream = normal(*x.shape, seed=6)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("leading", [(), (CLIPS,), (CLIPS, KEPT)])
@pytest.mark.parametrize("recorded", [False, True])
def test_named_rows_are_gathered_noised_and_placed(
    dtype: torch.dtype, leading: tuple[int, ...], recorded: bool
) -> None:
    x, theirs = (leaf(normal(CLIPS, TOKENS, WIDTH) * 3 + 5) for _ in range(2))
    table, alpha, index = normal(TOKENS, WIDTH, seed=5), shares(*leading), index_of()
    noise = normal(CLIPS, KEPT, WIDTH, seed=4) if recorded else philox_normal(keys_of(index), WIDTH, 9)
    draw = {"noise": noise} if recorded else {"row_key": keys_of(index), "seed": 9}
    out = gather_norm_noise(x, index.to(dtype), alpha, position=table, **draw)
    rows = torch.stack([clip[places] for clip, places in zip(theirs, index)])
    expected = mix(rows, alpha, noise) + table[index]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    upstream = normal(*out.shape, seed=6)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    left_out = torch.ones(CLIPS, TOKENS, dtype=torch.bool).scatter_(1, index, False)
    assert (x.grad[left_out] == 0).all()
    plain = gather_norm_noise(x, index, alpha, **draw)
    torch.testing.assert_close(plain, expected - table[index], rtol=1e-5, atol=1e-5)


def test_it_is_the_noising_of_the_predictor() -> None:
    predictor = VisionTransformerPredictor(
        32, 8, embed_dim=48, predictor_embed_dim=24, depth=1, num_heads=3, noise="linear"
    )
    x, noise, steps = normal(CLIPS, KEPT, 24) * 2 + 1, normal(CLIPS, KEPT, 24, seed=1), torch.tensor([0, 400, 999])
    alpha = predictor.signal_left[steps]
    torch.testing.assert_close(layer_norm_noise(x, alpha, noise=noise), predictor.diffuse(x, steps, noise))


def test_no_signal_is_noise_alone_and_all_signal_has_none() -> None:
    x, keys = leaf(normal(2, 3, WIDTH)), torch.arange(6).view(2, 3)
    out = layer_norm_noise(x, torch.tensor([0.0, 1.0]), keys, 5)
    assert out[0].equal(philox_normal(keys[0], WIDTH, 5))
    torch.testing.assert_close(out[1], F.layer_norm(x[1], (WIDTH,)))
    out.square().sum().backward()
    assert (x.grad[0] == 0).all()
    assert x.grad[1].isfinite().all()


def test_a_row_gets_its_noise_in_any_order_and_packing() -> None:
    x, index, alpha = normal(CLIPS, TOKENS, WIDTH), index_of(), shares(CLIPS)
    keys = keys_of(index)
    whole = gather_norm_noise(x, index, alpha, keys, 9)
    order = torch.tensor([4, 0, 3, 1, 2])
    assert gather_norm_noise(x, index[:, order], alpha, keys[:, order], 9).equal(whole[:, order])
    for clip in range(CLIPS):
        one = slice(clip, clip + 1)
        assert gather_norm_noise(x[one], index[one], alpha[one], keys[one], 9).equal(whole[one])
    rows = torch.stack([clip[places] for clip, places in zip(x, index)])
    assert layer_norm_noise(rows, alpha, keys, 9).equal(whole)
    flat = layer_norm_noise(rows.flatten(0, 1), alpha.repeat_interleave(KEPT), keys.flatten(), torch.tensor(9))
    assert flat.equal(whole.flatten(0, 1))
    assert not gather_norm_noise(x, index, alpha, keys, 10).equal(whole)


def test_rows_that_are_not_named_do_not_matter() -> None:
    x, index = normal(CLIPS, TOKENS, WIDTH), index_of()
    left_out = torch.ones(CLIPS, TOKENS, dtype=torch.bool).scatter_(1, index, False)
    poisoned = leaf(x.masked_fill(left_out.unsqueeze(-1), float("nan")))
    out = gather_norm_noise(poisoned, index, shares(CLIPS), keys_of(index), 3)
    assert out.equal(gather_norm_noise(x, index, shares(CLIPS), keys_of(index), 3))
    out.sin().sum().backward()
    assert poisoned.grad.isfinite().all()


def test_dtypes_of_results_statistics_and_gradients() -> None:
    x, index = leaf(normal(CLIPS, TOKENS, WIDTH, dtype=torch.bfloat16)), index_of()
    noise, alpha = normal(CLIPS, KEPT, WIDTH, dtype=torch.float16), shares(CLIPS, dtype=torch.bfloat16)
    for out_dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        out = gather_norm_noise(x, index, alpha, noise=noise, out_dtype=out_dtype)
        assert out.dtype == expected
        x.grad = None
        out.float().sin().sum().backward()
        assert x.grad.dtype == torch.bfloat16
    run = torch.ops.fastjepa.layer_norm_noise_reference
    out, mean, rstd = run(x, alpha, None, None, normal(*x.shape), None, 1e-5, torch.float32)
    assert (mean.dtype, rstd.dtype) == (torch.float32, torch.float32)
    assert (out.requires_grad, mean.requires_grad, rstd.requires_grad) == (True, False, False)
    wide = layer_norm_noise(x.detach().double(), alpha.double(), noise=normal(*x.shape, dtype=torch.float64))
    assert wide.dtype == torch.float64


def test_strided_and_empty_inputs() -> None:
    x = normal(4, 6, 48)
    for view in (x[:, ::2, 4:28], x.transpose(0, 1), x.transpose(1, 2), x[0, 0].expand(4, 5, 48)):
        noise = normal(*view.shape, seed=1)
        out = layer_norm_noise(view, shares(len(view)), noise=noise)
        assert out.is_contiguous()
        torch.testing.assert_close(out, mix(view, shares(len(view)), noise), rtol=1e-5, atol=1e-5)
    empty = leaf(normal(2, 0, 24))
    layer_norm_noise(empty, shares(2), torch.zeros(2, 0, dtype=torch.int64), 1).sum().backward()
    assert empty.grad.shape == (2, 0, 24)
    unread = leaf(normal(2, 4, 24))
    none = torch.zeros(2, 0, dtype=torch.int64)
    gather_norm_noise(unread, none, shares(2), none, 1).sum().backward()
    assert unread.grad.equal(torch.zeros(2, 4, 24))


def test_gradients_are_the_derivatives() -> None:
    x, index = leaf(normal(2, 7, 5, dtype=torch.float64)), index_of(2, 7, 3)
    alpha, table = shares(2, dtype=torch.float64), normal(7, 5, dtype=torch.float64, seed=1)
    keys = keys_of(index)
    assert torch.autograd.gradcheck(lambda x: gather_norm_noise(x, index, alpha, keys, 3, position=table), x)
    all_keys = torch.arange(14).view(2, 7)
    assert torch.autograd.gradcheck(lambda x: layer_norm_noise(x, alpha, all_keys, 3, position=table), x)
    noise = normal(2, 7, 5, dtype=torch.float64, seed=2)
    assert torch.autograd.gradcheck(lambda x: layer_norm_noise(x, alpha, noise=noise), x)


@pytest.mark.parametrize("form", ["", "_reference"])
def test_torch_accepts_the_operators(form: str) -> None:
    x, alpha, index = leaf(normal(2, 7, 8)), shares(2), index_of(2, 7, 3)
    seed, table = torch.tensor(3), normal(7, 8, seed=1)
    one = getattr(torch.ops.fastjepa, f"layer_norm_noise{form}").default
    library.opcheck(one, (x, alpha, torch.arange(14).view(2, 7), seed, None, table, 1e-5, torch.bfloat16))
    turned = x.detach().transpose(0, 1)
    library.opcheck(one, (turned, alpha[0], None, None, normal(7, 2, 8), None, 1e-5, torch.float32))
    gathered = getattr(torch.ops.fastjepa, f"gather_norm_noise{form}").default
    library.opcheck(gathered, (x, index, alpha, keys_of(index), seed, None, table, 1e-5, torch.float32))
    library.opcheck(gathered, (x, index.int(), shares(2, 3), None, None, normal(2, 3, 8), None, 1e-5, torch.float32))
    back = getattr(torch.ops.fastjepa, f"noise_backward{form}").default
    mean = normal(2, 7)
    library.opcheck(back, (normal(2, 9, 8)[:, 2:], x.detach(), None, alpha, mean, mean.exp()))
    library.opcheck(back, (normal(2, 3, 8), x.detach(), index, alpha, mean[:, :3], mean[:, :3].exp()))


def test_compiles_whole_with_few_recompiles_over_many_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, index: Tensor, alpha: Tensor, table: Tensor, seed: Tensor) -> Tensor:
        keys = row_keys(torch.arange(2)[:, None], index, 1)
        rows = gather_norm_noise(x, index, alpha, keys, seed, position=table, impl="reference")
        return layer_norm_noise(rows, alpha, keys, seed, out_dtype=torch.bfloat16, impl="reference").float()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for kept in range(2, 22):
        index = index_of(2, 30, kept)
        given = index, shares(2), normal(30, 24, seed=1), torch.tensor(kept)
        ours, theirs = (leaf(normal(2, 30, 24)) for _ in range(2))
        out, expected = compiled(ours, *given), step(theirs, *given)
        (out * out.cos()).sum().backward()
        (expected * expected.cos()).sum().backward()
        assert out.equal(expected)
        assert ours.grad.equal(theirs.grad)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_repeats_bit_by_bit() -> None:
    def results() -> list[Tensor]:
        x, index = leaf(normal(CLIPS, TOKENS, WIDTH)), index_of()
        out = gather_norm_noise(x, index, shares(CLIPS), keys_of(index), 3)
        out.sin().sum().backward()
        return [out, x.grad]

    assert all(one.equal(other) for one, other in zip(results(), results()))


X, A, K, I = normal(3, 4, 8), shares(3), torch.arange(12).view(3, 4), torch.zeros(3, 2, dtype=torch.int64)  # noqa: E741
NOISE = {"noise": X}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: layer_norm_noise(X.int(), A, K, 0), "x must be floating"),
        (lambda: layer_norm_noise(X[..., :0], A, K, 0), "at least one channel"),
        (lambda: layer_norm_noise(X, A, K, 0, eps=-1.0), "eps must not be negative"),
        (lambda: layer_norm_noise(X, shares(4), K, 0), r"alpha must have leading dims of \[3, 4, 8\], got \[4\]"),
        (lambda: layer_norm_noise(X, X, K, 0), "alpha must have leading dims"),
        (lambda: layer_norm_noise(X, A.int(), K, 0), "alpha must be floating"),
        (lambda: layer_norm_noise(X, leaf(A), K, 0), "alpha is a constant here"),
        (lambda: layer_norm_noise(X, A), "without noise, row_key and seed are needed"),
        (lambda: layer_norm_noise(X, A, K), "without noise, row_key and seed are needed"),
        (lambda: layer_norm_noise(X, A, seed=3), "without noise, row_key and seed are needed"),
        (lambda: layer_norm_noise(X, A, K, 0, **NOISE), "not both"),
        (lambda: layer_norm_noise(X, A, noise=X[0]), r"noise must be \[3, 4, 8\]"),
        (lambda: layer_norm_noise(X, A, noise=leaf(X)), "noise is a constant here"),
        (lambda: layer_norm_noise(X, A, K[0], 0), r"row_key int64 \[3, 4\]"),
        (lambda: layer_norm_noise(X, A, K.int(), 0), "row_key int64"),
        (lambda: layer_norm_noise(X, A, K, K), "seed must be an int64 tensor of no dims"),
        (lambda: layer_norm_noise(X, A, K, -5), "seed must be from 0"),
        (lambda: layer_norm_noise(X, A, position=X[:, 0], **NOISE), "position must have the last dims"),
        (lambda: layer_norm_noise(X, A, position=X[0, 0, 0], **NOISE), "position must have the last dims"),
        (lambda: layer_norm_noise(X, A, position=leaf(X), **NOISE), "position is a constant here"),
        (lambda: layer_norm_noise(X, A, position=X.long(), **NOISE), "position must be floating"),
        (lambda: layer_norm_noise(X, A, out_dtype=torch.int8, **NOISE), "out_dtype must be a floating dtype"),
        (lambda: layer_norm_noise(X, A, impl="triton", **NOISE), "CUDA device"),
        (lambda: gather_norm_noise(X[0], I, A, I, 0), r"expected x \[B, N, D\] and index \[B, K\]"),
        (lambda: gather_norm_noise(X, I[:2], A, I, 0), r"expected x \[B, N, D\] and index \[B, K\]"),
        (lambda: gather_norm_noise(X, I.float(), A, I, 0), "index must be int32 or int64"),
        (lambda: gather_norm_noise(X, I, A, K, 0), r"row_key int64 \[3, 2\]"),
        (lambda: gather_norm_noise(X, I, A, **NOISE), r"noise must be \[3, 2, 8\]"),
        (lambda: gather_norm_noise(X, I, A, I, 0, position=X), r"position must be a table \[4, 8\]"),
        (lambda: gather_norm_noise(X, I, A, I, 0, impl="fast"), "impl must be one of"),
    ],
)
def test_mistakes_are_sentences(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_flops_are_counted_as_for_torch_own() -> None:
    with FlopCounterMode(display=False) as counter:
        layer_norm_noise(leaf(X), A, K, 0).sum().backward()
    assert counter.get_total_flops() == 0
