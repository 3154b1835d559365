"""A patched model runs the Triton kernels: they are counted, and a wrong one is noticed. float32 and float16 only."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastjepa_kernels import patch, use
from fastjepa_kernels._triton import norms as kernels
from fastjepa_kernels.modules import MaskedPatchEmbed3D


class Tiny(nn.Module):
    """The parts of a ViT that are replaced with torch alone: patches, two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, 24, 4, 4), nn.LayerNorm(24)
        self.mix, self.last = nn.Linear(24, 24), nn.LayerNorm(24, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        return self.last(x + self.mix(self.norm(x)))


class Operators(TorchDispatchMode):
    """Counts the operators of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastjepa":
            self.calls[function._schema.name.removeprefix("fastjepa::")] += 1
        return function(*args, **(kwargs or {}))


def models(make: Callable[[], nn.Module] = Tiny) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    ours, theirs = make(), make()
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def equal(ours: nn.Module, theirs: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """Results and gradients, in float32."""
    results = [run(model) for model in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    for result in results:
        result.sin().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters()):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)


def pictures(model: nn.Module) -> Tensor:
    return model(torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)))


def test_the_kernels_ran(launches: Counter[str]):
    ours, theirs = models()
    patch(ours, strict=True)
    with Operators() as operators:
        equal(ours, theirs, pictures)
    embedding = {"patch_embed_gather": 1, "patch_embed_gather_backward": 1}
    assert operators.calls == {"layer_norm": 2, "layer_norm_backward": 2, **embedding}
    # Weight and bias of the norm that has them are summed by one launch each; patches are cut again for the gradient.
    assert launches == {"forward_kernel": 2, "backward_kernel": 2, "sum_kernel": 2, "cut_kernel": 2}
    with use("reference"), Operators() as operators:
        pictures(ours)
    assert operators.calls == {"layer_norm_reference": 2, "patch_embed_gather_reference": 1}
    assert launches["forward_kernel"] == 2


def test_a_model_as_it_was_launches_nothing(launches: Counter[str]):
    ours, theirs = models()
    patch(ours).undo()
    with Operators() as operators:
        equal(ours, theirs, pictures)
    assert not operators.calls
    assert not launches


@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_backward"])
def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str):
    right = getattr(kernels, name)

    def wrong(*given):
        first, *rest = right(*given)
        return first * 1.01, *rest

    monkeypatch.setattr(kernels, name, wrong)
    ours, theirs = models()
    patch(ours)
    with pytest.raises(AssertionError, match="not close"):
        equal(ours, theirs, pictures)


def test_vjepa2_of_transformers_on_the_kernels(launches: Counter[str]):
    transformers = pytest.importorskip("transformers")
    config = transformers.VJEPA2Config(
        patch_size=4, crop_size=8, frames_per_clip=4, hidden_size=24, num_attention_heads=1, num_hidden_layers=2,
        pred_hidden_size=24, pred_num_attention_heads=1, pred_num_hidden_layers=1, pred_num_mask_tokens=2, mlp_ratio=2,
    )  # fmt: skip
    ours, theirs = models(lambda: transformers.VJEPA2Model(config))
    report = patch(ours, strict=True)
    norms = sum(row.operation == "layer_norm" for row in report.replaced)
    clip = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with Operators() as operators:
        equal(ours, theirs, lambda model: model(clip).predictor_output.last_hidden_state)
    assert operators.calls["layer_norm"] == launches["forward_kernel"] == norms == 8
    assert operators.calls["layer_norm_backward"] == launches["backward_kernel"] == norms


def test_kept_patches_alone_are_cut_by_the_kernel(launches: Counter[str]):
    embed = MaskedPatchEmbed3D(4, 2, 3, 24)
    video, index = torch.randn(2, 3, 2, 8, 8), torch.tensor([[3, 0], [1, 2]])
    with Operators() as operators:
        kept = embed(video, index)
    assert operators.calls == {"patch_embed_gather": 1}
    assert launches == {"cut_kernel": 1}
    torch.testing.assert_close(kept, embed(video).gather(1, index.unsqueeze(-1).expand(-1, -1, 24)))
