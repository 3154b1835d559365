"""A damaged or hostile checkpoint is refused with one sentence, put aside, and never executed."""

import json
import os
import pickle
import shutil
import struct
import sys
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fastjepa import checkpoint
from fastjepa.checkpoint import CheckpointError, load, newest, save, verify, write

INTACT, DAMAGED = 1, 2
NAME = f"step-{DAMAGED:07d}"


def tensors(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "encoder.weight": torch.randn(16, 8, generator=rng),
        "encoder.bias": torch.randn(21, generator=rng).bfloat16(),
        "optimizer.step": torch.tensor(seed),
    }


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def write_manifest(folder: Path, content) -> None:
    (folder / "manifest.json").write_text(json.dumps(content))


def sign(folder: Path) -> None:
    """Write the manifest anew, as someone would who wants the content to be believed."""
    files = [p for p in folder.iterdir() if p.name != "manifest.json"]
    write_manifest(
        folder, {p.name: {"bytes": p.stat().st_size, "crc32": zlib.crc32(p.read_bytes())} for p in sorted(files)}
    )


@pytest.fixture(autouse=True)
def _several_files(monkeypatch):
    monkeypatch.setattr(write, "FILE_BYTES", 520)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    root = tmp_path_factory.mktemp("two") / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "FILE_BYTES", 520)
        for step in (INTACT, DAMAGED):
            save(root, step, tensors(step), {}, 2, print)
    assert len(shards(root / NAME)) == 2
    return root


@pytest.fixture
def root(two_steps, tmp_path):
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints", symlinks=True))


def load_all(found: checkpoint.Found) -> dict[str, torch.Tensor]:
    live = {name: torch.full_like(tensor, 77) for name, tensor in tensors(0).items()}
    load(found, live)
    return live


# Accidents


