"""What the parity case of clip aggregation does not say: refusals, and the prediction from all views."""

import pytest
import torch
from torch import nn

from fastjepa.models import ClipAggregation, FrameAggregation, mean_probabilities


@pytest.mark.parametrize("kind", [ClipAggregation, FrameAggregation])
def test_missing_views_and_other_shapes_are_refused(kind):
    clip = torch.zeros(1, 3, 2, 4, 4)
    for clips in ([[clip, clip], [clip]], [[clip, clip[..., :2]]], []):
        with pytest.raises(ValueError, match=r"expected clips\[segment\]\[view\]"):
            kind(nn.Identity())(clips)


def test_the_prediction_averages_probabilities_and_not_logits():
    """One view is sure of class 0; two lean to class 1 and together outweigh it, though their logits do not."""
    views = [torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]])]
    sure, lean = (torch.tensor(x).sigmoid() for x in (9.0, 2.0))
    want = torch.stack([sure + 2 * (1 - lean), (1 - sure) + 2 * lean])[None] / 3
    assert torch.allclose(mean_probabilities(views), want)
    assert mean_probabilities(views).argmax() == 1
    assert torch.stack(views).mean(dim=0).argmax() == 0


def test_segments_count_like_views():
    logits = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    nested = [list(view) for view in logits]
    got = mean_probabilities(nested)
    assert got.shape == (4, 5)
    assert torch.allclose(got, logits.softmax(dim=-1).mean(dim=(0, 1)))
    assert torch.equal(got, mean_probabilities(list(logits.flatten(0, 1))))


def test_half_precision_is_averaged_in_float32_and_nothing_is_refused():
    assert mean_probabilities([torch.zeros(1, 3, dtype=torch.bfloat16)]).dtype == torch.float32
    with pytest.raises(ValueError, match="at least one view"):
        mean_probabilities([])
