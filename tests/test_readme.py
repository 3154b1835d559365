"""The README keeps its word: commands work as written, code runs, figures come from result files."""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench.report import __main__ as report
from bench.report.regions import REGIONS
from bench.report.stored import choose, read_folder
from bench.report.tables import by_seed
from fastjepa.__main__ import VERBS, main
from fastjepa.build import build_jepa
from fastjepa.config import Settings
from fastjepa.configfile import load
from fastjepa.data.source import open_videos
from fastjepa.exits import Exit
from fastjepa.fit import state_of
from fastjepa.interop import PREFIX
from fastjepa.start import start

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
ALL = "\n".join(page.read_text() for page in PAGES)
# The run that commands and code of the README speak of.
RUN = "runs/demo-fe96fb"
PROBE_COLUMNS = ("trained", "untrained", "pixels", "chance")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", ALL, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line)[len(program.split()) :] for line in lines if line.startswith(f"{program} ")]


@pytest.fixture
def place(recipe, tmp_path, cache, monkeypatch):
    """A folder with all that the commands of the README name, small: a run, videos, lists, published weights."""
    monkeypatch.setattr("fastjepa.survey.PACE_SECONDS", 0.1)
    monkeypatch.setattr("fastjepa.preparing.PACE_SECONDS", 0.1)
    folder = tmp_path / "here"
    (folder / "runs").mkdir(parents=True)
    (folder / "configs").symlink_to(ROOT / "configs")
    assert start(load(recipe, [f"log.folder={tmp_path / 'made'}"]), "tiny") == Exit.DONE
    (made,) = (tmp_path / "made").iterdir()
    made.rename(folder / RUN)
    monkeypatch.chdir(folder)
    videos = open_videos("synthetic://moving-shapes?videos=48&size=48&frames=8", 0)
    (folder / "videos").mkdir()
    for number, video in enumerate(videos.paths[:3]):
        (folder / "videos" / f"{number}.mp4").symlink_to(video)
    (folder / "video.mp4").symlink_to(videos.paths[0])
    labels = videos.tasks["motion"].labels.tolist()
    for name, part in (("train.csv", slice(0, 32)), ("test.csv", slice(32, 48))):
        rows = zip(videos.paths[part], labels[part])
        (folder / name).write_text("".join(f'"{path}" {label}\n' for path, label in rows))
    tiny = Settings.model_validate(
        {"model": {"name": "vit_tiny", "predictor_dim": 96, "predictor_depth": 2}, "data": {"crop": 64}}
    )
    rotary = Settings.model_validate(
        {"model": {"name": "vit_tiny", "predictor_dim": 96, "predictor_depth": 2, "positions": "rope_v2"}}
    )
    for settings, file in ((tiny, "vitl16.pth.tar"), (rotary, "vitl.pt")):
        networks = state_of(build_jepa(settings))
        content = {name: {PREFIX + key: value for key, value in state.items()} for name, state in networks.items()}
        torch.save(content, folder / file)
    return folder


def test_python_code_runs(place):
    assert main(["export", RUN, "demo"]) == main(["import", "vitl.pt", "vitl2"]) == 0
    codes = blocks("python")
    assert len(codes) == 4
    for code in codes:
        exec(compile(code, "README.md", "exec"), {"clips": torch.zeros(1, 4, 3, 32, 32)})


def test_the_example_of_mistakes_prints_exactly_that():
    (example,) = blocks("console")
    command, _, wanted = example.removeprefix("$ python ").partition("\n")
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == wanted
    assert done.returncode == 2


def test_verbs_work_as_written(capsys, place):
    verbs = commands("python -m fastjepa")
    assert {verb[0] for verb in verbs} == {"--help", *VERBS} - {"train"}
    excerpt = ALL.partition("<!-- data -->\n```\n")[2].partition("\n```\n<!-- /data -->")[0].splitlines()
    assert len(excerpt) > 5
    for verb in verbs:
        capsys.readouterr()
        assert main([word.replace("/path/to/videos", "videos") for word in verb]) == 0, verb
        out = capsys.readouterr().out
        assert out
        if "--prepare" in verb:
            assert "48 of 48 videos" in out
            assert len(list((place / "small").glob("*.mp4"))) == 48
        elif verb[0] == "data" and "synthetic" in verb[1]:
            printed = iter(out.splitlines())
            assert all(line in printed for line in excerpt)
    assert (place / RUN / "viz" / "index.html").is_file()
    for name in ("features.safetensors", "vitl16", "demo", "again.pth.tar"):
        assert (place / name).exists()


def test_settings_of_every_run_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = commands("python -m fastjepa.train")
    assert len(runs) >= 3
    for settings, *overrides in runs:
        load(settings, overrides)


def test_the_excerpt_of_a_plan_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    excerpt = ALL.partition("<!-- plan -->\n```\n")[2].partition("\n```\n<!-- /plan -->")[0].splitlines()
    assert len(excerpt) > 5
    assert main(["plan", "configs/vith.yaml", "--gpu", "h200", "data.batch_size=48"]) == 0
    printed = iter(capsys.readouterr().out.splitlines())
    assert all(line in printed for line in excerpt)  # in this order: `in` goes on where it found the last one


def test_recipes_and_what_is_linked_exist():
    for name in set(re.findall(r"configs/\w+\.yaml", ALL)):
        assert (ROOT / name).is_file(), name
    for page in PAGES:
        for name in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert name.startswith("https://") or (page.parent / name).exists(), f"{page.name}: {name}"


def test_links_to_a_section_find_it():
    heads = {
        re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)", README, re.M)
    }
    assert set(re.findall(r"\]\((?:\.\./README\.md)?#([^)]+)\)", ALL)) <= heads


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
    assert {path.name for path in pictures} == set(re.findall(r"[/(](bench-[^)]+\.png)\)", ALL))
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
    assert f"`{one.header['command']}`" in ALL
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
