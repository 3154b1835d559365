"""The package by itself: what it needs and what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def python(code, *arguments, **extra):
    environment = {**os.environ, "PYTHONPATH": str(KERNELS), **extra}
    return subprocess.run([sys.executable, *arguments, *(["-c", code] if code else [])], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip


WITHOUT = """
import sys
for name in {names}:
    sys.modules[name] = None  # as if it were not installed
"""
USE = """
import torch, fastjepa_kernels as k
x = torch.randn(2, 9, 6, requires_grad=True)
k.gather_tokens(x, torch.tensor([[1, 2], [3, 4]])).sum().backward()
assert x.grad.sum() == 24
"""


def test_it_works_with_torch_alone():
    names = ("triton", "numpy", "einops", "timm", "transformers", "fastjepa")
    done = python(WITHOUT.format(names=names) + USE)
    assert done.returncode == 0, done.stderr


def test_import_loads_no_triton_and_runs_nothing():
    done = python("import sys, fastjepa_kernels; sys.exit('fastjepa_kernels._triton.gather' in sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("info", "fastjepa_kernels 0.1.0"),
        ("explain", "gather_tokens: "),
        ("explain", "chosen: sdpa"),
        ("--help", "compile"),
    ],
)
def test_verbs(verb, words):
    done = python("", "-m", "fastjepa_kernels", verb)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
