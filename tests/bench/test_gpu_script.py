"""The script that runs everything on a GPU machine: its stages, its table, and what it does with a failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = "ceilings tests kernels step public data profile"


def gpu_sh(*stages, **extra):
    command = ["bash", "bench/gpu.sh", *stages]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | extra
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("stages", [(), ("nothing",), ("ceilings", "nothing")])
def test_gpu_script_names_its_stages_when_asked_for_none_or_another(stages, tmp_path):
    process = gpu_sh(*stages, OUT=str(tmp_path / "out"))
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert "ceilings tests kernels step public data profile" in process.stderr
    assert not process.stdout
    assert not (tmp_path / "out").exists(), "no stage may start before all names are known to be right"


def test_gpu_script_runs_ceilings_and_lists_its_file(tmp_path):
    process = gpu_sh("ceilings", OUT=str(tmp_path), CEILINGS_ARGS="--quick --device cpu --stages copy")
    assert process.returncode == 0, process.stderr
    (file,) = tmp_path.iterdir()
    header, row = process.stdout.splitlines()[-2:]
    assert header.split()[:3] == ["stage", "seconds", "verdict"]
    stage, _, verdict, name = row.split()
    assert (stage, verdict, name) == ("ceilings", "ok", file.name)


def test_gpu_script_goes_on_after_a_failed_stage_and_ends_with_1(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "called with $*"\ncase "$*" in *bench.ceilings*) exit 3;; esac\n')
    fake.chmod(0o755)
    process = gpu_sh("ceilings", "tests", OUT=str(tmp_path / "out"), PYTHON=str(fake))
    assert process.returncode == 1
    first, second = process.stdout.splitlines()[-2:]
    assert "failed (3)" in first
    assert first.endswith("none")
    (file,) = (tmp_path / "out").iterdir()
    assert second.split()[0] == "tests"
    assert second.endswith(file.name)
    assert file.read_text() == "called with -m pytest -q -rs -m gpu tests\n"


def fake_python(tmp_path, script):
    """An interpreter that does this instead."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    return str(fake)


def test_every_stage_that_is_documented_runs_something_that_exists(tmp_path):
    fake = fake_python(tmp_path, f'echo "$*" >> {tmp_path}/calls; touch {tmp_path}/out/x.json')
    process = gpu_sh(*STAGES.split(), OUT=str(tmp_path / "out"), PYTHON=fake, BENCH_ARGS="-k vith")
    assert process.returncode == 0, process.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(STAGES.split())
    assert [line.split()[0] for line in process.stdout.splitlines() if " ok " in line] == STAGES.split()
    for call in calls:
        for word in call.split():
            if word.startswith("bench/"):
                assert (ROOT / word).is_file(), word
            elif word.startswith("bench."):
                assert (ROOT / word.replace(".", "/") / "__main__.py").is_file(), word
    measured = [call for call in calls if "--benchmark-only" in call]
    assert len(measured) == 4
    assert all(f" --results {tmp_path / 'out'} --budget " in call and call.endswith(" -k vith") for call in measured)
    script = (ROOT / "bench" / "gpu.sh").read_text()
    assert all(f"#   {stage} " in script for stage in STAGES.split())


def test_cases_that_give_no_figure_are_a_failure(tmp_path):
    process = gpu_sh("step", OUT=str(tmp_path / "out"), PYTHON=fake_python(tmp_path, "exit 0"))
    assert process.returncode == 1
    assert "failed (1)" in process.stdout.splitlines()[-1]


def test_the_script_profiles(tmp_path):
    process = gpu_sh("profile", OUT=str(tmp_path), PROFILE_ARGS="--quick --device cpu")
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("profile-vith-packed-cpu-")
    assert process.stdout.splitlines()[-1].split()[::2] == ["profile", "ok"]
    assert process.stdout.splitlines()[-1].endswith(path.name)
