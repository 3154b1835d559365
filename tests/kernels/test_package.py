"""The package by itself: what it needs, what it prints, what its kernels need of a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastjepa_kernels.testing.compile_only import SHARED_LIMIT, TARGETS, compile_for

KERNELS = Path(__file__).parents[2] / "kernels"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is absent: there is none for this system"
)


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
    [("info", "fastjepa_kernels 0.1.0"), ("explain", "gather_tokens: "), ("--help", "compile")],
)
def test_verbs(verb, words):
    done = python("", "-m", "fastjepa_kernels", verb)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


@needs_triton
def test_a_target_that_is_not_known_is_refused():
    done = python("", "-m", "fastjepa_kernels", "compile", "--targets", "sm_91")
    assert done.returncode == 2
    assert "--targets: expected some of sm_80, sm_90, sm_100, given sm_91" in done.stderr


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spills_and_without_float64(target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from fastjepa_kernels._triton.catalogue import shipped

    # The first and the last setting of every kernel; `python -m fastjepa_kernels compile` takes minutes and shows all.
    settings = {}
    for entry in shipped():
        settings.setdefault(entry.kernel, []).append(entry)
    assert len(settings) >= 12
    for entry in [
        entry for group in settings.values() for entry in {group[0].name: group[0], group[-1].name: group[-1]}.values()
    ]:
        needs = compile_for(target, entry.kernel, entry.signature, entry.constants, warps=entry.warps)
        assert needs.spilled == 0, (entry.name, needs)
        assert needs.float64 == 0, (entry.name, needs)
        assert needs.shared <= SHARED_LIMIT[target], (entry.name, needs)


@needs_triton
def test_the_counts_are_real():
    """A kernel that needs double precision and too many registers is seen to."""
    from fastjepa_kernels._triton import gather

    types = {
        "x": "*fp64",
        "index": "*i64",
        "out": "*fp64",
        "clips": "i32",
        "kept": "i32",
        "x_clip": "i32",
        "x_token": "i32",
    }
    needs = compile_for("sm_90", gather.gather_kernel, types, {"WIDTH": 384, "LANES": 512})
    assert needs.registers > 8
    summed = {"gradient": "*fp64", "inverse": "*i32", "out": "*fp64", "clips": "i32", "kept": "i32", "tokens": "i32"}
    heavy = compile_for("sm_90", gather.sum_kernel, summed, {"MASKS": 2, "WIDTH": 8192, "LANES": 8192}, warps=1)
    assert heavy.spilled > 0
