"""Files that are no checkpoint, damaged ones and hostile ones: a sentence each, and nothing in them is executed."""

import os
import pickle
import sys
import traceback
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastjepa.interop import WeightsRefused, load_meta_checkpoint, load_own_checkpoint, read_weights


@pytest.fixture
def file(tmp_path):
    """Where the file lies."""
    return tmp_path / "published.pth.tar"


def published():
    """The smallest content of the public layout."""
    networks = {
        "encoder": ("pos_embed", "norm.bias"),
        "predictor": ("predictor_norm.bias",),
        "target_encoder": ("pos_embed", "norm.bias"),
    }
    content = {
        name: OrderedDict((f"module.backbone.{key}", torch.ones(1, 32, 64)) for key in keys)
        for name, keys in networks.items()
    }
    return {**content, "opt": {"state": {}, "param_groups": []}, "scaler": None, "epoch": 7, "loss": 0.5, "lr": 1e-3}


def refusal(call, *arguments):
    with pytest.raises(WeightsRefused) as caught:
        call(*arguments)
    return str(caught.value)


def test_the_content_of_these_tests_is_read(file):
    torch.save(published(), file)
    loaded = load_meta_checkpoint(file)
    assert loaded.facts == {"epoch": 7, "loss": 0.5, "lr": 1e-3}
    assert {name: sorted(state) for name, state in loaded.networks.items()} == {
        "encoder": ["norm.bias", "pos_embed"],
        "predictor": ["predictor_norm.bias"],
        "target_encoder": ["norm.bias", "pos_embed"],
    }


# Files that are something else


def write(kind, path):
    content = published()
    if kind == "nothing":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("model: {name: vit_large}\n")
    elif kind == "safetensors":
        save_file({"encoder.norm.weight": torch.zeros(3)}, path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "hello")
    elif kind == "zip bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10_000_000))
    elif kind == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "probe":
        torch.save({"classifiers": [{"module.linear.weight": torch.zeros(3, 3)}], "epoch": 3}, path)
    elif kind == "encoder only":
        torch.save({"encoder": content["encoder"]}, path)
    elif kind == "second generation without patches":
        for name in ("encoder", "target_encoder"):
            del content[name]["module.backbone.pos_embed"]
        torch.save(content, path)
    elif kind == "V-JEPA 2.1":
        content["encoder"]["module.backbone.norms_block.0.weight"] = torch.ones(64)
        torch.save(content, path)
    elif kind == "V-JEPA 2-AC":
        torch.save({**content, "predictor": {"module.action_encoder.weight": torch.ones(8, 7)}}, path)
    elif kind == "whole numbers":
        content["encoder"]["module.backbone.norm.bias"] = torch.zeros(64, dtype=torch.int64)
        torch.save(content, path)
    elif kind == "sparse":
        content["encoder"]["module.backbone.norm.bias"] = torch.zeros(64).to_sparse()
        torch.save(content, path)
    elif kind == "no tensor":
        content["encoder"]["module.backbone.norm.bias"] = "bias"
        torch.save(content, path)
    elif kind == "words for numbers":
        torch.save({**content, "epoch": "seven"}, path)
    elif kind == "words for a state":
        torch.save({**content, "opt": "AdamW"}, path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nothing", "not a zip archive"),
        ("text", "not a zip archive"),
        ("safetensors", "not a zip archive"),
        ("legacy", "not a zip archive"),
        ("zip", "cannot be read as tensors alone"),
        ("zip bomb", "is no checkpoint: it would unpack to 10000000 bytes"),
        ("list", "it holds a list"),
        ("tensor", "it holds a Tensor"),
        ("probe", "it has no encoder, predictor, target_encoder; it holds classifiers, not a pretrained encoder"),
        ("encoder only", "it has no predictor, target_encoder"),
        ("second generation without patches", "encoder has no patch_embed.proj.weight"),
        (
            "V-JEPA 2.1",
            "holds V-JEPA 2.1 (encoder.module.backbone.norms_block.0.weight), which this",
        ),
        ("V-JEPA 2-AC", "holds the action-conditioned V-JEPA 2-AC (predictor.module.action_encoder.weight)"),
        ("whole numbers", "module.backbone.norm.bias is not a dense tensor of floating-point numbers"),
        ("sparse", "module.backbone.norm.bias is not a dense tensor of floating-point numbers"),
        ("no tensor", "module.backbone.norm.bias is not a dense tensor of floating-point numbers"),
        ("words for numbers", "epoch, loss and the like are not numbers"),
        ("words for a state", "opt or scaler is no state"),
        ("no file", "no such file or folder"),
    ],
)
def test_another_kind_of_file_is_refused_in_one_sentence(file, kind, words):
    write(kind, file)
    text = refusal(read_weights, file)
    assert str(file) in text
    assert words in text
    assert "\n" not in text
    assert len(text) < 500


