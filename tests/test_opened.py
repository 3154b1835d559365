"""Encoders opened from where weights lie: the numbers of the network that was saved, and how its clips are cut."""

import pytest
import torch

from fastjepa.build import build_encoder, build_jepa
from fastjepa.config import Settings
from fastjepa.exits import Exit
from fastjepa.fit import state_of
from fastjepa.interop import PREFIX, WeightsRefused, load_own_checkpoint
from fastjepa.opened import open_encoder

PUBLISHED = Settings.model_validate(
    {
        "model": {"name": "vit_tiny", "predictor_dim": 96, "predictor_depth": 2},
        "data": {"frames": 16, "tubelet": 2, "patch": 16, "crop": 64},
    }
)


@pytest.fixture
def published(tmp_path):
    """(path, networks) of a checkpoint in the public layout."""
    networks = state_of(build_jepa(PUBLISHED))
    networks["target_encoder"] = {key: tensor + 0.25 for key, tensor in networks["target_encoder"].items()}
    path = tmp_path / "published.pth.tar"
    torch.save({name: {PREFIX + k: v for k, v in state.items()} for name, state in networks.items()}, path)
    return path, networks


def test_a_run_gives_its_newest_target_encoder_and_its_settings(run):
    code, folder = run()
    assert code == Exit.DONE
    opened = open_encoder(folder)
    stored = load_own_checkpoint(folder).networks
    assert opened.step == 10
    assert opened.run == folder
    assert (opened.settings.data.crop, opened.settings.model.name) == (32, "vit_nano")
    for network in ("target_encoder", "encoder"):
        opened = open_encoder(folder / "checkpoints" / "step-0000010", network)
        assert opened.run == folder
        for key, tensor in opened.encoder.state_dict().items():
            assert torch.equal(tensor, stored[network][key])
    assert not any(p.requires_grad for p in opened.encoder.parameters())
    assert not torch.equal(stored["encoder"]["norm.weight"], stored["target_encoder"]["norm.weight"])


def test_a_published_checkpoint_is_understood_by_its_shapes(published):
    path, networks = published
    clips = torch.randn(2, 3, 16, 64, 64)
    for network in ("target_encoder", "encoder"):
        opened = open_encoder(path, network)
        own = build_encoder(PUBLISHED).eval()
        own.load_state_dict(networks[network])
        assert torch.equal(opened.encoder(clips), own(clips))
        data = opened.settings.data
        assert (data.frames, data.tubelet, data.patch, data.crop) == (16, 2, 16, 64)
        assert (opened.run, opened.step) == (None, None)
        assert "CC BY-NC" in opened.licence


def test_weights_that_do_not_fit_are_refused(published):
    path, _ = published
    content = torch.load(path)
    del content["target_encoder"][f"{PREFIX}norm.bias"]
    torch.save(content, path)
    with pytest.raises(WeightsRefused, match=r"target_encoder does not fit .*norm\.bias: expected \[192\], given noth"):
        open_encoder(path)
    for name in ("encoder", "target_encoder"):
        content[name][f"{PREFIX}pos_embed"] = torch.zeros(1, 7, 192)
    torch.save(content, path)
    with pytest.raises(WeightsRefused, match="positions for 7 tokens"):
        open_encoder(path)
