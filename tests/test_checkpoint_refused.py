"""Checkpoints that cannot be used although nothing says that they are damaged."""

import json
import zlib

import pytest
import torch

from fastjepa import checkpoint
from fastjepa.checkpoint import files


@pytest.fixture
def root(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"a": torch.ones(3)}, {}, 3, pytest.fail)
    return tmp_path


def test_another_format_stops_the_run_and_stays_where_it_is(root):
    folder = root / "step-0000002"
    text = (folder / "trainer.json").read_text().replace('"format": 1', '"format": 9')
    (folder / "trainer.json").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["trainer.json"] = {"bytes": len(text), "crc32": zlib.crc32(text.encode())}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.NotDamaged, match="has format 9, this version reads format 1"):
        checkpoint.newest(root, pytest.fail)
    assert folder.is_dir()


def test_a_disk_that_does_not_answer_is_no_damage(root, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "crc32", broken)
    with pytest.raises(checkpoint.NotDamaged, match="cannot be read"):
        checkpoint.newest(root, pytest.fail)
    assert (root / "step-0000002").is_dir()
