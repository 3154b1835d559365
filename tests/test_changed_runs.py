"""Runs that go on with other settings, and runs that are told to leave before they began."""

import os
import signal

from fastjepa.exits import Exit
from fastjepa.log import read_metrics


def test_a_changed_setting_is_accepted_where_that_is_asked_for(run, capsys):
    _, first = run("runtime.stop_at=3")
    code, again = run(f"resume={first}", "optim.lr=2e-3", "accept_changes=true")
    assert (code, again) == (Exit.DONE, first)
    assert "accepted, and it changes results from here on: optim.lr: 0.001 -> 0.002" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(first)] == list(range(1, 11))
    _, other = run("optim.lr=2e-3", folder="other")
    rates = [[row["lr"] for row in read_metrics(folder)] for folder in (first, other)]
    assert rates[0][:3] != rates[1][:3]
    assert rates[0][3:] == rates[1][3:]
    assert "lr: 0.002" in (first / "config.yaml").read_text()


def test_accepted_changes_that_do_not_fit_the_weights_leave_the_run_as_it_was(run, capsys):
    _, first = run("runtime.stop_at=3")
    before = (first / "config.yaml").read_text()
    code, _ = run(f"resume={first}", "model.predictor_dim=32", "accept_changes=true")
    assert code == Exit.WRONG_INPUT
    assert "does not fit the model" in capsys.readouterr().out
    assert (first / "config.yaml").read_text() == before
    code, again = run()
    assert (code, again) == (Exit.DONE, first)


def test_a_signal_before_the_first_step_leaves_as_one_after_it(run, monkeypatch, capsys):
    """SLURM asks for another turn then: nothing is lost, nothing was there."""
    monkeypatch.setattr("fastjepa.start.open_collections", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    code, folder = run()
    assert (code, folder) == (Exit.SAVED_AFTER_SIGNAL, None)
    assert "SIGUSR1: nothing had begun; the same command begins again" in capsys.readouterr().err


def test_another_global_batch_is_no_change_to_accept(run, capsys):
    """The place among the videos is counted in it."""
    _, first = run("runtime.stop_at=3")
    code, _ = run(f"resume={first}", "optim.global_batch=8", "accept_changes=true")
    assert code == Exit.WRONG_INPUT
    assert f"optim.global_batch: expected 4, that of {first}" in capsys.readouterr().err