def edit(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def flip(data: bytes, place: int, bit: int = 3) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def in_its_manifest(folder: Path, name: str) -> None:
    """List a file of another name in the manifest, with true facts."""
    secret = folder.parent.parent / "secret.bin"
    secret.write_bytes(b"something outside")
    write_manifest(folder, {**manifest(folder), name.format(secret): {"bytes": 17, "crc32": zlib.crc32(b"...")}})


def link(path: Path) -> None:
    """The same content, but elsewhere."""
    outside = path.parent.parent.parent / path.name
    path.rename(outside)
    path.symlink_to(outside)


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = {
    "shard cut short": (lambda f: edit(shards(f)[0], lambda d: d[:-1]), "bytes instead of"),
    "shard empty": (lambda f: edit(shards(f)[1], lambda d: b""), "has 0 bytes instead of"),
    "shard zeros": (lambda f: edit(shards(f)[0], lambda d: bytes(len(d))), "checksum"),
    "bit of the data": (lambda f: edit(shards(f)[0], lambda d: flip(d, len(d) - 5)), "checksum"),
    "bit of the header length": (lambda f: edit(shards(f)[0], lambda d: flip(d, 1)), "checksum"),
    "bit of the header": (lambda f: edit(shards(f)[1], lambda d: flip(d, 30)), "checksum"),
    "pickle for a shard": (lambda f: edit(shards(f)[0], lambda d: pickle.dumps([1])), "bytes instead of"),
    "shards exchanged": (lambda f: edit(shards(f)[0], lambda d: shards(f)[1].read_bytes()), "bytes instead of"),
    "shard missing": (lambda f: shards(f)[1].unlink(), "missing shard"),
    "file too many": (lambda f: (f / "model.safetensors").write_bytes(b""), "unlisted model.safetensors"),
    "folder for a shard": (lambda f: replace_by_folder(shards(f)[0]), "not a regular file"),
    "shard linked": (lambda f: link(shards(f)[0]), "not a regular file"),
    "trainer.json linked": (lambda f: link(f / "trainer.json"), "trainer.json is not a regular file"),
    "manifest linked": (lambda f: link(f / "manifest.json"), "no manifest.json"),
    "trainer.json changed": (lambda f: edit(f / "trainer.json", lambda d: d.replace(b"2", b"3")), "checksum"),
    "trainer.json missing": (lambda f: (f / "trainer.json").unlink(), "missing trainer.json"),
    "trainer.json unlisted": (
        lambda f: ((f / "trainer.json").unlink(), sign(f)),
        "no trainer.json",
    ),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "manifest a pipe": (lambda f: ((f / "manifest.json").unlink(), os.mkfifo(f / "manifest.json")), "no manifest"),
    "manifest empty": (lambda f: (f / "manifest.json").write_text(""), "JSONDecodeError"),
    "manifest cut short": (lambda f: edit(f / "manifest.json", lambda d: d[: len(d) // 2]), "JSONDecodeError"),
    "manifest not text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "UnicodeDecodeError"),
    "manifest a list": (lambda f: write_manifest(f, sorted(manifest(f))), "manifest"),
    "manifest a number": (lambda f: write_manifest(f, 7), "TypeError"),
    "manifest without facts": (lambda f: write_manifest(f, dict.fromkeys(manifest(f))), "TypeError"),
    "manifest without sums": (lambda f: write_manifest(f, {n: {"bytes": 1} for n in manifest(f)}), "instead of 1"),
    "manifest names above": (lambda f: in_its_manifest(f, "../../secret.bin"), "missing ../../secret.bin"),
    "manifest names a path": (lambda f: in_its_manifest(f, "{}"), "missing /"),
    "folder empty": (empty, "no manifest.json"),
    "folder a file": (replace_by_file, "no manifest.json"),
    "no format": (lambda f: ((f / "trainer.json").write_text('{"step": 2}'), sign(f)), "KeyError"),
    "no number for the step": (
        lambda f: ((f / "trainer.json").write_text('{"format": 1, "step": "two"}'), sign(f)),
        "ValueError",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_one_is_put_aside_with_one_line_and_the_one_before_is_used(root, kind):
    damage, reason = DAMAGE[kind]
    damage(root / NAME)
    before = {p.name for p in (root / NAME).iterdir()} if (root / NAME).is_dir() else None
    said = []
    found = newest(root, said.append)
    assert found.step == INTACT
    assert found.folder == root / f"step-{INTACT:07d}"
    for name, tensor in load_all(found).items():
        assert torch.equal(tensor, tensors(INTACT)[name])
    assert len(said) == 1
    assert said[0].startswith(f"warning: checkpoint {NAME} is damaged (")
    assert reason in said[0]
    assert f"corrupt-{NAME}" in said[0]
    assert "\n" not in said[0]
    assert not os.path.lexists(root / NAME)
    aside = root / f"corrupt-{NAME}"
    assert ({p.name for p in aside.iterdir()} if aside.is_dir() else None) == before
    assert newest(root, said.append).step == INTACT
    assert len(said) == 1


def test_every_flipped_bit_is_noticed(root):
    folder = root / NAME
    tried = 0
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for place in range(0, len(good), 3):
            path.write_bytes(flip(good, place, place % 8))
            with pytest.raises(CheckpointError):
                verify(folder)
            tried += 1
        path.write_bytes(good)
    assert tried > 400
    assert verify(folder).step == DAMAGED


def test_every_truncation_is_noticed(root):
    folder = root / NAME
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for length in range(0, len(good), 41):
            path.write_bytes(good[:length])
            with pytest.raises(CheckpointError):
                verify(folder)
        path.write_bytes(good)


def test_what_only_resembles_a_checkpoint_is_left_alone(root):
    for name in ("step-", "step-12a", "step-²", "stepped", ".tmp-step-0000009", "notes"):
        (root / name).mkdir()
    said = []
    assert newest(root, said.append).step == DAMAGED
    assert said == []
    assert (root / "step-²").is_dir()


def test_damaged_twice_the_later_one_is_kept_aside(root):
    for number in range(2):
        (root / NAME / "manifest.json").unlink()
        (root / NAME / f"attempt-{number}").write_text("")
        newest(root, lambda line: None)
        save(root, DAMAGED, tensors(DAMAGED), {}, 2, print)
    assert (root / f"corrupt-{NAME}" / "attempt-1").exists()


def test_where_all_are_damaged_the_run_does_not_start_from_nothing(root):
    for step in (INTACT, DAMAGED):
        shards(root / f"step-{step:07d}")[0].unlink()
    said = []
    with pytest.raises(
        CheckpointError, match=r"none of the 2 checkpoints in .* is intact; start anew with resume=never"
    ):
        newest(root, said.append)
    assert len(said) == 2
    # Nor at the second attempt, where only those put aside are left: a queue starts the same command again.
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        newest(root, said.append)
    assert len(said) == 2
    save(root, 3, tensors(3), {}, 2, print)
    assert newest(root, said.append).step == 3


def test_where_there_never_was_one_there_is_none(tmp_path):
    assert newest(tmp_path / "absent", print) is None
    (tmp_path / "empty").mkdir()
    assert newest(tmp_path / "empty", print) is None


# Another model


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: {**t, "new": torch.ones(2)}, "new is missing"),
        (lambda t: {k: v for k, v in t.items() if k != "encoder.bias"}, "encoder.bias is not expected"),
        (
            lambda t: {**t, "encoder.weight": torch.full((8, 16), 77.0)},
            "encoder.weight is torch.float32 [16, 8] instead of torch.float32 [8, 16]",
        ),
        (
            lambda t: {**t, "encoder.weight": t["encoder.weight"].bfloat16()},
            "encoder.weight is torch.float32 [16, 8] instead of torch.bfloat16 [16, 8]",
        ),
        (
            lambda t: {**t, "optimizer.step": torch.full((1,), 77)},
            "optimizer.step is torch.int64 [] instead of torch.int64 [1]",
        ),
    ],
)
def test_a_difference_is_named_and_nothing_is_copied(root, change, sentence):
    live = change({name: torch.full_like(tensor, 77) for name, tensor in tensors(0).items()})
    before = {name: tensor.clone() for name, tensor in live.items()}
    with pytest.raises(CheckpointError) as caught:
        load(newest(root, print), live)
    assert str(caught.value) == f"{root / NAME} does not fit the model: {sentence}"
    assert all(torch.equal(live[name], before[name]) for name in before)


def test_many_differences_are_three_and_a_count(root):
    with pytest.raises(CheckpointError, match=r"a is missing; b is missing; c is missing and 4 more$"):
        load(newest(root, print), {name: torch.ones(1) for name in "abcd"})


# Malice: the manifest agrees with what was put there


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def torch_file(content) -> bytes:
    path = Path("content.pt")
    torch.save(content, path)
    data = path.read_bytes()
    path.unlink()
    return data


def numpy_file(content) -> bytes:
    path = Path("content.npy")
    np.save(path, np.array([content], dtype=object), allow_pickle=True)
    data = path.read_bytes()
    path.unlink()
    return data


def header_with(**metadata: str) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return json.dumps({"__metadata__": metadata, "encoder.weight": entry}).encode()


DEEP = b"[" * 200_000
HOSTILE = {
    "pickle": lambda bomb: pickle.dumps(bomb),
    "torch.save": torch_file,
    "npy of objects": numpy_file,
    "header of 2**63 bytes": lambda bomb: safetensors(b"{}", length=2**63),
    "header of 2**64 - 1 bytes": lambda bomb: safetensors(b"{}", length=2**64 - 1),
    "header beyond the file": lambda bomb: safetensors(b"{}", length=10**6),
    "header of brackets": lambda bomb: safetensors(DEEP),
    "header not JSON": lambda bomb: safetensors(pickle.dumps(bomb)),
    "shorter than a length": lambda bomb: b"\x01",
    "offsets beyond the file": lambda bomb: safetensors(header_with(), b""),
    "shards described by brackets": lambda bomb: safetensors(header_with(DCP_SHARDING_INFO=DEEP.decode()), bytes(4)),
    "shards described by a list": lambda bomb: safetensors(header_with(DCP_SHARDING_INFO="[1]"), bytes(4)),
    "shards not described": lambda bomb: safetensors(header_with(DCP_SHARDING_INFO='{"x": 1}'), bytes(4)),
}


def in_watched_child(action, marker: Path) -> list[str]:
    """Run in a forked process under an audit hook; lines "find_class ..." and "open ..." of what it did.

    The hook cannot be taken out again, so it must die with the child.
    """
    report = marker.with_name("report.txt")
    child = os.fork()
    if child == 0:
        code, seen = 1, []
        sys.addaudithook(
            lambda event, args: seen.append(f"{event} {args}") if event in ("pickle.find_class", "open") else None
        )
        try:
            action()
            report.write_text("\n".join(seen))
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return report.read_text().splitlines()


def test_the_audit_hook_of_these_tests_sees_a_pickle(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "marker"))
    seen = in_watched_child(lambda: pickle.loads(bomb), tmp_path / "marker")
    assert any(line.startswith("pickle.find_class") for line in seen)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_shard_is_refused_in_a_sentence_and_never_executed(root, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "marker"
    shards(root / NAME)[0].write_bytes(HOSTILE[kind](Bomb(marker)))
    sign(root / NAME)

    def resume():
        found = newest(root, print)
        assert found.step == DAMAGED
        with pytest.raises(CheckpointError, match=r"^[^\n]{1,500}$") as caught:
            load_all(found)
        assert str(root / NAME) in str(caught.value)

    seen = in_watched_child(resume, marker)
    assert [line for line in seen if "find_class" in line] == []
    assert not marker.exists()


def test_native_checkpoint_files_beside_the_shards_are_not_read(root, tmp_path):
    marker = tmp_path / "marker"
    for name in (".metadata", "__0_0.distcp", "optimizer.pt"):
        (root / NAME / name).write_bytes(pickle.dumps(Bomb(marker)))
    sign(root / NAME)

    def resume():
        assert all(torch.equal(v, tensors(DAMAGED)[k]) for k, v in load_all(newest(root, print)).items())

    assert [line for line in in_watched_child(resume, marker) if "find_class" in line] == []
    assert not marker.exists()


@pytest.mark.parametrize("file", ["trainer.json", "manifest.json"])
@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"format": 1, "step": ' + "9" * 10_000 + "}", '{"format": 1, "step": 1e999}', "[]", "null"],
    ids=["brackets", "a long number", "infinity", "list", "null"],
)
def test_a_hostile_description_is_damage_like_any_other(root, file, text):
    (root / NAME / file).write_text(text)
    if file == "trainer.json":
        sign(root / NAME)
    said = []
    assert newest(root, said.append).step == INTACT
    assert len(said) == 1
    assert len(said[0]) < 500
    assert "\n" not in said[0]


@pytest.mark.parametrize("name", ["../../secret.bin", "{}"])
def test_nothing_outside_the_folder_is_opened(root, tmp_path, name):
    in_its_manifest(root / NAME, name)
    seen = in_watched_child(lambda: newest(root, print), tmp_path / "marker")
    assert any("manifest.json" in line for line in seen)
    assert not [line for line in seen if "secret.bin" in line]


def test_a_linked_shard_is_not_opened(root, tmp_path):
    link(shards(root / NAME)[0])
    target = shards(root / NAME)[0].name
    seen = in_watched_child(lambda: newest(root, print), tmp_path / "marker")
    assert not [line for line in seen if f"{NAME}/{target}" in line or str(tmp_path / target) in line]
