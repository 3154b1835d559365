"""C9: weights made to harm, or of another model, as `init.from` of the whole program: refused before anything begins.

What each file is told is tested in tests/test_interop_files.py and tests/test_init_from.py.
"""

import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from fastjepa import configfile
from fastjepa.build import build_jepa
from fastjepa.exits import Exit
from fastjepa.fit import state_of
from tests.reliability.harness import RECIPE, Lab


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The networks of the recipe, by the public code's names."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    state = state_of(build_jepa(configfile.load(path)))
    return {name: {f"module.backbone.{k}": t.clone() for k, t in part.items()} for name, part in state.items()}


@pytest.fixture(scope="module")
def own(server, tmp_path_factory):
    """A checkpoint of our own."""
    lab = Lab(server, tmp_path_factory.mktemp("own"), {})
    lab.run("runs", "runtime.stop_at=1")
    return lab.path("runs") / "checkpoints" / "step-0000001"


def layout(networks):
    copies = {name: {key: tensor.clone() for key, tensor in part.items()} for name, part in networks.items()}
    return {**copies, "opt": None, "scaler": None, "epoch": 3}


def changed(networks, change):
    content = layout(networks)
    key = next(key for key, tensor in content["encoder"].items() if tensor.ndim == 2)
    change(content["encoder"], key)
    return content


def zipped(path, name, content, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, content)


def sign(folder):
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    facts = {n: {"bytes": (folder / n).stat().st_size, "crc32": zlib.crc32((folder / n).read_bytes())} for n in names}
    (folder / "manifest.json").write_text(json.dumps(facts))


