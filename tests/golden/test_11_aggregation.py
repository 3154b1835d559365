"""How the tokens of clips and views are arranged when frozen encoders are evaluated."""

from functools import partial

import pytest
import torch
from torch import nn

from fastjepa.models import ClipAggregation, FrameAggregation, VisionTransformer

SEGMENTS, VIEWS = range(2), range(3)


@pytest.fixture(scope="module")
def golden(case):
    return case("11_clip_aggregation")


@pytest.fixture(scope="module")
def clips(golden):
    return [[golden.tensors[f"in.clip{segment}_view{view}"] for view in VIEWS] for segment in SEGMENTS]


def encoder(golden, prefix: str, **other) -> VisionTransformer:
    """With the recorded weights; `calls` are the shapes of its inputs."""
    arguments = {k: v for k, v in golden.info["constructor"].items() if k not in ("norm", "norm_eps")}
    norm = partial(nn.LayerNorm, eps=golden.info["constructor"]["norm_eps"])
    network = VisionTransformer(**{**arguments, **other}, norm_layer=norm).eval()
    network.load_state_dict(golden.group(prefix))
    network.calls = []
    network.register_forward_pre_hook(lambda module, inputs: module.calls.append(tuple(inputs[0].shape)))
    return network


def test_views_and_segments_apart(golden, clips):
    network = encoder(golden, "param.")
    with torch.no_grad():
        views = ClipAggregation(network)(clips)
    assert network.calls == [(12, 3, 4, 12, 12)]
    assert [len(segments) for segments in views] == [2, 2, 2]
    for view in VIEWS:
        for segment in SEGMENTS:
            golden.assert_max(views[view][segment], f"separate.out.view{view}_clip{segment}", "out")


def test_segments_of_a_view_in_one_sequence(golden, clips):
    network = encoder(golden, "param.")
    with torch.no_grad():
        views = ClipAggregation(network, attend_across_segments=True)(clips)
    assert network.calls == [(12, 3, 4, 12, 12)]
    assert len(views) == 3
    for view in VIEWS:
        golden.assert_max(views[view], f"joint.out.view{view}", "out")


def test_every_frame_for_itself(golden, clips):
    network = encoder(golden, "frame_param.", num_frames=1)
    with torch.no_grad():
        views = FrameAggregation(network)(clips)
    assert network.calls == [(48, 3, 12, 12)]
    assert len(views) == 3
    for view in VIEWS:
        golden.assert_max(views[view], f"frames.out.view{view}", "out")
