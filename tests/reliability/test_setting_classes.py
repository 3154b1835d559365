"""C22: every setting has a class, and a run behaves by it: what changes results is another run, the rest goes on."""

import re
import shutil

import pytest

from fastjepa import config
from fastjepa.config import Settings
from fastjepa.exits import Exit
from fastjepa.runfolder import RunRefused, open_run
from tests.reliability.harness import assert_none_lost
from tests.test_config import FIELDS, one_changed

NAME = "vith"
# What names the run's place or the way to it has no value of its own to compare.
ELSEWHERE = ("log.folder", "resume")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of the defaults, by its folder."""
    root = tmp_path_factory.mktemp("runs")
    return opened(Settings(), root).path


def opened(settings, root, resume="auto"):
    values = {"log": settings.log.model_copy(update={"folder": str(root)}), "resume": resume}
    run = open_run(settings.model_copy(update=values), NAME, "the same videos")
    run.close()
    return run


def differences(notes):
    return [note for note in notes if note.startswith("warning: changed since")]


@pytest.mark.parametrize(("key", "field"), FIELDS, ids=[key for key, _ in FIELDS])
def test_a_changed_setting_does_what_its_class_says(first, tmp_path, key, field):
    root = tmp_path / "runs"
    shutil.copytree(first.parent, root)
    own, settings = root / first.name, one_changed(key, field)
    old, new = config.flat(Settings()), config.flat(settings)
    changed = f"{key}: {old[key]} -> {new[key]}"
    kind = config.resume_class(field)
    run = opened(settings, root)
    if kind == "fatal":
        assert run.path != own
        assert any(str(own) in note and changed in note for note in run.notes)
        with pytest.raises(RunRefused, match="other settings that change results") as refused:
            opened(settings, root, resume=str(own))
        assert str(refused.value).splitlines()[1:-1] == [f"  {changed}"]
    else:
        assert run.path == own
        said = [f"warning: changed since this run began: {changed}"] if kind == "warn" else []
        assert differences(run.notes) == said
        # The first resume has noted the new value: what is told next is the way back.
        back = f"warning: changed since this run began: {key}: {new[key]} -> {old[key]}"
        assert differences(opened(Settings(), root, resume=str(own)).notes) == ([back] if kind == "warn" else [])


def test_the_classes_are_all_in_use():
    assert {config.resume_class(field) for _, field in FIELDS} == {"fatal", "warn", "free"}


# The same through the whole program, a setting of each class


def test_another_result_is_another_run_and_refused_on_an_explicit_resume(lab):
    lab.run("runs", "runtime.stop_at=2")
    own = lab.path("runs")
    child = lab.run("runs", "runtime.stop_at=2", "loss.exponent=2.0")
    assert f"{own}, differs (loss.exponent: 1.0 -> 2.0)" in child.out
    before = (own / "metrics.jsonl").read_bytes()
    child = lab.run("runs", "loss.exponent=2.0", f"resume={own}", code=Exit.WRONG_INPUT)
    assert child.err.splitlines()[1:-1] == ["  loss.exponent: 1.0 -> 2.0"]
    assert (own / "metrics.jsonl").read_bytes() == before


def test_videos_that_moved_are_said_and_lose_nothing(lab):
    lab.run("other", "runtime.stop_at=1")
    source = re.search(r"moving shapes .*, (/\S+);", lab.children[-1].out).group(1)
    places = [lab.folder / "here", lab.folder / "there"]
    for place in places:
        shutil.copytree(source, place)
    lab.run("whole", f"data.path={places[0]}")
    lab.run("parts", f"data.path={places[0]}", "runtime.stop_at=5")
    child = lab.run("parts", f"data.path={places[1]}")
    assert f"warning: changed since this run began: data.path: {places[0]} -> {places[1]}" in child.out
    assert [row["loss"] for row in lab.rows("parts")] == [row["loss"] for row in lab.rows("whole")]


def test_what_is_free_is_silent_and_loses_nothing(lab):
    lab.run("runs", "runtime.stop_at=5")
    free = ("data.workers=2", "checkpoint.every=5", "checkpoint.keep=4", "log.images=true", "data.max_bad_fraction=0.5")
    child = lab.run("runs", *free, "eval.every=50", "data.decoder=pyav", "data.cache_gb=0.1")
    assert "warning" not in child.said()
    assert_none_lost(lab.rows("runs"), lab.whole())
