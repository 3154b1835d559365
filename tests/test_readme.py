"""The README keeps its word: commands work as written, code runs, figures come from result files."""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench.report import __main__ as report
from bench.report.regions import REGIONS
from bench.report.stored import choose, read_folder
from bench.report.tables import by_seed
from fastjepa.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROBE_COLUMNS = ("trained", "untrained", "pixels", "chance")


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


def test_verbs_work_as_written(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fastjepa.survey.PACE_SECONDS", 0.1)
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    verbs = [shlex.split(line)[3:] for line in lines if line.startswith("python -m fastjepa ")]
    assert {verb[0] for verb in verbs} == {"--help", "plan", "info", "data"}
    excerpt = README.partition("<!-- data -->\n```\n")[2].partition("\n```\n<!-- /data -->")[0].splitlines()
    assert len(excerpt) > 5
    monkeypatch.setattr("fastjepa.preparing.PACE_SECONDS", 0.1)
    for verb in verbs:
        if "--prepare" in verb:
            verb[verb.index("--prepare") + 1] = str(tmp_path / "small")
        assert main(verb) == 0
        out = capsys.readouterr().out
        assert out
        if "--prepare" in verb:
            assert "48 of 48 videos" in out
            assert len(list((tmp_path / "small").glob("*.mp4"))) == 48
        elif verb[0] == "data":
            printed = iter(out.splitlines())
            assert all(line in printed for line in excerpt)


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


@pytest.fixture(scope="module")
def made():
    """Text of the README and bytes of its pictures, as `python -m bench.report` makes them from the result files."""
    return report.made(report.READMES, ROOT / "bench" / "results", ROOT / "docs")


def test_figures_are_what_the_report_makes_of_the_result_files(made):
    texts = {path: path.read_text() for path in report.READMES}
    assert {path: made[path].decode() for path in texts} == texts
    names = set(re.findall(r"<!-- bench:(\S+) -->", "".join(texts.values())))
    assert names == REGIONS.keys()


def test_pictures_are_what_the_report_makes_of_the_result_files(made):
    pictures = [path for path in made if path.suffix == ".png"]
    assert {f"docs/{path.name}" for path in pictures} == set(re.findall(r"\((docs/bench-[^)]+)\)", README))
    for path in pictures:
        stored, drawn = (Image.open(io.BytesIO(content)) for content in (path.read_bytes(), made[path]))
        assert stored.size == drawn.size
        if stored.info["Software"] == drawn.info["Software"]:  # another version draws other letters
            assert stored.tobytes() == drawn.tobytes()
            assert path.read_bytes() == made[path]


def demo_result(kind: str) -> dict[int, dict[str, float]]:
    """Figures by seed and name, from the result file of this kind that the README shows."""
    (one,) = [one for one in choose(read_folder(ROOT / "bench" / "results")) if one.series.kind == kind]
    assert one.whole
    assert f"`{one.header['command']}`" in README
    figures = by_seed(one)
    assert len(figures) >= 3
    return figures


@pytest.mark.parametrize("kind", ["demo", "demo_noised"])
def test_the_demo_learns(kind):
    for value in demo_result(kind).values():
        assert value["motion trained"] - value["motion untrained"] >= 10


def test_the_comparison_of_the_two_targets_is_fair():
    tokens, noised = demo_result("demo"), demo_result("demo_noised")
    assert tokens.keys() == noised.keys()
    for seed, value in noised.items():
        for task in ("motion", "shape"):  # both begin with the same encoder
            assert value[f"{task} untrained"] == tokens[seed][f"{task} untrained"]


def test_the_output_of_the_demo_is_that_of_its_first_seed():
    first = demo_result("demo")[0]
    for task in ("motion", "shape"):
        printed = re.findall(rf"^{task} +(\S+)% +(\S+)% +(\S+)% +(\S+)% +480$", README, re.MULTILINE)
        assert printed == [tuple(f"{first[f'{task} {kind}']:.1f}" for kind in PROBE_COLUMNS)]


@pytest.mark.parametrize("fence", ["DEMO_OUTPUT", "DEMO_TABLE"])
def test_nothing_is_left_to_be_filled_in(fence):
    assert fence not in README
