"""A hundred damaged checkpoints, drawn by a seed: each has its answer, in one sentence, and nothing else happens."""

import json
import os
import pickle
import random
import shutil
import sys
import zlib
from pathlib import Path

import pytest
import torch

from fastjepa.checkpoint import CheckpointError, Found, load, newest, save, write
from tests.checkpoints import in_child, names, quiet, tensors

INTACT, DAMAGED, FOREIGN = 1, 2, 3
NAME = f"step-{DAMAGED:07d}"
CASES = 100


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints of one run, and one of another with other shapes."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "FILE_BYTES", 1500)
        for step in (INTACT, DAMAGED):
            save(folder / "checkpoints", step, tensors(step), {}, 2, quiet)
        other = {name: torch.cat([tensor, tensor]) if tensor.ndim else tensor for name, tensor in tensors(3).items()}
        save(folder / "other", FOREIGN, other, {}, 2, quiet)
    return folder


# Each damages the folder; `rng` says where.


def cut_short(rng, folder, other):
    path = some(rng, folder)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def longer(rng, folder, other):
    path = some(rng, folder)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 50)))


def flipped(rng, folder, other):
    path = some(rng, folder)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 20])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zeros(rng, folder, other):
    path = shard(rng, folder)
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) - 64)
    data[start : start + 64] = bytes(64)
    path.write_bytes(data)


def noise(rng, folder, other):
    path = some(rng, folder)
    path.write_bytes(rng.randbytes(path.stat().st_size))


def swapped(rng, folder, other):
    one, two = rng.sample(sorted(folder.iterdir()), 2)
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def foreign_shard(rng, folder, other):
    shutil.copy(shard(rng, other), shard(rng, folder))


def shard_of_the_step_before(rng, folder, other):
    path = shard(rng, folder)
    shutil.copy(folder.parent / f"step-{INTACT:07d}" / path.name, path)


def one_more(rng, folder, other):
    shutil.copy(shard(rng, other), folder / f"shard-{rng.randrange(10, 99999):05d}-model-00001-of-00001.safetensors")


def missing(rng, folder, other):
    some(rng, folder).unlink()


def renamed(rng, folder, other):
    path = shard(rng, folder)
    path.rename(path.with_name(f"x{path.name}"))


def linked(rng, folder, other):
    path = some(rng, folder)
    target = folder.parents[1] / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def pipe(rng, folder, other):
    path = some(rng, folder)
    path.unlink()
    os.mkfifo(path)


def pickled(rng, folder, other):
    shard(rng, folder).write_bytes(pickle.dumps({"a": Path("x")}))


def another_manifest(rng, folder, other):
    shutil.copy(other / "manifest.json", folder)


def wrong_json(rng, folder, other):
    texts = ["", "[]", "null", "{", "[" * 100_000, '{"a": NaN}', "7", '"x"', '{"trainer.json": {}}']
    (folder / rng.choice(["manifest.json", "trainer.json"])).write_text(rng.choice(texts))


def header_edited(rng, folder, other):
    path = shard(rng, folder)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key = rng.choice([key for key in header if key != "__metadata__"])
    edits = [
        lambda: header[key].update(dtype="I8"),
        lambda: header[key].update(shape=[2**62, 2**62]),
        lambda: header[key].update(shape=[-1]),
        lambda: header[key].update(data_offsets=[10**15, 10**16]),
        lambda: header.update({"../../x": header.pop(key)}),
        lambda: header.update(__metadata__={"DCP_SHARDING_INFO": rng.choice(["7", '"x"', "[[]]", "{}", "nul"])}),
        lambda: header["__metadata__"].update(
            DCP_SHARDING_INFO=json.dumps({name: {"saved_offsets": rng.choice([[10**30], [-5, 0], "ab", None, [[]]])}
                                          for name in header})
        ),
    ]  # fmt: skip
    rng.choice(edits)()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


ACCIDENTS = [cut_short, longer, flipped, zeros, noise, swapped, foreign_shard, shard_of_the_step_before, one_more,
             missing, renamed, linked, pipe, pickled, another_manifest, wrong_json, header_edited]  # fmt: skip
