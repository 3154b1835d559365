"""Embedding of kept patches: against Conv3d and a gather, what is refused, autograd and torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from fastjepa_kernels import patch_embed_gather

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
SIZES = {"tubelet": 2, "patch": 4}
TOKENS = 2 * 3 * 2


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(4), dtype=torch.uint8)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, TOKENS, shape, generator=torch.Generator().manual_seed(seed))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def by_convolution(
    video: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, position: Tensor | None, normed: bool
) -> Tensor:
    """Normalise the clip, Conv3d on all tokens, add positions, then keep the named ones."""
    x = video.to(weight.dtype) / 255 if video.dtype == torch.uint8 else video.to(weight.dtype)
    if normed:
        level, spread = (torch.tensor(t, dtype=x.dtype).view(-1, 1, 1, 1) for t in (MEAN, STD))
        x = (x - level) / spread
    out = F.conv3d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if position is not None:
        out = out + position
    if index is None:
        return out
    masks = index if index.ndim == 3 else index.unsqueeze(0)
    return torch.cat([out.gather(1, m.unsqueeze(-1).expand(-1, -1, out.shape[-1])) for m in masks])


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("index", [None, (2, 5), (3, 2, 4)])
@pytest.mark.parametrize("extras", [(False, False, False), (True, True, True), (False, True, False)])
def test_values_and_gradients_are_those_of_conv3d(kind, index, extras) -> None:
    has_bias, has_position, normed = extras
    video = pixels(2, 3, 4, 12, 8) if kind == torch.uint8 else normal(2, 3, 4, 12, 8, dtype=kind)
    index = None if index is None else numbers(*index)
    inputs = normal(10, 3, 2, 4, 4, dtype=torch.float64), normal(10, dtype=torch.float64, seed=1)
    position = normal(TOKENS, 10, dtype=torch.float64, seed=2) if has_position else None
    ours, theirs = ([leaf(x) for x in inputs] for _ in range(2))
    more = {"position": position, "mean": MEAN if normed else None, "std": STD if normed else None}
    out = patch_embed_gather(video, ours[0], ours[1] if has_bias else None, index, **SIZES, **more)
    expected = by_convolution(video, theirs[0], theirs[1] if has_bias else None, index, position, normed)
    torch.testing.assert_close(out, expected)
    upstream = normal(*out.shape, dtype=torch.float64, seed=9)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    if has_bias:
        torch.testing.assert_close(ours[1].grad, theirs[1].grad)


def test_a_matrix_is_as_good_a_weight_and_strides_are_free() -> None:
    video, weight, index = pixels(2, 3, 4, 12, 16), normal(10, 3, 2, 4, 4), numbers(2, 5)
    frames_first = video[..., 4:12].transpose(1, 2).contiguous().transpose(1, 2)
    out = patch_embed_gather(frames_first, weight.flatten(1), None, index.int(), **SIZES)
    assert out.equal(patch_embed_gather(video[..., 4:12], weight, None, index, **SIZES))
    assert out.equal(patch_embed_gather(video[..., 4:12].contiguous(), weight, None, index.unsqueeze(0), **SIZES))
    turned = video[..., 4:12].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert out.equal(patch_embed_gather(turned, weight, None, index, **SIZES))


def test_dtypes_follow_the_weight_autocast_or_the_caller() -> None:
    video, index, position = pixels(2, 3, 4, 12, 8), numbers(2, 5), normal(TOKENS, 10)
    weight, bias = leaf(normal(10, 3, 2, 4, 4)), leaf(normal(10, seed=1))

    def run(**more) -> Tensor:
        return patch_embed_gather(video, weight, bias, index, **SIZES, position=position, **more)

    assert run().dtype == torch.float32
    assert run(out_dtype=torch.bfloat16).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, wide = run(), run(out_dtype=torch.float32)
        exact = torch.ops.fastjepa.patch_embed_gather(
            video, weight.flatten(1), bias, index[None], position, [], [], 2, 4, torch.float32, False
        )
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(exact, run(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(wide, run(), rtol=0.02, atol=0.02)
    wide.sum().backward()
    assert (weight.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    low = patch_embed_gather(video, weight.detach().bfloat16(), leaf(bias), index, **SIZES)
    assert low.dtype == torch.bfloat16


def test_nothing_kept_and_no_gradient_that_nobody_asked_for() -> None:
    video, weight, bias = pixels(2, 3, 4, 12, 8), leaf(normal(10, 3, 2, 4, 4)), leaf(normal(10))
    out = patch_embed_gather(video, weight, bias, numbers(2, 0), **SIZES)
    assert out.shape == (2, 0, 10)
    out.sum().backward()
    assert weight.grad.equal(torch.zeros_like(weight))
    assert bias.grad.equal(torch.zeros(10))
    frozen = weight.detach()
    patch_embed_gather(video, frozen, bias, **SIZES).sum().backward()
    assert frozen.grad is None


def test_gradients_are_the_derivatives() -> None:
    video, index = pixels(2, 1, 2, 4, 4), torch.randint(0, 4, (2, 2, 3), generator=torch.Generator().manual_seed(1))
    weight, bias = leaf(normal(3, 1, 2, 2, 2, dtype=torch.float64)), leaf(normal(3, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda w, b: patch_embed_gather(video, w, b, index, tubelet=2, patch=2, mean=[0.3], std=[0.2]), (weight, bias)
    )


@pytest.mark.parametrize("name", ["patch_embed_gather", "patch_embed_gather_reference"])
def test_torch_accepts_the_operators(name: str) -> None:
    video, weight, bias = pixels(2, 3, 4, 12, 8), leaf(normal(10, 96)), leaf(normal(10))
    run = getattr(torch.ops.fastjepa, name).default
    library.opcheck(
        run, (video, weight, bias, numbers(2, 2, 5), normal(TOKENS, 10), MEAN, STD, 2, 4, torch.bfloat16, True)
    )
    library.opcheck(run, (video.float(), weight, None, None, None, [], [], 2, 4, torch.float32, False))
    backward = getattr(torch.ops.fastjepa, name.replace("gather", "gather_backward")).default
    for wanted in ((True, True), (False, False)):
        library.opcheck(backward, (normal(4, 5, 10), video, numbers(2, 2, 5), MEAN, STD, 2, 4, torch.float32, *wanted))


def test_compiles_whole_with_few_recompiles_over_many_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    video, position = pixels(2, 3, 4, 12, 8), normal(TOKENS, 10, seed=2)

    def step(weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        return patch_embed_gather(
            video, weight, bias, index, **SIZES, position=position, mean=MEAN, std=STD, impl="reference"
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in range(2, 22):
        ours, theirs = ([leaf(normal(10, 3, 2, 4, 4)), leaf(normal(10, seed=1))] for _ in range(2))
        index = numbers(2, length)
        out, expected = compiled(*ours, index), step(*theirs, index)
        (out * out.cos()).sum().backward()
        (expected * expected.cos()).sum().backward()
        for mine, other in zip((out, *(x.grad for x in ours)), (expected, *(x.grad for x in theirs))):
            torch.testing.assert_close(mine, other)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"video": normal(3, 4, 12, 8)}, r"expected video \[B, C, T, H, W\]"),
        ({"video": pixels(2, 3, 3, 12, 8)}, "T a multiple of tubelet 2"),
        ({"patch": 5}, "of patch 5"),
        ({"tubelet": 0}, "tubelet 0"),
        ({"video": pixels(2, 3, 4, 12, 8).int()}, "uint8 or of a floating dtype"),
        ({"weight": normal(10, 95)}, r"expected a floating weight \[D, 96\] or \[D, 3, 2, 4, 4\]"),
        ({"weight": normal(10, 96).long()}, "floating weight"),
        ({"bias": normal(9)}, r"floating bias \[10\]"),
        ({"position": normal(11, 10)}, r"floating position \[12, 10\]"),
        ({"bias": normal(10).to("meta")}, "bias on meta"),
        ({"index": normal(2, 5)}, "int32 or int64"),
        ({"index": numbers(3, 5)}, r"index \[B, K\] or \[M, B, K\] for 2 clips"),
        ({"mean": MEAN}, "mean and std together"),
        ({"mean": MEAN[:2], "std": STD[:2]}, "3 numbers each"),
        ({"mean": MEAN, "std": [0.0, 1.0, 1.0]}, "std above 0"),
        ({"position": leaf(normal(TOKENS, 10))}, "get no gradient"),
        ({"video": leaf(normal(2, 3, 4, 12, 8))}, "get no gradient"),
        ({"out_dtype": torch.int32}, "out_dtype"),
        ({"impl": "triton"}, "CUDA device"),
        ({"form": "cut"}, "one of Triton's, but the reference"),
        ({"form": "fused", "impl": "reference"}, "one of Triton's, but the reference"),
        ({"form": "fast"}, "form must be one of auto, fused, cut"),
    ],
)
def test_mistakes_are_sentences(change, words: str) -> None:
    given = {"video": pixels(2, 3, 4, 12, 8), "weight": normal(10, 96), "bias": None, "index": None, **SIZES}
    with pytest.raises(ValueError, match=words):
        patch_embed_gather(**{**given, **change})


@pytest.mark.parametrize("impl", ["patch_embed_gather", "patch_embed_gather_reference"])
def test_flops_of_both_products_are_counted(impl: str) -> None:
    run = getattr(torch.ops.fastjepa, impl)
    with FlopCounterMode(display=False) as counter:
        weight = leaf(normal(10, 96))
        run(
            pixels(2, 3, 4, 12, 8), weight, None, numbers(3, 2, 5), None, [], [], 2, 4, torch.float32, False
        ).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 30 * 96 * 10)
