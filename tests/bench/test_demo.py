import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOISED = "configs/demo_noised.yaml"
SHORT = ["data.path=synthetic://moving-shapes?videos=48&size=48&frames=10", "runtime.stop_at=2"]


def bench(*arguments):
    command = [sys.executable, "bench/demo.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("recipe", "name"), [([], "demo"), (["--recipe", NOISED], "demo_noised")])
def test_the_demo_bench_runs_the_recipe_and_writes_what_it_printed(tmp_path, recipe, name):
    done = bench(*recipe, "--seeds", "3", "--out", str(tmp_path), *SHORT)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(f"{name}-")
    result = json.loads(path.read_text())
    assert result["complete"]
    assert result["quick"]  # other settings than the recipe's: never to be quoted
    assert result["command"] == shlex.join(["python", "bench/demo.py", *recipe, "--seeds", "3", *SHORT])
    assert f"targets: {'noised' if recipe else 'mask_tokens'}" in done.stdout
    values = {row["name"]: row["value"] for row in result["rows"]}
    for task in ("motion", "shape"):
        assert f"{task:<14}{values[f'{task} trained']:>8.1f}%{values[f'{task} untrained']:>10.1f}%" in done.stdout
    assert values["whole command"] > 0
    assert values["processor time"] > 1  # torch alone takes more to import


def test_a_run_that_fails_ends_the_bench_with_its_sentence_and_its_exit_code(tmp_path):
    done = bench("--recipe", "configs/missing.yaml", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "configs/missing.yaml: no such settings file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
