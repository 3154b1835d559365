"""The drop-in on models of transformers, small and with random weights: patched equals unpatched."""

import copy
import inspect
import io

import pytest
import torch
from torch import Tensor, nn

from fastjepa_kernels import patch
from fastjepa_kernels.integrations import seams
from fastjepa_kernels.modules import FusedLayerNorm

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
    "image_size": 16,
}


def vjepa2(**more):
    sizes = {
        "patch_size": 4, "crop_size": 16, "frames_per_clip": 4, "hidden_size": 48, "num_attention_heads": 2,
        "num_hidden_layers": 2, "pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
        "pred_num_mask_tokens": 2, "mlp_ratio": 2, "pred_mlp_ratio": 2,
    }  # fmt: skip
    return transformers.VJEPA2Model(transformers.VJEPA2Config(**{**sizes, **more}))


def videomae(**more):
    return transformers.VideoMAEModel(transformers.VideoMAEConfig(num_frames=4, **SMALL, **more))


def vit(**more):
    return transformers.ViTModel(transformers.ViTConfig(**{**SMALL, **more}))


def dinov2(**more):
    return transformers.Dinov2Model(transformers.Dinov2Config(layerscale_value=0.5, **SMALL, **more))


CLOSE = {"rtol": 1e-8, "atol": 1e-8}
MODELS = [vjepa2, videomae, vit, dinov2]
# Attention modules (twice with rotation), norms and patch convolutions.
COUNTS = {vjepa2: (3, 3, 8, 1), videomae: (2, 0, 4, 1), vit: (2, 0, 5, 1), dinov2: (2, 0, 5, 1)}


def build(make, **more) -> nn.Module:
    """In float64, where results that are the same mathematics agree to many digits."""
    torch.manual_seed(0)
    model = make(**more).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pixels(make) -> Tensor:
    sizes = (2, 4, 3, 16, 16) if make in (vjepa2, videomae) else (2, 3, 16, 16)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1)).double()


def run(model: nn.Module, make) -> Tensor:
    """All results of a model in one row."""
    x = pixels(make)
    if make is not vjepa2:
        return model(x).last_hidden_state.flatten()
    masks = [torch.tensor([[3, 1, 30, 17], [31, 0, 8, 9]])], [torch.tensor([[2, 5, 29], [4, 12, 16]])]
    out = model(x, context_mask=masks[0], target_mask=masks[1])
    return torch.cat([out.last_hidden_state.flatten(), out.predictor_output.last_hidden_state.flatten()])


def gradients(model: nn.Module, make) -> dict[str, Tensor]:
    model.zero_grad()
    run(model, make).sin().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def equal(ours: nn.Module, theirs: nn.Module, make) -> None:
    torch.testing.assert_close(run(ours, make), run(theirs, make), **CLOSE)
    one, other = gradients(ours, make), gradients(theirs, make)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **CLOSE)


def state(model: nn.Module) -> dict[str, tuple]:
    return {name: (t.dtype, t.shape) for name, t in model.state_dict().items()}


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def make(request):
    return request.param


def test_patched_equals_unpatched_before_and_after_a_copy(make):
    ours, theirs = build(make), build(make)
    report = patch(ours, strict=True)
    assert state(ours) == state(theirs)
    equal(ours, theirs, make)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    equal(twin, theirs, make)
    assert not torch.allclose(run(ours, make), run(theirs, make))
    assert report.left == []


def test_the_table_lists_every_norm_attention_and_patch_embedding(make):
    ours = build(make)
    report = patch(ours)
    operations = [row.operation for row in report.replaced]
    counts = tuple(operations.count(name) for name in ("attention", "rope", "layer_norm", "patch_embed"))
    assert counts == COUNTS[make]
    names = {name for name, module in ours.named_modules() if isinstance(module, nn.LayerNorm | nn.Conv2d | nn.Conv3d)}
    assert names <= {row.module for row in report.replaced}
    for row in report.replaced:
        assert row.module in report.table()
    assert sum(isinstance(module, FusedLayerNorm) for module in ours.modules()) == COUNTS[make][2]


