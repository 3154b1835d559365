"""The Triton kernels of patch embedding in the interpreter, against the reference. float32 and float16 only."""

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import config, patch_embed_gather
from fastjepa_kernels._triton import patch_embed as kernels
from fastjepa_kernels.reference import patch_embed as reference
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check

pytestmark = pytest.mark.usefixtures("results_are_poisoned")

MEAN, STD = [0.4, 0.5, 0.6, 0.3], [0.2, 0.3, 0.25, 0.4]
TOKENS = 2 * 3 * 4


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(4), dtype=torch.uint8)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, TOKENS, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float32, torch.uint8),
        (torch.float16, torch.uint8),
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize(("kept", "channels", "tubelet", "patch", "width"), [
    (7, 3, 2, 4, 24), (1, 1, 1, 3, 7), (33, 2, 2, 5, 40), (None, 4, 3, 2, 70),
])  # fmt: skip
@pytest.mark.parametrize("fused", [False, True])
def test_as_exact_as_eager(dtype, kind, kept, channels, tubelet, patch, width, fused) -> None:
    shape = 2, channels, 2 * tubelet, 3 * patch, 4 * patch
    video = guarded(pixels(*shape) if kind == torch.uint8 else normal(*shape, dtype=kind))
    weight = guarded(normal(width, channels * tubelet * patch * patch, dtype=dtype))
    bias, position = guarded(normal(width, seed=1)), guarded(normal(TOKENS, width, seed=2, dtype=dtype))
    index = None if kept is None else guarded(numbers(2 if kept < 8 else 1, 2, kept))
    for normed, out_dtype, more in ((True, torch.float32, (bias, position)), (False, dtype, (None, None))):
        mean, std = (MEAN[:channels], STD[:channels]) if normed else ([], [])
        settings = mean, std, tubelet, patch, out_dtype, fused

        def run(impl, settings=settings, more=more):
            return lambda v, w: impl.patch_embed_gather(
                v, w, more[0], index, more[1], *settings[:4],
                torch.float64 if w.dtype == torch.float64 else settings[4], settings[5],
            )  # fmt: skip

        check(run(kernels), run(reference), video, weight)
    assert all(intact(t) for t in (video, weight, bias, position))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_patches_and_gradients_of_the_weight(dtype: torch.dtype) -> None:
    video, index = guarded(pixels(2, 3, 4, 12, 16)), guarded(numbers(2, 2, 7))
    settings = MEAN[:3], STD[:3], 2, 4, dtype
    ours, theirs = kernels._cut(video, index, *settings), reference.cut(video, index, *settings)
    torch.testing.assert_close(ours, theirs.flatten(0, 1), rtol=2e-7 if dtype == torch.float32 else 1e-3, atol=1e-6)
    gradient = guarded(normal(4, 7, 24, dtype=dtype))
    for wanted in ((True, True), (True, False), (False, True)):
        for mine, other in zip(
            kernels.patch_embed_gather_backward(gradient, video, index, *settings, *wanted),
            reference.patch_embed_gather_backward(gradient, video, index, *settings, *wanted),
        ):
            torch.testing.assert_close(mine, other, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("form", ["cut", "fused"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[..., 16:],
        lambda x: x[:, :, ::2, :, :16],
        lambda x: x.transpose(1, 2)[:, :4, :3, :, :16].transpose(1, 2)[:, :2].repeat(1, 2, 1, 1, 1)[:, :3],
        lambda x: x[:1, ..., :16].expand(2, -1, -1, -1, -1),
        lambda x: x[..., ::2],
    ],
)
def test_strided_clips_through_the_public_function_with_their_gradients(form: str, view) -> None:
    video, index = view(guarded(pixels(2, 3, 8, 12, 32))), numbers(2, 5)
    tokens = video.shape[2] // 2 * 3 * 4
    more = {"tubelet": 2, "patch": 4, "mean": MEAN[:3], "std": STD[:3], "position": normal(tokens, 24)}
    results = []
    for impl, chosen in (("triton", form), ("reference", "auto")):
        weight, bias = normal(24, 3, 2, 4, 4).requires_grad_(), normal(24, seed=3).requires_grad_()
        out = patch_embed_gather(video, weight, bias, index, **more, impl=impl, form=chosen)
        out.sin().sum().backward()
        results.append([out, weight.grad, bias.grad])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("form", ["cut", "fused"])
def test_pixels_of_other_patches_are_not_read(form: str) -> None:
    video = normal(1, 3, 4, 12, 16)
    clean = video.clone()
    video[:, :, 2:], video[:, :, :, 4:8] = float("nan"), float("nan")
    index = torch.tensor([[0, 3, 8, 11]])
    weight, position = normal(24, 96), torch.full((TOKENS, 24), float("nan"))
    position[index] = 1.0
    ours, theirs = (
        patch_embed_gather(v, weight, None, index, tubelet=2, patch=4, position=position, impl=impl, form=chosen)
        for v, impl, chosen in ((video, "triton", form), (clean, "reference", "auto"))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["auto", "cut", "fused"])
def test_many_tiles_nothing_and_repeats(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Tiles in groups that do not come out even, in both directions; twice the same bits."""
    small = {"ROWS": 16, "COLUMNS": 16, "STEP": 32, "GROUP": 2, "num_warps": 4, "num_stages": 3}
    monkeypatch.setitem(config._forced, "patch_embed_gather", small)
    video, weight, bias = pixels(2, 3, 4, 12, 16), normal(70, 96), normal(70, seed=1)
    run = {"tubelet": 2, "patch": 4, "impl": "triton", "form": form}
    one, two = (patch_embed_gather(video, weight, bias, numbers(2, 21), **run) for _ in range(2))
    assert one.equal(two)
    expected = patch_embed_gather(video, weight, bias, numbers(2, 21), tubelet=2, patch=4, impl="reference")
    torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    assert patch_embed_gather(video, weight, bias, numbers(2, 0), **run).shape == (2, 0, 70)


def test_the_form_that_is_asked_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    for name in ("cut_kernel", "fused_kernel"):
        kernel = getattr(kernels, name)

        class Counted:
            def __init__(self, kernel, name: str):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                launched.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(kernels, name, Counted(kernel, name))
    for form in ("auto", "cut", "fused"):
        patch_embed_gather(pixels(2, 3, 4, 12, 16), normal(24, 96), tubelet=2, patch=4, form=form)
    assert launched == ["cut_kernel", "cut_kernel", "fused_kernel"]
