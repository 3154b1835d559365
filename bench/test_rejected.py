"""Ways that were tried and lost, kept beside what won: bench/README.md says why, here they can be tried again."""

import pytest
import torch
from torch.nn import functional as F

from bench.pairing import alternate, processor_clock, ratio_row, time_row
from fastjepa.data.sampling import Box
from fastjepa.data.transforms import cut
from fastjepa.models import vit_tiny
from fastjepa.models.operations import LIBRARY
from fastjepa.pixels import MEAN, STD, as_floats, normalise

KIND = "rejected"
ON_A_DEVICE = True
ROUNDS = 30
CLIPS, FRAMES, SIDE = 4, 16, 112
OF_A_CPU = "lost on a CPU: a GPU takes the other way, or neither"


def _measure(benchmark, results, what, variants):
    benchmark.group = what
    where = {"threads": 1}
    times = alternate(benchmark, variants, processor_clock, ROUNDS)
    results([time_row(f"{what}: {name}", ms, where) for name, ms in times.items()])
    kept, *lost = times
    results([ratio_row(f"{what}: {kept} over {name}", times, name, where) for name in lost])


@pytest.fixture
def clips(device):
    """Random bytes [B, 3, T, H, W]; the cases are of a CPU."""
    if device.type != "cpu":
        pytest.skip(OF_A_CPU)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (CLIPS, 3, FRAMES, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def test_bytes_to_floats_in_one_call(benchmark, results, clips):
    """`addcmul` of bytes beside widening them first and going on in place."""
    scale, offset = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in ([1 / (255 * std) for std in STD], [-mean / std for mean, std in zip(MEAN, STD)])
    )

    def in_one_call():
        return torch.addcmul(offset, clips, scale, out=torch.empty(clips.shape))

    assert torch.allclose(in_one_call(), as_floats(clips), atol=1e-5)
    _measure(benchmark, results, "normalise bytes", {"widened": lambda: as_floats(clips), "addcmul": in_one_call})


def test_all_frames_resized_in_one_call(benchmark, results, device):
    """The crop of a 720p clip resized in one call beside a frame at a time."""
    if device.type != "cpu":
        pytest.skip(OF_A_CPU)
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(256, (FRAMES, 720, 1280, 3), dtype=torch.uint8, generator=generator).numpy()
    box = Box(top=100, left=200, height=500, width=560)

    def in_one_call():
        window = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
        floats = torch.from_numpy(window.copy()).permute(0, 3, 1, 2).float()
        resized = F.interpolate(floats, size=(224, 224), mode="bilinear", align_corners=False)
        return normalise(resized.permute(1, 0, 2, 3).contiguous())

    def by_frames():
        return cut(frames, box, False, 224)

    assert torch.equal(by_frames(), in_one_call())
    _measure(benchmark, results, "resize a 720p clip", {"a frame at a time": by_frames, "in one call": in_one_call})


@pytest.mark.parametrize("which", ["forward", "forward and backward"])
def test_patches_by_a_convolution(benchmark, results, clips, which):
    """A conv2d that sees each patch as an image of its size beside the matrix product, on patches that are cut."""
    encoder = vit_tiny(img_size=SIDE, num_frames=FRAMES, patch_size=16, tubelet_size=2, uniform_power=True)
    proj = encoder.patch_embed.proj
    patches = LIBRARY.cut(encoder, as_floats(clips)).pixels.flatten(0, 1)
    upstream = torch.randn(len(patches), proj.out_channels)

    def by_product():
        return F.linear(patches, proj.weight.flatten(1), proj.bias)

    def by_convolution():
        return F.conv2d(patches.view(-1, 6, 16, 16), proj.weight.flatten(1, 2), proj.bias).flatten(1)

    def call(embed):
        if which == "forward":
            return torch.no_grad()(embed)
        return lambda: torch.autograd.grad(embed(), [proj.weight, proj.bias], upstream)

    assert torch.allclose(by_product(), by_convolution(), atol=1e-4)
    variants = {"product": call(by_product), "convolution": call(by_convolution)}
    _measure(benchmark, results, f"embed patches, {which}", variants)
