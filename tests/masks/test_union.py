"""The union of target sets: which tokens it names, and where in it the targets stand."""

import torch

from fastjepa.masks import Ragged, target_union
from fastjepa.masks.tokens import flat_tokens, gather_tokens


def test_it_names_every_target_once_in_order_and_fills_up_with_others():
    sets = [torch.tensor([[5, 1, 3], [0, 1, 2]]), torch.tensor([[3, 7], [2, 1]])]
    union = target_union(sets, 8)
    assert union.index.tolist() == [[1, 3, 5, 7], [0, 1, 2, 3]]
    assert union.index.is_contiguous()  # or its copy to a device would wait for another on the host
    assert [places.tolist() for places in union.places] == [[[2, 0, 1], [0, 1, 2]], [[1, 3], [2, 1]]]


def test_places_lead_to_the_same_features_in_ragged_sets_too():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 20, 4, generator=generator)
    order = [torch.randperm(20, generator=generator) for _ in range(3)]
    ragged = Ragged(torch.cat([order[0][:4], order[1][:0], order[2][:9]]), (4, 0, 9))
    dense = torch.stack([one[3:8] for one in order])
    union = target_union([ragged, dense], 20)
    assert union.index.shape == (3, 9)
    kept = features.gather(1, union.index.unsqueeze(-1).expand(-1, -1, 4))
    for token_set, places in zip((ragged, dense), union.places):
        assert gather_tokens(kept, places).equal(gather_tokens(features, token_set))
    for row in union.index:
        assert len(set(row.tolist())) == 9


def test_it_moves_as_a_whole():
    union = target_union([Ragged(torch.arange(4), (1, 3)), torch.tensor([[1], [2]])], 8)
    moved = union.to("meta")
    assert {moved.index.device.type, *(flat_tokens(p).device.type for p in moved.places)} == {"meta"}
    assert moved.places[0].lengths == (1, 3)