class Attentions:
    """Counts the calls of the seam: attention without a mask runs there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, attend = 0, seams.attend

        def counted(*given, **named):
            self.calls += 1
            return attend(*given, **named)

        monkeypatch.setattr(seams, "attend", counted)


def test_attention_goes_through_the_seam_and_nothing_global_changes(make, monkeypatch):
    counted = Attentions(monkeypatch)
    ours, theirs = build(make), build(make)
    patch(ours)
    run(ours, make)
    assert counted.calls == COUNTS[make][0]
    run(theirs, make)
    assert counted.calls == COUNTS[make][0], "a model that was not patched came here too"


def test_undo_restores_classes_config_and_every_bit(make):
    ours = build(make)
    classes, configs = [type(m) for m in ours.modules()], [getattr(m, "config", None) for m in ours.modules()]
    before = run(ours, make)
    report = patch(ours)
    assert ours.config._attn_implementation == "fastjepa"
    report.undo()
    assert [type(m) for m in ours.modules()] == classes
    assert all(getattr(m, "config", None) is config for m, config in zip(ours.modules(), configs))
    assert ours.config._attn_implementation == "sdpa"
    assert run(ours, make).equal(before)
    report.undo()


def test_a_model_that_shares_the_config_stays_as_it_is():
    ours = build(vit)
    other = transformers.ViTModel(ours.config)
    assert other.config is ours.config
    patch(ours)
    assert other.config._attn_implementation == "sdpa"
    configs = {id(module.config) for module in ours.modules() if hasattr(module, "config")}
    assert configs == {id(ours.config)}, "modules of a model go on sharing one config"
    assert ours.config.to_dict() == other.config.to_dict()


def test_saved_and_loaded_whole_and_as_transformers_do(make, tmp_path):
    ours = build(make)
    patch(ours)
    expected = run(ours, make)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in ours.modules()]
    assert run(loaded, make).equal(expected)
    ours.save_pretrained(tmp_path)
    plain = type(ours).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert plain.config._attn_implementation == "sdpa"
    torch.testing.assert_close(run(plain, make), expected, **CLOSE)


@pytest.mark.parametrize("make", [vjepa2, vit])
def test_compiles_whole(make):
    torch._dynamo.reset()
    ours, theirs = build(make, num_hidden_layers=1), build(make, num_hidden_layers=1)
    patch(ours)
    # The predictor of transformers has lengths that depend on data, which no compiler takes whole.
    named = {"skip_predictor": True} if make is vjepa2 else {}
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = [model(pixels(make), **named).last_hidden_state for model in (compiled, theirs)]
    torch.testing.assert_close(*results, **CLOSE)
    for result in results:
        result.sin().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters()):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, **CLOSE)


def test_masks_and_dropout_are_those_of_sdpa(monkeypatch):
    counted = Attentions(monkeypatch)
    ours, theirs = (build(vit, attention_probs_dropout_prob=0.3) for _ in range(2))
    patch(ours)
    x, mask = pixels(vit), torch.ones(2, 17)
    mask[0, 5:] = 0
    if "attention_mask" in inspect.signature(type(ours).forward).parameters:
        masked = [model(x, attention_mask=mask).last_hidden_state for model in (ours, theirs)]
        torch.testing.assert_close(*masked, **CLOSE)
        assert not torch.allclose(masked[0], ours(x).last_hidden_state, atol=1e-2)
    calls = counted.calls
    trained = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        trained.append(model(x).last_hidden_state)
    torch.testing.assert_close(*trained, **CLOSE)
    assert counted.calls == calls, "attention with dropout came here"


def test_hidden_states_are_still_captured(make):
    ours, theirs = build(make), build(make)
    patch(ours)
    both = [model(pixels(make), output_hidden_states=True).hidden_states for model in (ours, theirs)]
    assert len(both[0]) == len(both[1]) > 1
    for one, other in zip(*both):
        torch.testing.assert_close(one, other, **CLOSE)


def test_attention_that_was_chosen_by_name_is_left():
    ours = build(vjepa2, attn_implementation="eager")
    report = patch(ours)
    left = {(row.operation, row.result) for row in report.left}
    assert left == {("attention", "its config asks for 'eager', not 'sdpa'")}
    assert sum(row.operation == "rope" for row in report.replaced) == 3
    assert ours.config._attn_implementation == "eager"
    theirs = build(vjepa2, attn_implementation="eager")
    equal(ours, theirs, vjepa2)
    with pytest.raises(ValueError, match="asks for 'eager'"):
        patch(build(vit, attn_implementation="eager"), strict=True)


def test_rotation_alone_and_attention_alone():
    for operation in ("rope", "attention"):
        ours, theirs = build(vjepa2), build(vjepa2)
        report = patch(ours, operations=operation)
        assert {row.operation for row in report.replaced} == {operation}
        assert ours.config._attn_implementation == ("fastjepa" if operation == "attention" else "sdpa")
        equal(ours, theirs, vjepa2)
        report.undo()
        assert run(ours, vjepa2).equal(run(theirs, vjepa2))


def test_a_rotation_that_is_not_the_published_one_is_left(monkeypatch):
    ours = build(vjepa2)
    kind = type(ours.encoder.layer[0].attention)
    monkeypatch.setattr(kind, "apply_rotary_embeddings", lambda self, qk, ids: qk)
    report = patch(ours)
    assert {row.result for row in report.left} == {"rotates otherwise than the published V-JEPA 2"}
    assert sum(row.operation == "attention" for row in report.replaced) == 3


def test_other_families_keep_their_attention_and_say_so():
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL))
    report = patch(model)
    assert {row.operation for row in report.left} == {"attention"}
    assert {row.operation for row in report.replaced} == {"layer_norm", "patch_embed"}
    assert model.config._attn_implementation == "sdpa"


def test_the_pooler_of_the_classifier_is_replaced_too():
    torch.manual_seed(0)
    config = vjepa2(num_pooler_layers=1, num_labels=3).config
    ours = transformers.VJEPA2ForVideoClassification(config).double().eval()
    theirs = copy.deepcopy(ours)
    report = patch(ours)
    assert report.left == []
    assert {"VJEPA2PoolerSelfAttention", "VJEPA2PoolerCrossAttention"} <= {row.class_name for row in report.replaced}
    torch.testing.assert_close(ours(pixels(vjepa2)).logits, theirs(pixels(vjepa2)).logits, **CLOSE)
