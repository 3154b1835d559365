"""Ctrl-C in the seconds before a run begins, while torch is imported: nobody wants to read a traceback then."""

import os
import subprocess
import sys
from pathlib import Path

from fastjepa.exits import Exit
from tests.reliability.harness import RECIPE

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib.abc, os, signal, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "fastjepa.start":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Watch())
from fastjepa.train import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "tiny.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (Exit.SECOND_INTERRUPT, "")
    assert os.listdir(tmp_path) == ["tiny.yaml"]
