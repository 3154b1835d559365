"""The profile of a step: its components, its most expensive operators, and what a wrong argument says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.step import ways
from bench.step.profile import COMPONENTS, components

ROOT = Path(__file__).parents[2]


def profile(*arguments):
    command = [sys.executable, "-m", "bench.step", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--models", "vitx"), "--models: expected one of vitl,vith,vith_384,vjepa2_vitl,vjepa2_vitg, given 'vitx'."),
        (("--way", "fast"), "--way: expected one of packed,packed-eager,"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments, sentence, tmp_path):
    done = profile("--device", "cpu", *arguments, "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence)
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["packed", "reference"])
def test_a_profile_names_components_and_the_most_expensive_operators(tmp_path, way):
    done = profile("--quick", "--device", "cpu", "--models", "vith", "--way", way, "--trace", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    text, trace = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert text.name.startswith(f"profile-vith-{way}-cpu-")
    lines = text.read_text().splitlines()
    assert lines[0] == f"vith, {way} (vit_nano in place of it)"
    assert f"command python -m bench.step --models vith --way {way} --trace --quick --device cpu" in lines
    start = next(number for number, line in enumerate(lines) if line.startswith("component"))
    parts = {line.split()[0]: float(line.split()[1]) for line in lines[start + 1 : start + 8]}
    assert list(parts) == ["target", "context", "predictor", "loss", "backward", "optimizer", "step"]
    assert min(parts.values()) > 0
    costs = [float(line.split()[0]) for line in lines[start + 11 :]]
    assert len(costs) == 30
    assert costs == sorted(costs, reverse=True)
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"target", "context", "predictor", "backward", "optimizer", "step"} <= events


def test_the_predictor_of_the_dense_loss_is_timed_as_the_predictor():
    cpu, dense = torch.device("cpu"), ("model.levels=deep", "loss.context=0.5")
    s = ways.settings_of("vjepa2_vitl", "packed", quick=True, overrides=dense)
    parts = components(ways.Runner(s, cpu), ways.prepare(s, 2, cpu), 2)
    assert min(parts[name] for name in COMPONENTS) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["packed", "packed-triton"])
def test_a_profile_on_cuda_names_kernels(tmp_path, way):
    done = profile("--quick", "--models", "vitl", "--way", way, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert "kernels: " in text
    assert "aten::" not in text.partition("most expensive")[2]