# With a manifest that agrees, as someone would write who wants to be believed.
SIGNED = [cut_short, longer, noise, foreign_shard, one_more, missing, pickled, header_edited]


def some(rng, folder):
    return rng.choice(sorted(folder.iterdir()))


def shard(rng, folder):
    return rng.choice(sorted(folder.glob("*.safetensors")))


def sign(folder):
    facts = {
        path.name: {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(facts))


def one_sentence(text: str) -> bool:
    return 0 < len(text) < 600 and "\n" not in text and "Traceback" not in text


def equal(have, want) -> bool:
    return all(torch.equal(have[name], want[name]) for name in want)


def answer(root: Path, signed: bool) -> str:
    """What a run does with these checkpoints: "fallback", "refused" or "loaded". AssertionError for anything else."""
    said: list[str] = []
    live = {name: torch.full_like(tensor, 77) for name, tensor in tensors(0).items()}
    untouched = {name: tensor.clone() for name, tensor in live.items()}
    refused = None
    try:
        found = newest(root, said.append)
        assert isinstance(found, Found)
        load(found, live)
    except CheckpointError as error:
        refused = str(error)
    if refused is not None:
        assert one_sentence(refused), refused
        assert equal(live, untouched)
        assert signed, f"no fallback: {refused}"
        return "refused"
    if found.step == DAMAGED:
        assert signed, "damage was not noticed"
        return "loaded"
    assert equal(live, tensors(INTACT))
    assert len(said) == 1
    assert one_sentence(said[0])
    assert names(root) == [f"corrupt-{NAME}", "latest", f"step-{INTACT:07d}"]
    return "fallback"


def test_a_hundred_damaged_checkpoints_are_answered_and_nothing_else_happens(saved, tmp_path):
    """In one child, under an audit hook that sees every pickle and every file that is opened."""
    roots, signed = [], []
    for case in range(CASES):
        rng = random.Random(case)
        root = Path(shutil.copytree(saved / "checkpoints", tmp_path / str(case) / "checkpoints", symlinks=True))
        signed.append(case % 3 == 2)
        damage = (SIGNED if signed[-1] else ACCIDENTS)[case // 3 % len(SIGNED if signed[-1] else ACCIDENTS)]
        damage(rng, root / NAME, saved / "other" / f"step-{FOREIGN:07d}")
        if signed[-1]:
            sign(root / NAME)
        roots.append(root)

    def look() -> None:
        load(newest(saved / "checkpoints", quiet), tensors(0))  # whatever is imported on the way is so by now
        seen: list[tuple[str, str]] = []

        def hook(event, arguments):
            if event in ("pickle.find_class", "open", "os.system", "subprocess.Popen", "os.mkdir", "exec"):
                seen.append((event, str(arguments[0])))

        sys.addaudithook(hook)
        answers = []
        for root, was_signed in zip(roots, signed):
            seen.clear()
            answers.append(answer(root, was_signed))
            strange = [one for one in seen if one[0] != "open" or not one[1].startswith(str(root))]
            assert not strange, (root, strange[:3])
            outside = {p.name for p in root.parent.iterdir()} - {"checkpoints", "elsewhere"}
            assert not outside, outside
        assert answers.count("fallback") >= 60
        assert answers.count("refused") >= 15
        print({kind: answers.count(kind) for kind in set(answers)})

    assert in_child(look) == 0


def test_where_every_one_is_damaged_the_answer_is_one_sentence(saved, tmp_path):
    for case, damage in enumerate(ACCIDENTS):
        rng = random.Random(case)
        root = Path(shutil.copytree(saved / "checkpoints", tmp_path / str(case) / "checkpoints", symlinks=True))
        for step in (DAMAGED, INTACT):
            folder = root / f"step-{step:07d}"
            (damage if damage is not shard_of_the_step_before else noise)(
                rng, folder, saved / "other" / f"step-{FOREIGN:07d}"
            )
        said = []
        with pytest.raises(
            CheckpointError, match=r"^none of the 2 checkpoints in [^\n]* is intact; start anew"
        ) as caught:
            newest(root, said.append)
        assert one_sentence(str(caught.value))
        assert len(said) == 2
