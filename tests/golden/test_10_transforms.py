"""The evaluation views, pixel for pixel. The pretraining part of this case is in tests/data/test_transforms.py."""

import numpy as np
import pytest
import torch

from fastjepa.data.views import views


def frames(case, name):
    return case.tensors[f"{name}.in"].numpy().astype(np.uint8)


@pytest.fixture
def transforms(case):
    return case("10_transforms")


@pytest.mark.parametrize("name", ["eval_nosize", "eval_resize"])
def test_one_view_is_the_published_one(transforms, name):
    """Resized too: the case allows 1.5 grey levels there, and not one pixel differs."""
    (call,) = (c for c in transforms.info["calls"] if c["prefix"] == f"{name}.")
    assert call["short_side"] == call["crop_size"] * 256 // 224
    (view,) = views(frames(transforms, name), call["crop_size"])
    torch.testing.assert_close(view, transforms.tensors[f"{name}.out"], **transforms.info["tolerance"]["default"])


def test_several_views_are_the_published_ones(transforms):
    (call,) = (c for c in transforms.info["calls"] if c["prefix"] == "views.")
    found = views(frames(transforms, "views"), call["crop_size"], call["num_views_per_clip"])
    assert len(found) == 3
    for number, view in enumerate(found):
        wanted = transforms.tensors[f"views.out{number}"]
        torch.testing.assert_close(view, wanted, **transforms.info["tolerance"]["default"])