def test_a_file_cut_off_anywhere_is_refused_in_one_sentence(file):
    torch.save(published(), file)
    whole = file.read_bytes()
    for length in [*range(1, len(whole), len(whole) // 60), len(whole) - 1]:
        file.write_bytes(whole[:length])
        text = refusal(load_meta_checkpoint, file)
        assert "\n" not in text
        assert str(file) in text


def test_damage_in_the_middle_is_a_sentence_or_harmless(file):
    """No damaged byte of the pickle brings an exception of another kind."""
    torch.save({key: value for key, value in published().items() if key != "predictor"}, file)
    with zipfile.ZipFile(file) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [name for name in names if name.endswith("data.pkl")]
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        body = bytearray(names[pickled])
        at, bit = (int(torch.randint(n, (), generator=generator)) for n in (len(body), 8))
        body[at] ^= 1 << bit
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in {**names, pickled: bytes(body)}.items():
                archive.writestr(name, content)
        assert "\n" not in refusal(load_meta_checkpoint, file)


# Hostile files


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def in_watched_child(action, marker: Path) -> list[str]:
    """Run in a forked process under an audit hook, which cannot be taken out again; its pickle and exec events."""
    report = marker.with_name("report.txt")
    child = os.fork()
    if child == 0:
        code, seen = 1, []
        names = ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen")
        sys.addaudithook(lambda event, args: seen.append(f"{event} {args}") if event in names else None)
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


def hostile(kind, path, content, bomb):
    if kind == "a pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif kind == "in the place of the dict":
        torch.save(bomb, path)
    elif kind == "in a zip of its own":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(bomb, protocol=2))
            archive.writestr("archive/version", "3")
    elif kind == "legacy":
        torch.save({**content, "opt": bomb}, path, _use_new_zipfile_serialization=False)
    elif kind == "among the weights":
        content["encoder"]["module.backbone.norm.bias"] = bomb
        torch.save(content, path)
    else:
        torch.save({**content, kind: bomb}, path)


KINDS_OF_BOMB = ["a pickle", "in the place of the dict", "in a zip of its own", "legacy", "among the weights"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", [*KINDS_OF_BOMB, "opt", "scaler", "something"])
def test_a_hostile_file_is_refused_in_a_sentence_and_never_executed(file, tmp_path, monkeypatch, kind, force):
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    hostile(kind, file, published(), Bomb(marker))

    def read():
        text = refusal(read_weights, file)
        assert str(file) in text
        assert "\n" not in text
        assert len(text) < 500

    assert in_watched_child(read, marker) == []
    assert not marker.exists()


def test_the_watch_of_these_tests_sees_a_bomb(file, tmp_path):
    marker = tmp_path / "marker"
    torch.save(Bomb(marker), file)
    seen = in_watched_child(lambda: torch.load(file, weights_only=False), marker)
    assert any(line.startswith("pickle.find_class") for line in seen)
    assert marker.exists()


def test_a_good_file_asks_the_unpickler_for_nothing(file, tmp_path):
    torch.save(published(), file)
    assert in_watched_child(lambda: load_meta_checkpoint(file), tmp_path / "marker") == []


def test_what_is_no_folder_of_a_run_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WeightsRefused, match="gone is no such folder, and no run of fastjepa"):
        load_own_checkpoint(tmp_path / "gone")
    with pytest.raises(WeightsRefused, match=r"file is a file, and no run of fastjepa$"):
        load_own_checkpoint(tmp_path / "file")
    with pytest.raises(WeightsRefused, match="a folder, no file of weights"):
        load_meta_checkpoint(tmp_path)
