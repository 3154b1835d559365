"""Starts the tests of the kernels themselves, in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROCESSES = 2


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is absent: there is none for this system"
)
def test_the_kernels_in_the_interpreter(tmp_path):
    """A program of a kernel after the other takes minutes, so the files are shared by two processes."""
    # The longest files first: each process gets about half of the work.
    files = sorted((ROOT / "tests/kernels/interpreted").glob("test_*.py"), key=lambda path: -path.stat().st_size)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = []
    for n in range(PROCESSES):
        with (tmp_path / f"{n}.txt").open("w") as output:
            started.append(subprocess.Popen([*command, *map(str, files[n::PROCESSES])], cwd=ROOT, env=environment,
                                            stdout=output, stderr=subprocess.STDOUT))  # fmt: skip
    codes = [process.wait() for process in started]
    for n, code in enumerate(codes):
        output = (tmp_path / f"{n}.txt").read_text()
        assert code == 0, output[-4000:]
        assert " passed" in output