FILES = {
    "a pickle": lambda p, n, bomb: p.write_bytes(pickle.dumps(bomb)),
    "a pickle by torch.save": lambda p, n, bomb: torch.save(bomb, p),
    "a pickle among the weights": lambda p, n, bomb: torch.save(
        changed(n, lambda state, key: state.update({key: bomb})), p
    ),
    "a pickle for the optimizer": lambda p, n, bomb: torch.save({**layout(n), "opt": bomb}, p),
    "a pickle in the old format": lambda p, n, bomb: torch.save(
        {**layout(n), "opt": bomb}, p, _use_new_zipfile_serialization=False
    ),
    "safetensors with a header of 2**63 bytes": lambda p, n, bomb: p.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
    "safetensors": lambda p, n, bomb: save_file({"encoder.norm.weight": torch.zeros(3)}, p),
    "a zip bomb": lambda p, n, bomb: zipped(p, "archive/data.pkl", bytes(200_000_000)),
    "a zip of a pickle": lambda p, n, bomb: zipped(p, "archive/data.pkl", pickle.dumps(bomb), zipfile.ZIP_STORED),
    "nothing": lambda p, n, bomb: p.write_bytes(b""),
    "text": lambda p, n, bomb: p.write_text("weights"),
    "a list": lambda p, n, bomb: torch.save([1, 2], p),
    "a pipe": lambda p, n, bomb: os.mkfifo(p),
    "a device": lambda p, n, bomb: p.symlink_to("/dev/zero"),
    "a dangling link": lambda p, n, bomb: p.symlink_to("nowhere"),
    "an empty folder": lambda p, n, bomb: p.mkdir(),
    "a checkpoint of torch's own format": lambda p, n, bomb: (
        dcp.save({"encoder.norm.weight": torch.zeros(3), "bytes": bomb}, checkpoint_id=str(p), no_dist=True),
        (p / ".metadata").write_bytes(pickle.dumps(bomb)),
    ),
}
UNLIKE = {
    "a wrong shape": lambda state, key: state.update({key: state[key][:-1].clone()}),
    "an unknown key": lambda state, key: state.update({"module.backbone.extra": torch.zeros(3)}),
    "a missing key": lambda state, key: state.pop(key),
    "whole numbers": lambda state, key: state.update({key: state[key].long()}),
    "complex numbers": lambda state, key: state.update({key: state[key].to(torch.complex64)}),
    "no tensor": lambda state, key: state.update({key: "weight"}),
    "a key without the prefix": lambda state, key: state.update({"weight": torch.zeros(3)}),
}
SHARDS = {
    "brackets for a header": lambda shard, bomb: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a header of 2**63 bytes": lambda shard, bomb: struct.pack("<Q", 2**63) + shard[8:],
    "a pickle": lambda shard, bomb: pickle.dumps(bomb),
    "half a shard": lambda shard, bomb: shard[: len(shard) // 2],
}
TEXTS = {
    "brackets for a manifest": ("manifest.json", "[" * 200_000),
    "maps for a manifest": ("manifest.json", '{"a":' * 200_000),
    "a manifest of the whole disk": ("manifest.json", '{"/etc/passwd": {"bytes": 1, "crc32": 1}}'),
}


def assert_refused(lab, path):
    """One sentence that names the file, nothing looked up by an unpickler, nothing written."""
    report, marker = lab.folder / "audit", lab.folder / "marker"
    child = lab.run("runs", f"init.from={path}", code=Exit.WRONG_INPUT, sabotage=[["audit", {"report": str(report)}]])
    first, *more = child.err.splitlines()
    assert first.startswith(f"init.from: {path}")
    assert all(line.startswith("  ") for line in more), child.err
    assert report.read_text() == ""
    assert not marker.exists()
    assert not (lab.folder / "runs").exists()
    return child.err


@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_file_is_refused_before_anything_begins(lab, networks, kind):
    path = lab.folder / "weights.pth.tar"
    FILES[kind](path, networks, Bomb(lab.folder / "marker"))
    (lab.folder / "marker").unlink(missing_ok=True)
    assert assert_refused(lab, path).count("\n") == 1


@pytest.mark.parametrize("kind", UNLIKE)
def test_weights_of_another_form_are_refused_with_what_differs(lab, networks, kind):
    path = lab.folder / "weights.pth.tar"
    torch.save(changed(networks, UNLIKE[kind]), path)
    text = assert_refused(lab, path)
    assert any(
        word in text for word in ("expected", "instead of", "missing", "not a dense tensor", "unknown", "no entry")
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(lab, networks, value):
    path = lab.folder / "weights.pth.tar"
    torch.save(changed(networks, lambda state, key: state[key].view(-1)[:1].fill_(value)), path)
    assert "its values are not finite" in assert_refused(lab, path)


@pytest.mark.parametrize(
    "part", [pytest.param(n, marks=[] if n % 3 == 1 else [pytest.mark.long]) for n in range(1, 20)]
)
def test_a_file_cut_off_anywhere_is_refused(lab, networks, part):
    path = lab.folder / "weights.pth.tar"
    torch.save(layout(networks), path)
    os.truncate(path, path.stat().st_size * part // 20)
    assert assert_refused(lab, path).count("\n") == 1


@pytest.mark.parametrize("kind", SHARDS)
def test_a_hostile_shard_with_a_true_checksum_is_refused(lab, own, kind):
    folder = shutil.copytree(own, lab.folder / "step-0000001")
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(SHARDS[kind](shard.read_bytes(), Bomb(lab.folder / "marker")))
    sign(folder)
    assert assert_refused(lab, folder).count("\n") == 1


@pytest.mark.parametrize("kind", TEXTS)
def test_a_hostile_manifest_is_refused(lab, own, kind):
    folder = shutil.copytree(own, lab.folder / "step-0000001")
    name, text = TEXTS[kind]
    (folder / name).write_text(text)
    report, path = lab.folder / "audit", folder
    child = lab.run("runs", f"init.from={path}", code=Exit.WRONG_INPUT, sabotage=[["audit", {"report": str(report)}]])
    assert child.err.startswith("init.from: ")
    assert str(path) in child.err
    assert child.err.count("\n") == 1
    assert not (lab.folder / "runs").exists()


def test_these_weights_are_taken_where_nothing_is_wrong_with_them(lab, networks, own):
    path = lab.folder / "weights.pth.tar"
    torch.save(layout(networks), path)
    for source in (path, own):
        report = lab.folder / f"audit-{source.name}"
        lab.run("runs", f"init.from={source}", "runtime.stop_at=1", sabotage=[["audit", {"report": str(report)}]])
        assert "find_class" not in report.read_text()
