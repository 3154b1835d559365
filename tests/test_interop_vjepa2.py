"""transformers' V-JEPA 2 and ours are one network: outputs, gradients, entries and settings, in both directions."""

import pytest
import torch
import torch.nn.functional as F

from fastjepa.build import build_encoder
from fastjepa.configfile import restore
from fastjepa.interop import WeightsRefused
from fastjepa.interop.vjepa2 import (
    DEFAULTS,
    build_classifier,
    config_of,
    encoder_arguments,
    from_transformers,
    predictor_arguments,
    settings_of_config,
    to_transformers,
    with_defaults,
)
from fastjepa.jepa import JEPA
from fastjepa.masks import target_union
from fastjepa.models import VisionTransformer, VisionTransformerPredictor
from tests.small_jepa import clips, masks

transformers = pytest.importorskip("transformers", reason="the peer of these tests is transformers' V-JEPA 2")
# Heads of 24 channels, and of 16: an axis turns 8, and 4 of 16 stay.
SMALL = {
    "hidden_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "pred_hidden_size": 32,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 2,
    "pred_num_mask_tokens": 2,
    "crop_size": 32,
    "patch_size": 8,
    "frames_per_clip": 4,
    "num_pooler_layers": 2,
}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
EXECUTIONS = pytest.mark.parametrize("execution", ["reference", "packed"])


def theirs(implementation="eager", cls="VJEPA2Model", **more):
    """A model of transformers in float64 whose every entry is drawn: nothing is zero or one."""
    config = transformers.VJEPA2Config(**{**SMALL, **more}, attn_implementation=implementation)
    torch.manual_seed(3)
    model = getattr(transformers, cls)(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def loaded(model):
    """(encoder, predictor, classifier or None) of this library with the weights of a model of transformers."""
    config = with_defaults(model.config.to_dict(), "config")
    networks = from_transformers(model.state_dict(), "model")
    encoder = VisionTransformer(**encoder_arguments(config)).double()
    predictor = VisionTransformerPredictor(**predictor_arguments(config)).double()
    encoder.load_state_dict(networks["encoder"])
    predictor.load_state_dict(networks["predictor"])
    classifier = None
    if "classifier" in networks:
        classifier = build_classifier(config, model.config.num_labels).double()
        classifier.load_state_dict(networks["classifier"])
    return encoder.eval(), predictor.eval(), classifier


def assert_same(found, expected, what=""):
    assert found.shape == expected.shape, what
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), what


