"""The drop-in on timm's ViTs, small and with random weights: patched equals unpatched."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from fastjepa_kernels import patch

timm = pytest.importorskip("timm", reason="timm is not installed")

CLOSE = {"rtol": 1e-8, "atol": 1e-8}
INPUT = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)).double()


def build(**more) -> nn.Module:
    """In float64, where results that are the same mathematics agree to many digits."""
    torch.manual_seed(0)
    sizes = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.models.vision_transformer.VisionTransformer(**sizes, **more).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def run(model: nn.Module) -> Tensor:
    torch.manual_seed(7)
    return model(INPUT)


def equal(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(run(ours), run(theirs), **CLOSE)
    for model in (ours, theirs):
        model.zero_grad()
        run(model).sin().sum().backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, **CLOSE)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"class_token": False, "global_pool": "avg", "init_values": 0.1, "qk_norm": True},
        {"patch_drop_rate": 0.5, "reg_tokens": 2},
        {"attn_drop_rate": 0.3, "proj_drop_rate": 0.2},
    ],
)
def test_patched_equals_unpatched_before_and_after_a_copy(more, training: bool):
    ours, theirs = build(**more).train(training), build(**more).train(training)
    before = [type(module) for module in ours.modules()]
    report = patch(ours, strict=True)
    operations = [row.operation for row in report.replaced]
    norms = sum(isinstance(module, nn.LayerNorm) for module in ours.modules())
    dropouts = 1 if "patch_drop_rate" in more else 0
    counts = [operations.count(name) for name in ("attention", "patch_embed", "layer_norm", "patch_dropout")]
    assert counts == [2, 1, norms, dropouts]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    equal(ours, theirs)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    equal(twin, theirs)
    report.undo()
    assert [type(module) for module in ours.modules()] == before
    ours.load_state_dict(theirs.state_dict())
    assert run(ours).equal(run(theirs))


def test_saved_and_loaded_whole():
    ours = build(patch_drop_rate=0.5)
    patch(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in ours.modules()]
    assert run(loaded).equal(run(ours))


def test_compiles_whole():
    torch._dynamo.reset()
    ours, theirs = build(), build()
    patch(ours)
    equal(torch.compile(ours, fullgraph=True, backend="aot_eager"), theirs)


@pytest.mark.parametrize("prefix", [0, 2])
def test_the_same_tokens_are_dropped_in_the_same_order(prefix: int):
    ours, theirs = (timm.layers.PatchDropout(0.4, prefix, ordered=True) for _ in range(2))
    patch(ours, strict=True)
    x, kept = torch.randn(3, 9 + prefix, 8), []
    for module in (ours, theirs):
        torch.manual_seed(3)
        kept.append(module(x))
    assert kept[0].equal(kept[1])
    assert ours.eval()(x) is x


def test_masks_causal_order_and_dropout_are_those_of_timm():
    ours, theirs = (timm.layers.Attention(48, 2, qkv_bias=True, attn_drop=0.3).eval() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    patch(ours, strict=True)
    x, mask = torch.randn(2, 5, 48), torch.rand(5, 5) > 0.3
    for call in (lambda m: m(x, mask | torch.eye(5).bool()), lambda m: m(x, is_causal=True), lambda m: m(x)):
        torch.testing.assert_close(call(ours), call(theirs), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours(x), ours(x, is_causal=True), atol=1e-3)
    dropped = []
    for module in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        dropped.append(module(x))
    assert dropped[0].equal(dropped[1])


def test_the_eager_way_of_timm_is_the_same_mathematics():
    ours, theirs = (timm.layers.Attention(48, 2, gated=True) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    ours.fused_attn = theirs.fused_attn = False
    patch(ours, strict=True)
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fast", [False, True])
def test_norms_have_the_dtype_of_timm(fast: bool):
    ours, theirs = (timm.layers.LayerNorm(24) for _ in range(2))
    ours._fast_norm = theirs._fast_norm = fast
    patch(ours, strict=True)
    narrow = timm.layers.LayerNorm(24)
    patch(narrow, out_dtype="input")
    for kind in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 24).to(kind)
        assert ours(x).dtype == theirs(x).dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ours(x).dtype == theirs(x).dtype
            assert narrow(x).dtype == kind
    with pytest.raises(ValueError, match="24"):
        ours(torch.randn(2, 8))


def test_what_is_not_known_is_left_and_named():
    model = nn.Sequential(timm.layers.AttentionRope(48, 2), timm.layers.LayerNormFp32(24), timm.layers.LayerNorm2d(8))
    report = patch(model)
    assert report.replaced == []
    assert [row.result for row in report.left] == 3 * ["a class that is not known here"]
