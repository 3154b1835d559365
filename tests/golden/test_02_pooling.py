import pytest
import torch.nn.functional as F

from fastjepa.models import AttentiveClassifier, AttentivePooler, CrossAttentionBlock


def arguments(golden):
    return {k: v for k, v in golden.info["constructor"].items() if k not in ("norm", "norm_eps")}


def load(golden, kind):
    module = kind(**arguments(golden), unused_proj=True)
    module.load_state_dict(golden.params())
    return module


def test_cross_attention_block(case, check_gradients, leaf):
    golden = case("02_cross_attention_block")
    block = load(golden, CrossAttentionBlock)
    q, x = leaf(golden.tensors["in.q"]), leaf(golden.tensors["in.x"])
    y = block(q, x)
    golden.assert_max(y, "out.y", "out")
    check_gradients(golden, block, "", {"y": y}, {"q": q, "x": x})


@pytest.mark.parametrize("name", ["02_pooler_d1", "02_pooler_d3", "02_pooler_incomplete"])
def test_pooler(case, check_gradients, leaf, name):
    golden = case(name)
    pooler = load(golden, AttentivePooler)
    x = leaf(golden.tensors["in.x"])
    y = pooler(x)
    golden.assert_max(y, "out.y", "out")
    check_gradients(golden, pooler, "", {"y": y}, {"x": x})


@pytest.mark.parametrize("name", ["02_classifier_d1", "02_classifier_d2"])
def test_classifier(case, leaf, name):
    golden = case(name)
    classifier = load(golden, AttentiveClassifier)
    x = leaf(golden.tensors["in.x"])
    logits = classifier(x)
    golden.assert_max(logits, "logits.out.logits", "out")
    loss = F.cross_entropy(logits, golden.tensors["in.labels"])
    golden.assert_max(loss, "ce.out.loss", "out")
    loss.backward()
    wanted = golden.group("ce.grad.param.")
    got = {name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}
    assert set(got) == set(wanted)
    for key, gradient in wanted.items():
        golden.assert_max(got[key], gradient, "grad.param")