def assert_same_gradients(networks, model):
    """Of every entry by their names, fused ones taken apart; each within 1e-5 of its largest."""
    ours = {
        name: {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
        for name, network in networks.items()
    }
    found = to_transformers(ours)
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        if key.endswith("k_proj.bias"):  # softmax does not see what is added to all keys, unless they are turned
            assert max(found[key].abs().max(), gradient.abs().max()) < 1e-5, key
        else:
            assert gradient.abs().max() > 1e-12, key
            assert_same(found[key], gradient, key)


@IMPLEMENTATIONS
def test_features_and_gradients_of_the_encoder(implementation):
    model = theirs(implementation)
    encoder, _, _ = loaded(model)
    video = clips(2)
    found = encoder(video)
    expected = model(video.transpose(1, 2), skip_predictor=True).last_hidden_state
    assert_same(found, expected)
    weights = torch.randn(found.shape, dtype=found.dtype)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients({"encoder": encoder}, model)


@IMPLEMENTATIONS
def test_clips_of_another_length_and_size(implementation):
    model = theirs(implementation)
    encoder, _, _ = loaded(model)
    video = torch.randn(1, 3, 6, 32, 32, dtype=torch.float64)
    assert_same(encoder(video), model(video.transpose(1, 2), skip_predictor=True).last_hidden_state)


@IMPLEMENTATIONS
def test_predictions_and_gradients_at_given_masks(implementation):
    model = theirs(implementation)
    encoder, predictor, _ = loaded(model)
    video, (context, target) = clips(3), masks(3)
    out = model(video.transpose(1, 2), context_mask=[context[0]], target_mask=[target[0]])
    expected = out.predictor_output.last_hidden_state
    features = encoder(video)
    index = context[0].unsqueeze(-1).expand(-1, -1, features.shape[-1])
    found = predictor(features.gather(1, index), None, context[0], target[0], mask_index=1)
    assert_same(found, expected)
    weights = torch.randn(found.shape, dtype=found.dtype)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    tokens = model.predictor.embeddings.mask_tokens
    assert predictor.mask_tokens[0].grad is None
    predictor.mask_tokens[0].grad = torch.zeros_like(predictor.mask_tokens[0])
    assert tokens.grad[0].abs().max() == 0
    assert_same_gradients({"encoder": encoder, "predictor": predictor}, model)


def their_objective(model, video, context, target):
    """The objective by transformers' layers: context tokens encoded alone, one mask token, normalised targets."""

    def encoded(mask):
        x = model.encoder.embeddings(video.transpose(1, 2))
        x = x.gather(1, mask.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        for layer in model.encoder.layer:
            out = layer(x, mask)
            x = out[0] if isinstance(out, tuple) else out
        return model.encoder.layernorm(x)

    with torch.no_grad():
        features = model(video.transpose(1, 2), skip_predictor=True).last_hidden_state
        features = F.layer_norm(features, features.shape[-1:])
    losses = []
    for seen, wanted in zip(context, target):
        kept = encoded(seen)
        # transformers cuts the context out of what it is given: a clip of tokens in which the others are never read.
        whole = torch.zeros_like(features).scatter(1, seen.unsqueeze(-1).expand_as(kept), kept)
        guess = model.predictor(whole, [seen], [wanted]).last_hidden_state
        goal = features.gather(1, wanted.unsqueeze(-1).expand_as(guess))
        losses.append((guess - goal).abs().mean())
    return torch.stack(losses).mean()


@IMPLEMENTATIONS
@EXECUTIONS
def test_the_objective_and_its_gradients(execution, implementation):
    model = theirs(implementation, pred_num_mask_tokens=1)  # its predictor always takes the same one
    encoder, predictor, _ = loaded(model)
    jepa = JEPA(encoder, predictor, execution=execution)
    video, (context, target) = clips(3), masks(3)
    found = jepa(video, context, target, union=target_union(target, 32)).loss
    expected = their_objective(model, video, context, target)
    assert_same(found, expected)
    found.backward()
    expected.backward()
    assert_same_gradients({"encoder": jepa.encoder, "predictor": jepa.predictor}, model)
    features = model(video.transpose(1, 2), skip_predictor=True).last_hidden_state
    assert_same(jepa.target_features(video).view_as(features), F.layer_norm(features, features.shape[-1:]))


@IMPLEMENTATIONS
def test_logits_and_gradients_of_the_classifier(implementation):
    model = theirs(implementation, "VJEPA2ForVideoClassification", num_labels=5)
    encoder, _, classifier = loaded(model)
    video = clips(2)
    found, expected = classifier(encoder(video)), model(video.transpose(1, 2)).logits
    assert_same(found, expected)
    weights = torch.randn(found.shape, dtype=found.dtype)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients({"encoder": encoder, "classifier": classifier}, model)


# Entries


@pytest.mark.parametrize("cls", ["VJEPA2Model", "VJEPA2ForVideoClassification"])
def test_entries_go_there_and_back_to_the_bit(cls):
    state = theirs(cls=cls).state_dict()
    networks = from_transformers(state, "model")
    again = to_transformers(networks)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
    third = from_transformers(again, "model")
    assert {name: one.keys() for name, one in third.items()} == {name: one.keys() for name, one in networks.items()}
    assert all(torch.equal(third[name][key], t) for name, one in networks.items() for key, t in one.items())


def test_ten_mask_tokens_keep_their_order():
    state = theirs(pred_num_mask_tokens=12).state_dict()
    networks = from_transformers(state, "model")
    assert torch.equal(networks["predictor"]["mask_tokens.11"], state["predictor.embeddings.mask_tokens"][11])
    shuffled = {"predictor": dict(sorted(networks["predictor"].items()))}  # 0, 1, 10, 11, 2
    assert torch.equal(
        to_transformers(shuffled)["predictor.embeddings.mask_tokens"], state["predictor.embeddings.mask_tokens"]
    )


def test_the_defaults_are_those_of_transformers():
    assert with_defaults({}, "config") == DEFAULTS
    config = transformers.VJEPA2Config().to_dict()
    assert {key: config[key] for key in DEFAULTS} == DEFAULTS


# The released models, without their values


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
HUGE = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
GIANT = {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 22, "mlp_ratio": 4.363636363636363}


@pytest.mark.parametrize(
    ("sizes", "crop", "name"),
    [(LARGE, 256, "vit_large"), (HUGE, 256, "vit_huge"), (GIANT, 256, "vit_giant_xformers"),
     (GIANT, 384, "vit_giant_xformers")],
)  # fmt: skip
def test_released_sizes_are_named_and_have_our_entries(sizes, crop, name):
    with torch.device("meta"):
        model = transformers.VJEPA2Model(transformers.VJEPA2Config(**sizes, crop_size=crop))
    config = with_defaults(model.config.to_dict(), "config")
    told = settings_of_config(config, "config")
    assert (told["model.name"], told["data.crop"], told["data.frames"]) == (name, crop, 64)
    settings = restore(told, "config")
    assert {**config_of(settings, 10), "mlp_ratio": config["mlp_ratio"]} == config
    networks = from_transformers(model.state_dict(), "model")
    with torch.device("meta"):
        encoder = build_encoder(settings)
        predictor = VisionTransformerPredictor(**predictor_arguments(config))
    for network, ours in (("encoder", encoder), ("predictor", predictor)):
        shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
        assert {key: tensor.shape for key, tensor in networks[network].items()} == shapes


def test_the_classifier_of_174_classes_has_the_published_number_of_weights():
    with torch.device("meta"):
        classifier = build_classifier(with_defaults(LARGE, "config"), 174)
    assert sum(p.numel() for p in classifier.parameters()) == 49_514_670


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.pop("encoder.layer.1.attention.key.weight"),
            "model has no encoder.layer.1.attention.key.weight, but what belongs to it",
        ),
        (
            lambda s: s.update({"encoder.layer.0.attention.value.bias": torch.zeros(47, dtype=torch.float64)}),
            "model: encoder.layer.0.attention.query, encoder.layer.0.attention.key, encoder.layer.0.attention.value: "
            "expected bias of one shape and precision, given [48], [48], [47] in torch.float64",
        ),
        (lambda s: s.update({"encoder.extra": torch.zeros(1)}), "model: encoder.extra is no entry of a V-JEPA 2 model"),
        (
            lambda s: s.update({"predictor.embeddings.mask_tokens": torch.zeros(3, 32)}),
            "model: predictor.embeddings.mask_tokens: expected [M, 1, 1, P], given [3, 32]",
        ),
        (
            lambda s: s.update({"vjepa2.encoder.layernorm.bias": torch.zeros(48)}),
            "model holds encoder.layernorm.bias twice, with and without 'vjepa2.' before its name",
        ),
    ],
)
def test_entries_of_something_else_are_refused(change, words):
    state = theirs().state_dict()
    change(state)
    with pytest.raises(WeightsRefused) as caught:
        from_transformers(state, "model")
    assert str(caught.value) == words
