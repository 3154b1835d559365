"""The operations as modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa_kernels import gather_tokens, target_loss
from fastjepa_kernels.modules import EMA, FusedLayerNorm, MaskedPatchEmbed3D, NarrowLayerNorm, TargetLoss, TokenGather


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [FusedLayerNorm, NarrowLayerNorm])
@pytest.mark.parametrize("named", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
def test_layer_norm_takes_the_place_of_that_of_torch(kind: type, named: dict):
    theirs, ours = nn.LayerNorm(24, **named), kind(24, **named)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = normal(3, 5, 24) * 3 + 1
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert ours(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_kept_patches_are_those_of_the_convolution(bias: bool):
    embed = MaskedPatchEmbed3D(4, 2, 3, 24, bias=bias)
    assert embed.state_dict().keys() == {"proj.weight", *(["proj.bias"] if bias else [])}
    # The last frame and the last columns fill no patch.
    video = normal(2, 3, 5, 8, 13)
    every = F.conv3d(video, embed.proj.weight, embed.proj.bias, stride=(2, 4, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(video), every, rtol=1e-4, atol=1e-5)
    for index in (torch.tensor([[3, 0, 11], [5, 6, 1]]), torch.tensor([[[1], [2]], [[7], [0]]])):
        kept = embed(video, index)
        torch.testing.assert_close(kept, gather_tokens(every, index), rtol=1e-4, atol=1e-5)
        expected = torch.autograd.grad(gather_tokens(every, index).sin().sum(), embed.proj.weight, retain_graph=True)
        (gradient,) = torch.autograd.grad(kept.sin().sum(), embed.proj.weight)
        torch.testing.assert_close(gradient, expected[0], rtol=1e-4, atol=1e-4)


def test_kept_patches_are_of_the_dtype_of_autocast():
    embed = MaskedPatchEmbed3D(4, 2, 3, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert embed(normal(1, 3, 2, 4, 8), torch.tensor([[1]])).dtype == torch.bfloat16


def test_patches_with_the_weights_of_a_convolution_that_is_there():
    conv = nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4))
    embed = MaskedPatchEmbed3D.of(conv)
    assert embed.proj is conv
    assert [name for name, _ in embed.named_parameters()] == ["proj.weight", "proj.bias"]
    with pytest.raises(ValueError, match="expected stride = kernel"):
        MaskedPatchEmbed3D.of(nn.Conv3d(3, 8, 4, 2))
    with pytest.raises(ValueError, match="no padding"):
        MaskedPatchEmbed3D.of(nn.Conv3d(3, 8, 4, 4, padding=1))


def test_tokens_and_the_loss_of_targets_are_those_of_the_functions():
    x, prediction = normal(2, 6, 8), normal(4, 3, 8, seed=1)
    index = torch.tensor([[[0, 3, 5], [1, 2, 4]], [[4, 4, 1], [0, 0, 5]]])
    assert TokenGather()(x, index[0]).equal(gather_tokens(x, index[0]))
    assert TokenGather(assume_unique=False)(x, index).equal(gather_tokens(x, index, assume_unique=False))
    loss = TargetLoss(exponent=2.0, eps=0.5)
    assert loss(prediction, x, index).equal(target_loss(prediction, x, index, exponent=2.0, eps=0.5))
    assert not loss(prediction, x, index).equal(TargetLoss()(prediction, x, index))
    assert not [*TokenGather().parameters(), *loss.parameters()]


def test_averages_move_the_target_towards_the_model():
    online = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    target = copy.deepcopy(online).requires_grad_(False)
    before = [p.clone() for p in target.parameters()]
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1.0)
    EMA(target, online).step(0.75)
    for old, new in zip(before, target.parameters()):
        torch.testing.assert_close(new, old + 0.25)
    halves = EMA([before[0]], [torch.zeros_like(before[0])])
    halves.step(torch.tensor(0.0))
    assert not before[0].any()


def test_averages_of_what_does_not_pair_are_refused():
    with pytest.raises(ValueError, match="bias is a parameter of one module alone"):
        EMA(nn.Linear(3, 4), nn.Linear(3, 4, bias=False))
    with pytest.raises(ValueError, match="1 targets and 2 onlines"):
        EMA([normal(2)], [normal(2), normal(2)])
