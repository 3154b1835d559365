"""Which folder a run gets, what it refuses to continue, and that one process works in it."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastjepa import config, configfile, runfolder
from fastjepa.runfolder import RunRefused, open_run, write_atomically

DATA = "fingerprint of the videos"


@pytest.fixture
def settings(tmp_path):
    """Settings as the command line gives them: settings("optim.lr=1e-3")."""
    (tmp_path / "vith.yaml").write_text("optim: {steps: 50, warmup_steps: 5}\n")

    def make(*overrides):
        return configfile.load(tmp_path / "vith.yaml", [f"log.folder={tmp_path / 'runs'}", *overrides])

    return make


@pytest.fixture
def opened(settings):
    """Open a run with some overrides, and close it again."""

    def go(*overrides, name="vith", data=DATA):
        run = open_run(settings(*overrides), name, data)
        run.close()
        return run

    return go


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


# Which folder


def test_auto_takes_the_name_and_the_identity_and_comes_back_to_it(opened, settings, tmp_path):
    first = opened()
    assert first.path == tmp_path / "runs" / f"vith-{config.identity(settings(), DATA)}"
    assert first.notes == []
    for _ in range(2):
        again = opened()
        assert again.path == first.path
        assert again.notes == []
    assert folders(tmp_path / "runs") == [first.path.name]
    assert first.checkpoints == first.path / "checkpoints"


def test_settings_without_effect_on_results_share_the_folder(opened, tmp_path):
    opened()
    opened("log.every=3", "checkpoint.every=7", "data.workers=2", "runtime.stop_at=9", "data.path=/moved/videos")
    assert len(folders(tmp_path / "runs")) == 1


@pytest.mark.parametrize("override", ["optim.lr=1e-3", "optim.seed=1", "model.name=vit_tiny", "data.crop=208"])
def test_a_setting_that_changes_results_has_a_folder_of_its_own(opened, tmp_path, override):
    opened()
    opened(override)
    assert len(folders(tmp_path / "runs")) == 2


def test_other_videos_have_a_folder_of_their_own(opened, tmp_path):
    opened()
    notes = opened(data="other").notes
    assert len(folders(tmp_path / "runs")) == 2
    assert len(notes) == 1
    assert "other videos" in notes[0]


def test_never_numbers_new_folders_and_auto_goes_on_in_the_first(opened, tmp_path):
    first = opened("resume=never")
    assert [opened("resume=never").path.name for _ in range(2)] == [f"{first.path.name}-2", f"{first.path.name}-3"]
    again = opened()
    assert again.path == first.path
    assert again.notes == []
    assert len(folders(tmp_path / "runs")) == 3


def test_runs_beside_this_one_are_told_with_their_difference_and_the_command(opened, settings, tmp_path):
    other = opened("optim.lr=1e-3", "optim.seed=4", "optim.eps=1e-6", "loss.exponent=2.0").path
    (note,) = opened().notes
    lines = config.changed(
        config.flat(settings("optim.lr=1e-3", "optim.seed=4", "optim.eps=1e-6", "loss.exponent=2.0")),
        config.flat(settings()),
        "fatal",
    )
    assert len(lines) == 4
    assert all(line in note for line in lines[:3])
    assert lines[3] not in note
    assert "and 1 more" in note
    assert "loss.exponent: 2.0 -> 1.0" in note
    command = next(word for word in shlex.split(note) if word.startswith("resume="))
    assert command == f"resume={other}"
    assert opened("optim.lr=1e-3", "optim.seed=4", "optim.eps=1e-6", "loss.exponent=2.0", command).path == other


def test_the_command_that_continues_survives_a_shell(opened, tmp_path):
    spaced = f"log.folder={tmp_path / 'my runs'}"
    other = opened(spaced, "optim.lr=1e-3").path
    (note,) = opened(spaced).notes
    assert f"resume={other}" in shlex.split(note)


def test_at_most_three_neighbours_are_told(opened):
    for seed in range(1, 6):
        opened(f"optim.seed={seed}")
    assert len(opened().notes) == 3


def test_a_run_of_another_name_is_no_neighbour(opened, tmp_path):
    opened(name="vith-384", data="other")
    opened(name="vith_384")
    opened(name="vit")
    (tmp_path / "runs" / "vith-notes").mkdir()
    (tmp_path / "runs" / "vith-notes" / "config.yaml").write_text("optim: {lr: 1.0}")
    assert opened().notes == []


def test_a_name_with_special_characters_finds_its_neighbours(opened):
    opened("optim.lr=1e-3", name="vit[h]*")
    assert len(opened(name="vit[h]*").notes) == 1
    assert opened(name="vith").notes == []


@pytest.mark.parametrize("text", ["nonsense: [", "gone_setting: 1\n", "optim: {lr: fast}\n"])
def test_an_unreadable_neighbour_is_told_and_stops_nobody(opened, text):
    other = opened("optim.lr=1e-3").path
    (other / "config.yaml").write_text(text)
    (note,) = opened().notes
    assert str(other / "config.yaml") in note
    assert "cannot be read" in note


# An explicit path


def test_a_path_continues_that_run(opened, tmp_path):
    first = opened("resume=never").path
    second = opened("resume=never").path
    for folder in (first, second):
        run = opened(f"resume={folder}", "log.every=3")
        assert run.path == folder
        assert run.notes == []
    assert len(folders(tmp_path / "runs")) == 2


def test_a_path_refuses_every_setting_that_changes_results(opened):
    first = opened().path
    before = (first / "config.yaml").read_text()
    with pytest.raises(RunRefused) as caught:
        opened(f"resume={first}", "optim.lr=1e-3", "model.name=vit_tiny", "data.crop=208", "log.every=3")
    head, *lines, hint = str(caught.value).splitlines()
    assert head == f"resume: {first} was made with other settings that change results:"
    assert [line.strip() for line in lines] == [
        "model.name: vit_large -> vit_tiny",
        "data.crop: 224 -> 208",
        "optim.lr: 0.000625 -> 0.001",
    ]
    assert hint == (
        f"resume={first} accept_changes=true goes on with the new ones; init.from={first} without resume starts a new "
        "run from its weights"
    )
    assert (first / "config.yaml").read_text() == before
    assert len((first / "command.txt").read_text().splitlines()) == 1


def test_changes_can_be_accepted_and_are_told_and_kept_once_the_weights_fit(opened):
    first = opened().path
    before = (first / "config.yaml").read_text()
    changed = (f"resume={first}", "optim.lr=1e-3", "accept_changes=true")
    run = opened(*changed)
    assert run.path == first
    assert run.notes == ["warning: accepted, and it changes results from here on: optim.lr: 0.000625 -> 0.001"]
    assert (first / "config.yaml").read_text() == before
    run.describe()
    assert "lr: 0.001" in (first / "config.yaml").read_text()
    assert opened(*changed).notes == []
    assert opened(f"resume={first}", "optim.lr=1e-3").notes == []


def test_a_path_warns_of_a_changed_source_of_videos(opened):
    first = opened().path
    notes = opened(f"resume={first}", "data.path=/elsewhere").notes
    assert notes == ["warning: changed since this run began: data.path: synthetic://moving-shapes -> /elsewhere"]


def test_a_path_warns_of_other_videos(opened):
    first = opened().path
    assert opened(f"resume={first}", data="other").notes == [
        "warning: the list of videos is not the one that this run began with"
    ]


def test_a_path_without_record_of_its_videos_does_not_warn(opened):
    first = opened().path
    for text in ("", "{half", "[1]"):
        (first / "env.json").write_text(text)
        assert opened(f"resume={first}", data=DATA).notes == []
    (first / "env.json").unlink()
    assert opened(f"resume={first}").notes == []


@pytest.mark.parametrize("kind", ["absent", "empty folder", "file"])
def test_a_path_that_is_no_run_is_refused(opened, tmp_path, kind):
    path = tmp_path / "elsewhere"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("")
    with pytest.raises(RunRefused, match="resume: expected auto, never or a run folder") as caught:
        opened(f"resume={path}")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.exists() == (kind != "absent")
    assert not (tmp_path / "runs").exists()


def test_a_path_whose_settings_cannot_be_read_is_refused(opened):
    first = opened().path
    (first / "config.yaml").write_text("optim: {lr: fast}\n")
    with pytest.raises(RunRefused, match=r"cannot be read: .*optim\.lr"):
        opened(f"resume={first}")


# One process at a time


OTHER_PROCESS = """
import sys
from fastjepa import configfile
from fastjepa.runfolder import RunRefused, open_run
try:
    run = open_run(configfile.load(sys.argv[1], [f"log.folder={sys.argv[2]}"]), "vith", sys.argv[3])
