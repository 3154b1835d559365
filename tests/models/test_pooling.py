import pytest
import torch

from fastjepa.models import AttentiveClassifier, AttentivePooler


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_published_probe_has_its_parameters_and_a_new_one_no_dead_ones():
    shape = {"embed_dim": 1024, "num_heads": 16, "num_classes": 400}
    assert count(AttentiveClassifier(**shape, unused_proj=True)) == 13_007_248
    assert count(AttentiveClassifier(**shape)) == 13_007_248 - 1_049_600


def test_a_published_probe_does_not_load_into_a_new_one_by_accident():
    state = AttentivePooler(embed_dim=32, num_heads=2, unused_proj=True).state_dict()
    with pytest.raises(RuntimeError, match=r"xattn\.proj"):
        AttentivePooler(embed_dim=32, num_heads=2).load_state_dict(state)


def test_queries_are_drawn_and_output_projections_rescaled():
    torch.manual_seed(0)
    pooler = AttentivePooler(num_queries=64, embed_dim=64, num_heads=2, depth=3)
    assert pooler.query_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    for layer, weight in enumerate(
        [pooler.cross_attention_block.mlp.fc2.weight, *(b.mlp.fc2.weight for b in pooler.blocks)], start=1
    ):
        assert weight.std().item() == pytest.approx(0.02 / (2 * layer) ** 0.5, rel=0.05)


def test_an_unknown_argument_and_no_layer_are_refused():
    with pytest.raises(TypeError):
        AttentivePooler(heads=2)
    with pytest.raises(ValueError, match="at least one layer, got depth 0"):
        AttentivePooler(depth=0)


@pytest.mark.parametrize("complete", [True, False])
def test_shapes(complete):
    pooler = AttentivePooler(num_queries=3, embed_dim=32, num_heads=2, depth=2, complete_block=complete)
    assert pooler(torch.randn(2, 7, 32)).shape == (2, 3, 32)
    classifier = AttentiveClassifier(embed_dim=32, num_heads=2, num_classes=5, complete_block=complete)
    assert classifier(torch.randn(2, 7, 32)).shape == (2, 5)
