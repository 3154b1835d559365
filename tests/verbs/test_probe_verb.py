"""`python -m fastjepa probe`: what it prints and keeps, and what it says of mistakes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fastjepa import __main__, configfile
from fastjepa.exits import Exit
from fastjepa.start import start
from tests.conftest import SETTINGS


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two steps, of which nobody changes anything."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        (folder / "tiny.yaml").write_text(SETTINGS)
        overrides = [f"log.folder={folder / 'runs'}", "optim.steps=2", "checkpoint.every=1"]
        assert start(configfile.load(folder / "tiny.yaml", overrides), "tiny") == Exit.DONE
        yield next((folder / "runs").glob("tiny-*"))


@pytest.fixture
def probe(capsys):
    def go(*arguments):
        capsys.readouterr()
        code = __main__.main(["probe", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return go


def without_results(run):
    """Size and time of all files of a run but those of probes."""
    return {
        str(p): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in run.rglob("*")
        if p.is_file() and "probe" not in p.relative_to(run).parts
    }


def test_a_run_is_probed_in_two_ways_and_nothing_else_in_it_changes(trained, probe):
    (trained / "crashed_videos.jsonl").write_bytes(b'{"path": "half a li')  # its process may be writing just now
    before = without_results(trained)
    code, out, err = probe(trained)
    assert (code, err) == (Exit.DONE, "")
    assert without_results(trained) == before
    lines = out.splitlines()
    heads = [n for n, line in enumerate(lines) if line.split()[1:2] == ["probe"]]
    assert [lines[n].split()[0] for n in heads] == ["knn", "linear"]
    assert [lines[n + k].split()[0] for n in heads for k in (1, 2)] == ["motion", "shape"] * 2
    assert "top-5  class mean" in lines[heads[0]]
    assert "trained encoder: 48/48 videos; now the classifiers" in lines
    kept = sorted(p.name for p in (trained / "probe").iterdir())
    assert kept == [
        "confusion-knn-motion.png",
        "confusion-knn-shape.png",
        "confusion-linear-motion.png",
        "confusion-linear-shape.png",
        "step-0000002-knn.json",
        "step-0000002.json",
        "untrained.json",
    ]
    content = json.loads((trained / "probe" / "step-0000002-knn.json").read_text())
    assert (content["step"], content["probe"], content["network"]) == (2, "knn", "target_encoder")
    assert {"k", "validation"} == content["results"][0]["trained_choice"].keys()
    shutil.rmtree(trained / "probe")


def test_a_step_the_other_network_and_a_folder_of_images_have_files_of_their_own(trained, probe, tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.clip(rng.normal(level, 20, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{number}.png")
    code, _, err = probe(
        trained, "--step", 1, "--network", "encoder", "--probe", "knn", "--data", tmp_path / "pets",
        "--test", tmp_path / "pets", "--no-untrained", "--out", tmp_path / "found",
    )  # fmt: skip
    assert (code, err) == (Exit.DONE, "")
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == [
        "confusion-knn-encoder-pets-pets-label.png",
        "step-0000001-knn-encoder-pets-pets.json",
        "untrained.json",
    ]
    (row,) = json.loads((tmp_path / "found" / "step-0000001-knn-encoder-pets-pets.json").read_text())["results"]
    assert (row["videos"], row["untrained"], row["top5"]) == (20, None, None)
    assert row["pixels"] == 1.0
    assert not (trained / "probe").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "python -m fastjepa probe: the following arguments are required: WEIGHTS"),
        (["{run}", "--prob", "knn"], "unknown option --prob, nearest valid option: --probe"),
        (["{run}", "--probe", "linaer"], "attentive or all, given 'linaer', nearest valid name: linear"),
        (["{run}", "--step", "7"], "--step: {run} has no checkpoint of step 7; there are: 1, 2"),
        (["{run}", "--segments", "0"], "argument --segments: expected a whole number (from 1 to 64), given '0'"),
        (["{run}", "--device", "gpu"], "--device: expected cpu, cuda or cuda:N, given 'gpu'"),
        (["{run}", "--device", "cuda:99"], "--device: this machine has"),
        (["{run}", "--data", "{run}/absent"], "--data: no such folder or file: {run}/absent"),
        (["{run}", "--data", "{run}/plain.txt"], "--data: expected labels, found none in {run}/plain.txt"),
        (["{run}", "--test", "{run}/other.txt"], "--test: the test videos and the others have no labels for the same"),
        (["{run}/absent"], "{run}/absent"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(trained, probe, arguments, said):
    (trained / "plain.txt").write_text("a.mp4\nb.mp4\n")
    (trained / "other.txt").write_text("a.mp4,x\nb.mp4,y\n")
    code, _, err = probe(*(word.format(run=trained) for word in arguments))
    assert code == Exit.WRONG_INPUT
    assert said.format(run=trained) in err
    assert err.count("\n") == 1


def test_videos_of_which_none_can_be_read_are_said_on_stderr(trained, probe, tmp_path):
    (tmp_path / "list.csv").write_text("".join(f"{number}.mp4,{number % 2}\n" for number in range(9)))
    code, _, err = probe(trained, "--data", tmp_path / "list.csv", "--out", tmp_path / "found")
    assert code == Exit.FAILED
    assert err == (
        "no probe: too few of the labelled videos can be read to learn from two, choose on one and test on one\n"
    )