except RunRefused as error:
    print(error)
    sys.exit(2)
print("open", flush=True)
sys.stdin.read()
"""


def other_process(tmp_path: Path) -> subprocess.Popen:
    arguments = [str(tmp_path / "vith.yaml"), str(tmp_path / "runs"), DATA]
    environment = {**os.environ, "PYTHONPATH": str(Path(runfolder.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_second_process_is_refused_until_the_first_closes(settings, tmp_path):
    run = open_run(settings(), "vith", DATA)
    with other_process(tmp_path) as second:
        said, _ = second.communicate("")
    assert second.returncode == 2
    assert said == f"another process is working in {run.path}\n"
    assert len((run.path / "command.txt").read_text().splitlines()) == 1
    run.close()
    with other_process(tmp_path) as third:
        assert third.communicate("")[0] == "open\n"


def test_a_killed_process_leaves_the_folder_free(settings, tmp_path):
    with other_process(tmp_path) as first:
        assert first.stdout.readline() == "open\n"
        with pytest.raises(RunRefused, match="another process is working in"):
            open_run(settings(), "vith", DATA)
        first.kill()
    open_run(settings(), "vith", DATA).close()


def test_the_children_of_a_closed_run_do_not_keep_the_folder(settings, tmp_path):
    """Loader processes inherit open files, and may end some seconds later."""
    run = open_run(settings(), "vith", DATA)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    run.close()
    with other_process(tmp_path) as second:
        said = second.communicate("")[0]
    os.close(writer)
    os.close(reader)
    os.waitpid(child, 0)
    assert said == "open\n"


# What is written


def test_the_settings_can_be_read_back(opened, settings):
    run = opened("optim.lr=1e-3", "mask.sets.0.num_blocks=3", "optim.clip_grad=null")
    wanted = settings("optim.lr=1e-3", "mask.sets.0.num_blocks=3", "optim.clip_grad=null")
    assert configfile.load(run.path / "config.yaml") == wanted


def test_every_command_is_kept(opened, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/vith.yaml", "data.path=/my videos"])
    opened()
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/vith.yaml"])
    lines = (opened().path / "command.txt").read_text().splitlines()
    assert len(lines) == 2
    dates, commands = zip(*(line.split("  ") for line in lines))
    assert [shlex.split(command)[3:] for command in commands] == [
        ["configs/vith.yaml", "data.path=/my videos"],
        ["configs/vith.yaml"],
    ]
    assert commands[0].startswith("python -m fastjepa.train ")
    assert all(len(date) == len("2026-01-31 12:00:00") for date in dates)


def test_versions_and_the_videos_are_kept(opened):
    import torch

    env = json.loads((opened().path / "env.json").read_text())
    assert env["data"] == DATA
    assert torch.__version__.startswith(env["torch"].split("+")[0])
    assert set(env) == {"fastjepa", "python", "system", "torch", "numpy", "av", "triton", "data"}


def test_status_is_what_was_written_and_nothing_where_that_is_damaged(opened):
    run = opened()
    assert run.status() == {}
    (run.path / "status.json").write_text('{"state": "done"}')
    assert run.status() == {"state": "done"}
    for text in ("", "{half", "\0\0"):
        (run.path / "status.json").write_text(text)
        assert run.status() == {}


def test_a_reader_sees_the_old_text_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_atomically(path, "old")
    seen = []
    replace = os.replace

    def killed(source, target):
        seen.append((path.read_text(), Path(source).read_text(), Path(target)))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new, ünïcode")
    assert seen == [("old", "new, ünïcode", path)]
    assert path.read_text() == "old"
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(path, "newer")
    assert path.read_text() == "newer"
    assert folders(tmp_path) == ["status.json"]


def test_a_failed_write_keeps_the_old_text(tmp_path):
    path = tmp_path / "status.json"
    write_atomically(path, "old")
    (tmp_path / ".tmp-status.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
