"""The README keeps its word: commands work as written, code runs, figures come from result files."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from fastjepa.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_code_runs():
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})


def test_the_example_of_mistakes_prints_exactly_that():
    (example,) = blocks("console")
    command, _, wanted = example.removeprefix("$ python ").partition("\n")
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == wanted
    assert done.returncode == 2


def test_verbs_work_as_written(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    verbs = [shlex.split(line)[3:] for line in lines if line.startswith("python -m fastjepa ")]
    assert {verb[0] for verb in verbs} == {"--help", "plan", "info"}
    for verb in verbs:
        assert main(verb) == 0
        assert capsys.readouterr().out


def test_the_excerpt_of_a_plan_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    excerpt = README.partition("<!-- plan -->\n```\n")[2].partition("\n```\n<!-- /plan -->")[0].splitlines()
    assert len(excerpt) > 5
    assert main(["plan", "configs/vith.yaml", "--gpu", "h200", "data.batch_size=48"]) == 0
    printed = iter(capsys.readouterr().out.splitlines())
    assert all(line in printed for line in excerpt)  # in this order: `in` goes on where it found the last one


def test_recipes_and_pictures_that_are_named_exist():
    for name in {*re.findall(r"configs/\w+\.yaml", README), *re.findall(r"\((docs/[^)]+)\)", README)}:
        assert (ROOT / name).is_file(), name


def test_every_committed_recipe_is_in_the_table():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"| `configs/{path.name}` |" in README


def demo_result(recipe: str) -> dict[int, dict[str, float]]:
    """Figures by seed and name, from the one result file of this recipe, which the README names."""
    (path,) = sorted((ROOT / "bench" / "results").glob(f"{recipe}-*.json"))
    result = json.loads(path.read_text())
    assert result["complete"]
    assert not result["quick"]
    assert path.name in README
    assert f"`{result['command']}`" in README
    figures: dict[int, dict[str, float]] = {}
    for row in result["rows"]:
        figures.setdefault(row["parameters"]["seed"], {})[row["name"]] = row["value"]
    assert len(figures) >= 3
    return figures


ACCURACIES = [f"{task} {kind}" for task in ("motion", "shape") for kind in ("trained", "untrained")]


def test_figures_of_the_demo_come_from_its_result_file():
    for seed, value in demo_result("demo").items():
        cells = [f"{value[name]:.1f}" for name in ACCURACIES]
        assert f"| {seed} | {' | '.join(cells)} | {value['processor time']:.0f} s |" in README
        assert value["motion trained"] - value["motion untrained"] >= 10


def test_the_comparison_of_the_two_targets_comes_from_their_result_files():
    tokens, noised = demo_result("demo"), demo_result("demo_noised")
    assert tokens.keys() == noised.keys()
    for what, figures in (("mask tokens", tokens), ("noised targets", noised)):
        cells = []
        for name in ACCURACIES:
            values = [value[name] for value in figures.values()]
            cells.append(f"{fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        assert f"| {what} | {' | '.join(cells)} |" in README
    for seed, value in noised.items():
        assert value["motion trained"] - value["motion untrained"] >= 10
        for task in ("motion", "shape"):  # the comparison is fair: both begin with the same encoder
            assert value[f"{task} untrained"] == tokens[seed][f"{task} untrained"]


def test_the_census_comes_from_its_result_file():
    (path,) = sorted((ROOT / "bench" / "results").glob("census-*.json"))
    assert path.name in README
    result = json.loads(path.read_text())
    assert result["complete"]
    found = {(row["name"], *row["parameters"].values()): row["value"] for row in result["rows"]}
    for model, shown in (("vitl", "ViT-L/16"), ("vith", "ViT-H/16")):
        for figure, unit, form in (("bytes", "GB moved", ",.1f"), ("launches", "launches", ",")):
            ways = [format(found[figure, model, way, "total"], form) for way in ("reference", "packed")]
            fewer = found[f"times fewer {figure}", model]
            assert f"| {shown}, {unit} | {ways[0]} | {ways[1]} | {fewer:.2f} |" in README


def test_the_speed_of_the_packed_execution_comes_from_its_result_file():
    (path,) = sorted((ROOT / "bench" / "results").glob("executions-*.json"))
    result = json.loads(path.read_text())
    assert result["complete"]
    assert not result["quick"]
    assert path.name in README
    speeds = {
        row["parameters"]["shape"]: (f"{row['value']:.2f}", row["n"])
        for row in result["rows"]
        if row["name"] == "speed of packed over reference"
    }
    cost = [row["value"] for row in result["rows"] if row["name"] == "step packed"]  # 64x3, then 64x3-noised
    assert f"{cost[1] / cost[0]:.2f} times the time at the tiny size of `bench/test_executions.py`" in README
    tiny, noised, larger = (speeds[shape][0] for shape in ("64x3", "64x3-noised", "192x12"))
    text = " ".join(README.split())
    assert f"{tiny} times the reference's speed in a tiny model (64 wide, 3 deep), {noised} times with noised" in text
    assert f"targets and {larger} times at 192 wide, 12 deep (fastest of {speeds['64x3'][1]} alternating" in text
    public = [
        f"{row['value']:.2f}"
        for row in result["rows"]
        if row["name"] == "speed of packed over reference, public optimizer path"
    ]
    assert f"public code's it is {public[0]}, {public[1]} and {public[2]} times" in text


@pytest.mark.parametrize("fence", ["DEMO_OUTPUT", "DEMO_TABLE"])
def test_nothing_is_left_to_be_filled_in(fence):
    assert fence not in README
