"""The batch script for SLURM: what it starts, and when it asks for another turn. srun and scontrol are stand-ins."""

import os
import subprocess

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "configs" / "slurm.sbatch"


@pytest.fixture
def submitted(tmp_path):
    """Run the script with an srun that ends with some code; (exit code, what was called)."""

    def go(code):
        calls = tmp_path / "calls"
        for name, end in (("srun", code), ("scontrol", 0)):
            program = tmp_path / name
            program.write_text(f'#!/bin/sh\necho "{name} $@" >> {calls}\nexit {end}\n')
            program.chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
        environment["SLURM_CPUS_PER_TASK"] = "12"
        done = subprocess.run(
            ["bash", str(SCRIPT), "configs/vith.yaml", "log.folder=a folder"], env=environment, check=False
        )
        return done.returncode, calls.read_text().splitlines()

    return go


def test_a_run_that_saved_after_a_signal_is_queued_again(submitted):
    code, calls = submitted(75)
    assert code == 75
    assert calls == [
        "srun --wait=120 --cpus-per-task=12 python -m fastjepa.train configs/vith.yaml log.folder=a folder",
        "scontrol requeue 77",
    ]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 130])
def test_any_other_end_is_the_end_of_the_job(submitted, code):
    given, calls = submitted(code)
    assert given == code
    assert [call.split()[0] for call in calls] == ["srun"]


def test_the_signal_comes_in_time_and_is_one_that_the_program_watches():
    from fastjepa.signals import WATCHED

    (line,) = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH --signal=")]
    name, _, seconds = line.partition("=")[2].partition("@")
    assert f"SIG{name}" in {number.name for number in WATCHED}
    assert int(seconds) >= 60
