"""Alarms in whole runs: they are said, they can end a run, and a resumed run does not say them again."""

import json

import pytest
import torch

from fastjepa import health
from fastjepa.exits import Exit
from fastjepa.log import read_metrics

SETTINGS = ("optim.steps=12", "checkpoint.every=2")


@pytest.fixture
def collapsing(monkeypatch):
    """The rank of the features falls to a hundredth after the fifth look at it."""
    measure, looks = health.measure, []

    def fallen(*arguments):
        looks.append(1)
        found = measure(*arguments)
        found.rank = torch.tensor(40.0 if len(looks) <= 5 else 0.4)
        return found

    monkeypatch.setattr("fastjepa.health.measure", fallen)
    return looks


def test_a_collapse_is_said_once_and_the_run_goes_on(run, collapsing, capsys):
    code, folder = run(*SETTINGS)
    assert code == Exit.DONE
    assert capsys.readouterr().out.count("the target features have collapsed") == 1
    assert (folder / "train.log").read_text().count("the target features have collapsed") == 1


def test_a_collapse_ends_the_run_where_that_is_asked_for(run, collapsing, capsys):
    code, folder = run(*SETTINGS, "runtime.stop_on_collapse=true")
    assert code == Exit.FAILED
    assert "the target features have collapsed (runtime.stop_on_collapse)" in capsys.readouterr().out
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"], status["verdict"]) == ("failed", 7, "collapsed")
    # Two checks confirm it; nothing is saved of what came then.
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-0000004", "step-0000006"]


def test_a_resumed_run_knows_what_was_said(run, collapsing, capsys):
    run(*SETTINGS, "runtime.stop_at=8")
    capsys.readouterr()
    code, _ = run(*SETTINGS)
    assert code == Exit.DONE
    printed = capsys.readouterr().out
    assert "have collapsed" not in printed
    assert printed.count("verdict") == 1, "at the end"
    assert "verdict    collapsed: " in printed


def test_a_healthy_run_says_nothing(run, capsys):
    run("optim.steps=30")
    assert "warning" not in capsys.readouterr().out


# Real runs of the tiny recipe

LONG = ("optim.steps=2000", "optim.warmup_steps=100", "log.every=10", "checkpoint.every=2000")


def test_without_momentum_a_run_collapses_and_is_called_so_within_200_steps(run, capsys):
    code, folder = run(*LONG, "optim.momentum=0", "optim.final_momentum=0", "runtime.stop_at=130")
    assert code == Exit.DONE
    verdicts = [row["verdict"] for row in read_metrics(folder)]
    assert verdicts[0] == "early"
    assert verdicts[-1] == "collapsed"
    assert json.loads((folder / "status.json").read_text())["verdict"] == "collapsed"
    printed = capsys.readouterr().out
    assert printed.count("verdict    step") == len({*verdicts}) - 1
    assert "verdict    collapsed: " in printed


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_run_of_2000_steps_comes_alive_and_is_never_called_otherwise(run, seed):
    _, folder = run(*LONG, f"optim.seed={seed}")
    verdicts = [row["verdict"] for row in read_metrics(folder)]
    assert len(verdicts) == 200
    assert verdicts[-1] == "alive"
    assert not {"collapsing", "collapsed", "diverged"} & {*verdicts}
