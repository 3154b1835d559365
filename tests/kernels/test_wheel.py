"""The package as others get it: what is in its wheel, whether it works from there, whether its README is right."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastjepa_kernels
from fastjepa_kernels.__main__ import OPERATIONS, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "kernels" / "README.md").read_text()
PACKAGE = ROOT / "kernels" / "fastjepa_kernels"
needs_hatchling = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling is absent: it comes with the extra `test`"
)
USE = """
import pathlib, runpy, sys
import torch, fastjepa_kernels as kernels
assert pathlib.Path(kernels.__file__).parent.parent == pathlib.Path(sys.argv[1]), kernels.__file__
x = torch.randn(2, 9, 6, requires_grad=True)
kernels.gather_tokens(x, torch.tensor([[1, 2], [3, 4]])).sum().backward()
assert x.grad.sum() == 24
from fastjepa_kernels.config import lookup
assert lookup("gather_tokens", width=6)
assert "fastjepa" not in sys.modules
sys.argv[1:] = ["info"]
runpy.run_module("fastjepa_kernels", run_name="__main__")
"""


def run(*command, **more):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments):
    return run("-m", "pip", "--disable-pip-version-check", "--no-input", *arguments, "--no-deps", "--no-index")


def wheel_of(project, folder):
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, project)
    (wheel,) = folder.glob("*.whl")
    return wheel


def files_of_the_package():
    return {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return wheel_of(ROOT / "kernels", tmp_path_factory.mktemp("wheel"))


@needs_hatchling
def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == files_of_the_package()
    assert "fastjepa_kernels/configs/layer_norm.json" in inside
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (place,) = (name for name in names if name.endswith("/METADATA"))
    metadata = zipfile.ZipFile(wheel).read(place).decode()
    for line in (
        "Name: fastjepa-kernels",
        f"Version: {fastjepa_kernels.__version__}",
        "Requires-Dist: torch>=2.11",
        "Requires-Dist: triton>=3.6; sys_platform == 'linux'",
        "License-Expression: Apache-2.0",
    ):
        assert line in metadata.splitlines(), line


@needs_hatchling
def test_the_wheel_works_beside_torch_alone(wheel, tmp_path):
    target = tmp_path / "target"
    pip("install", "--target", target, wheel)
    # Of this environment only torch and what it needs: the copy in `target` comes first, and no folder of ours.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FASTJEPA", "TRITON"))}
    clean = {"env": {**environment, "PYTHONPATH": str(target)}, "cwd": tmp_path}
    assert f"fastjepa_kernels {fastjepa_kernels.__version__}" in run("-P", "-c", USE, target, **clean)


@needs_hatchling
def test_the_wheel_of_the_whole_project_holds_it_too(tmp_path):
    names = set(zipfile.ZipFile(wheel_of(ROOT, tmp_path)).namelist())
    assert files_of_the_package() <= names
    assert "fastjepa/train.py" in names


def test_both_projects_ask_for_the_same():
    whole, alone = (tomllib.loads((path / "pyproject.toml").read_text()) for path in (ROOT, ROOT / "kernels"))
    assert alone["project"]["dependencies"][0] in whole["project"]["dependencies"]
    assert alone["project"]["dependencies"][1:] == whole["project"]["optional-dependencies"]["kernels"]
    assert alone["project"]["requires-python"] == whole["project"]["requires-python"]
    assert (ROOT / "kernels" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_code_of_the_readme_runs(capsys):
    names = {}
    for code in blocks("python"):
        exec(compile(code, "kernels/README.md", "exec"), names)
    assert "gather_tokens: " in capsys.readouterr().out


def test_commands_of_the_readme_work_as_written(capsys):
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    commands = [line[3:] for line in lines if line[:3] == ["python", "-m", "fastjepa_kernels"]]
    assert [command[0] for command in commands] == ["info", "explain", "compile"]
    for command in commands:
        if command[0] == "compile" and importlib.util.find_spec("triton") is None:
            continue
        assert main(command) == 0
        assert capsys.readouterr().out


def test_every_operation_is_in_the_table_of_the_readme():
    table = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert sorted(table) == sorted(["attention", *OPERATIONS])
