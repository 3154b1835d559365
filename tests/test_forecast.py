"""`python -m fastjepa plan`, whole: what it prints for a GPU that this machine need not have."""

import re
import time
from pathlib import Path

import pytest
import torch

from fastjepa.__main__ import main
from fastjepa.costs import COMPONENTS
from fastjepa.verbs import plan as verb

CONFIGS = Path(__file__).parents[1] / "configs"
MEMORY = ("weights", "half-precision copies", "gradients", "AdamW moments", "target encoder", "activations")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def plan(capsys, config: str, *arguments: str) -> str:
    assert main(["plan", str(CONFIGS / config), *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def figures(out: str, name: str) -> list[float]:
    """The numbers of a row of a table; nothing and next to nothing are 0."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"{name}  ")][:1]
    cells = line[24:].replace("of", "").split()
    return [0.0 if cell in ("-", "<0.001") else float(cell.strip("%").replace(",", "")) for cell in cells]


def speed(out: str) -> tuple[float, float, float]:
    """Expected clips/s, MFU in percent, clips/s at the floor."""
    expected, mfu, floor = re.search(
        r"speed +(\S+) clips/s expected, MFU (\S+)% of .* floor (\S+) clips/s", out
    ).groups()
    return float(expected.replace(",", "")), float(mfu), float(floor.replace(",", ""))


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("vitl.yaml", ()),
        ("vith_384.yaml", ("data.batch_size=10",)),
        ("demo.yaml", ()),
        ("vitl_noised.yaml", ()),
        ("vitl.yaml", ("mask.kind=tube", "mask={kind: tube, ratio: 0.9}")),
        ("vitl.yaml", ("runtime.execution=reference", "optim.dtype=float16")),
        ("vitl.yaml", ("mask.truncation=none", "data.clips_per_video=2", "data.erase=0.25")),
        ("vith.yaml", ("runtime.kernels=triton", "runtime.device=cuda")),
    ],
)
def test_every_recipe_gets_all_tables_in_seconds_without_weights(capsys, monkeypatch, config, more):
    built = []
    original = verb.build_jepa
    monkeypatch.setattr(verb, "build_jepa", lambda s: built.append(original(s)) or built[0])
    began = time.process_time()
    out = plan(capsys, config, *more)
    assert time.process_time() - began < 15
    assert all(p.is_meta for p in built[0].parameters() if p.requires_grad)
    assert out.startswith("for        one H200 (this machine has no GPU; --gpu names another): 141 GB")
    for line in ("model", "tokens", "clips", "batch", "work", "schedule", "speed", "time"):
        assert re.search(rf"^{line} +", out, re.MULTILINE)
    for name in (*COMPONENTS, *MEMORY, "input clips", "waiting for launches"):
        assert figures(out, name)
    assert out.count("Figures of a model, not measurements") == 1
    assert "DOES NOT FIT" not in out


def test_rows_add_up_and_the_speed_follows_from_them(capsys):
    out = plan(capsys, "vitl.yaml", "data.batch_size=24")
    rows = [figures(out, name) for name in (*COMPONENTS, "waiting for launches")]
    whole = figures(out, "total")
    for column, value in enumerate(whole):
        assert sum(row[column] for row in rows) == pytest.approx(value, rel=0.02), column
    expected, mfu, floor = speed(out)
    assert expected == pytest.approx(3072 / whole[3] * 1e3, rel=0.01)
    assert floor == pytest.approx(3072 / whole[2] * 1e3, rel=0.01)
    work = float(re.search(r"work +(\S+) TFLOP a clip", out).group(1))
    assert mfu == pytest.approx(100 * expected * work / 989, rel=0.01)
    days = float(re.search(r"90000 steps of 3072 clips: (\S+) days on one GPU", out).group(1))
    assert days == pytest.approx(90000 * 3072 / expected / 86400, rel=0.01)
    memory = out[out.index("\nmemory ") :]
    held = [figures(memory, name)[0] for name in (*MEMORY, "input clips")]
    assert sum(held) == pytest.approx(figures(memory, "total")[0], rel=0.01)


@pytest.mark.parametrize(
    ("config", "clips", "expected", "floor"),
    [("vitl.yaml", 24, 182, 261), ("vith.yaml", 24, 106, 146), ("vith_384.yaml", 10, 23.4, 36)],
)
def test_fused_kernels_on_an_h200_come_to_the_published_figures(capsys, config, clips, expected, floor):
    sizes = (f"data.batch_size={clips}", f"optim.global_batch={clips}")
    found = speed(plan(capsys, config, "--gpu", "h200", "runtime.kernels=triton", *sizes))
    assert (found[0], found[2]) == (pytest.approx(expected, rel=0.15), pytest.approx(floor, rel=0.1))


def test_slower_ways_and_smaller_gpus_are_slower(capsys):
    ways = (["runtime.kernels=triton"], [], ["runtime.execution=reference"], ["optim.dtype=float32"])
    speeds = [speed(plan(capsys, "vitl.yaml", *way))[0] for way in ways]
    assert speeds == sorted(speeds, reverse=True)
    gpus = [speed(plan(capsys, "vitl.yaml", "--gpu", name))[0] for name in ("b200", "h200", "h100", "a100", "rtx4090")]
    assert gpus == sorted(gpus, reverse=True)
    assert len(set(gpus)) == len(gpus)


@pytest.mark.parametrize("way", [["--gpu", "a100"], ["--gpu=a100"], ["--gpu", "A100"]])
def test_a_named_gpu_is_planned_for_wherever_the_name_stands(capsys, way):
    assert main(["plan", *way, str(CONFIGS / "vitl.yaml"), "data.batch_size=24"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("for        one A100 80GB (named by --gpu): 80 GB; data sheet 312 TFLOP/s")
    assert "assumed to reach" in first
    assert plan(capsys, "vitl.yaml", "data.batch_size=24", *way) == first


def test_an_automatic_batch_fits_the_named_gpu(capsys):
    batches = {}
    for name in ("rtx4090", "a100", "h200"):
        out = plan(capsys, "vith_384.yaml", "--gpu", name)
        batches[name] = int(re.search(r"2400 clips a step = (\d+) x", out).group(1))
        assert "DOES NOT FIT" not in out
    assert batches["rtx4090"] < batches["a100"] < batches["h200"]


def test_a_batch_that_does_not_fit_is_one_sentence_with_the_largest_that_does(capsys):
    out = plan(capsys, "vith.yaml", "data.batch_size=1536", "--gpu", "b200")
    last = out.splitlines()[-1]
    assert last.startswith("DOES NOT FIT: data.batch_size 1536 needs 1,801 GB by the model, one B200 gives 162 GB")
    size = re.search(r"that fits is (\d+): data.batch_size=\1$", last).group(1)
    assert 3072 % int(size) == 0
    assert "DOES NOT FIT" not in plan(capsys, "vith.yaml", f"data.batch_size={size}", "--gpu", "b200")
    next_one = min(n for n in range(int(size) + 1, 3073) if 3072 % n == 0)
    assert "DOES NOT FIT" in plan(capsys, "vith.yaml", f"data.batch_size={next_one}", "--gpu", "b200")


def test_the_batch_that_fits_holds_whole_videos(capsys):
    out = plan(capsys, "vith.yaml", "data.batch_size=1536", "data.clips_per_video=8", "--gpu", "h200")
    size = int(re.search(r"in videos of 8 clips that fits is (\d+):", out.splitlines()[-1]).group(1))
    assert size % 8 == 0


def test_a_model_that_fits_at_no_batch_says_so(capsys):
    out = plan(capsys, "vith.yaml", "model.name=vit_gigantic", "--gpu", "rtx4090")
    assert re.search(r"DOES NOT FIT: data.batch_size 1 .*; no batch does, the smallest possible one is 1$", out.strip())


def test_an_unknown_gpu_is_one_sentence_and_wrong_input(capsys):
    assert main(["plan", str(CONFIGS / "vitl.yaml"), "--gpu", "h2000"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("--gpu: expected one of h200, ")
    assert captured.err.endswith("given 'h2000'\n")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--gpu"], ["--gpu="]])
def test_a_missing_name_is_one_sentence_and_wrong_input(capsys, arguments):
    assert main(["plan", str(CONFIGS / "vitl.yaml"), *arguments]) == 2
    assert capsys.readouterr().err == "--gpu: expected the name of a GPU, given nothing, for example --gpu h200\n"
