"""AutoModel of transformers takes exported folders, and what it saves is read back."""

import pytest
import torch

from fastjepa.handover import hand_over
from fastjepa.opened import open_encoder
from tests.test_handover import published


@pytest.fixture
def model(tmp_path):
    """(AutoModel's network, our encoder) of the same exported folder."""
    from transformers import AutoModel

    import fastjepa.transformers_model  # noqa: F401

    published(tmp_path / "a.pth.tar")
    hand_over(tmp_path / "a.pth.tar", tmp_path / "folder")
    return AutoModel.from_pretrained(tmp_path / "folder"), open_encoder(tmp_path / "folder").encoder


def test_its_features_are_ours_to_the_bit(model):
    theirs, ours = model
    assert not theirs.training
    clips = torch.randn(2, 3, 16, 32, 32)
    found = theirs(pixel_values_videos=clips.transpose(1, 2)).last_hidden_state
    assert torch.equal(found, ours(clips))
    assert torch.equal(theirs(clips.transpose(1, 2), return_dict=False)[0], found)


def test_what_it_saves_is_read_back_to_the_bit(model, tmp_path):
    theirs, ours = model
    theirs.save_pretrained(tmp_path / "saved")
    again = open_encoder(tmp_path / "saved")
    assert "CC BY-NC" in again.licence
    for key, tensor in again.encoder.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key
