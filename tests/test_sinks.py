"""TensorBoard and Weights & Biases: what they get, and that nothing of theirs ends a run."""

import builtins
import sys
import types

import pytest
from PIL import Image

from fastjepa.config import Log
from fastjepa.log import RunLog, read_metrics

ROW = {"step": 20, "loss": 0.5, "skipped": 0, "loss_ratio": float("nan"), "mfu": None}


@pytest.fixture
def open_log(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return lambda **settings: RunLog(folder, Log(**settings), "vith-123abc", 100)


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in with the calls that are used; `calls` lists them, `step` is that of a run that is known there."""
    calls, run = [], types.SimpleNamespace(step=0)
    run.log = lambda numbers, step: calls.append((numbers, step))
    run.finish = lambda exit_code: calls.append(("finish", exit_code))
    run.config = types.SimpleNamespace(update=lambda values, allow_val_change: calls.append(("config", values)))
    module = types.ModuleType("wandb")
    module.Settings = lambda **options: options
    module.Image = lambda path: ("image", path)
    module.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return types.SimpleNamespace(calls=calls, run=run, module=module)


def picture(path, colour=(255, 0, 0)):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)
    return path


def events(folder):
    """What TensorBoard itself reads back."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    return reader.EventAccumulator(str(folder / "tensorboard")).Reload()


# Which are there


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_sentence_that_names_the_extra(open_log, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(
        ValueError, match=rf"^log\.{package} needs the package {package}: pip install 'fastjepa\[log\]'$"
    ):
        open_log(**{package: True})


def test_neither_is_imported_unless_asked_for(open_log, monkeypatch):
    real = builtins.__import__

    def watched(name, *rest):
        assert name.split(".")[0] != "wandb"
        assert "tensorboard" not in name
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", watched)
    open_log().metrics({"step": 1})


# TensorBoard, by its own reader


def test_tensorboard_has_numbers_pictures_and_settings(open_log, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    with open_log(tensorboard=True) as run:
        run.settings({"optim.lr": 0.1, "data.path": "a|b"})
        run.metrics(ROW)
        run.scalars(20, {"probe/motion": 0.75})
        run.picture("viz/masks", picture(run.folder / "viz" / "masks.png"), 20)
    found = events(run.folder)
    assert {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]} == {
        "loss": [(20, 0.5)],
        "skipped": [(20, 0)],
        "probe/motion": [(20, 0.75)],
    }
    (image,) = found.Images("viz/masks")
    assert (image.step, image.width, image.height) == (20, 6, 4)
    (text,) = found.Tensors("settings/text_summary")
    assert b"| optim.lr | 0.1 |" in text.tensor_proto.string_val[0]
    assert len(read_metrics(run.folder)) == 1  # the probe has a file of its own


def test_tensorboard_forgets_what_is_logged_again(open_log):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    with open_log(tensorboard=True) as run:
        for step in (10, 20, 30):
            run.metrics({"step": step, "loss": 1.0})
    with open_log(tensorboard=True) as run:
        run.rewind(10)
        run.metrics({"step": 20, "loss": 2.0})
    assert [(e.step, e.value) for e in events(run.folder).Scalars("loss")] == [(10, 1.0), (20, 2.0)]


# Weights & Biases


def test_wandb_gets_numbers_pictures_and_settings_and_continues_the_run_of_this_folder(open_log, wandb):
    with open_log(wandb=True) as run:
        run.settings({"optim.lr": 0.1})
        run.metrics(ROW)
        run.scalars(20, {"probe/motion": 0.75})
        run.picture("viz/masks", run.folder / "viz" / "masks.png", 20)
        run.status("done", 20)
    options, *rest = wandb.calls
    assert {key: options[key] for key in ("id", "resume", "name", "dir")} == {
        "id": run.folder.name, "resume": "allow", "name": "vith-123abc", "dir": str(run.folder),
    }  # fmt: skip
    assert rest == [
        ("config", {"optim.lr": 0.1}),
        ({"loss": 0.5, "skipped": 0}, 20),
        ({"probe/motion": 0.75}, 20),
        ({"viz/masks": ("image", str(run.folder / "viz" / "masks.png"))}, 20),
        ("finish", 0),
    ]


def test_wandb_does_not_get_steps_again_that_it_has(open_log, wandb):
    wandb.run.step = 20
    with open_log(wandb=True) as run:
        for step in (10, 20, 30):
            run.metrics({"step": step, "loss": 1.0})
    assert [step for _, step in wandb.calls[1:-1]] == [20, 30]


def test_a_run_that_failed_is_one_that_failed_there_too(open_log, wandb):
    with open_log(wandb=True) as run:
        run.status("failed", 3)
    assert wandb.calls[-1] == ("finish", 1)


# Troubles


def test_an_error_of_a_sink_is_said_once_and_the_run_goes_on(open_log, wandb, capsys):
    def gone(numbers, step):
        raise RuntimeError("the network is gone\nand more of it")

    wandb.run.log = gone
    with open_log(wandb=True) as run:
        for step in (1, 2, 3):
            run.metrics({"step": step, "loss": 1.0})
    printed = capsys.readouterr().out
    assert printed == "warning: Weights & Biases does not take everything: the network is gone; the run goes on\n"
    assert [row["step"] for row in read_metrics(run.folder)] == [1, 2, 3]


def test_a_sink_that_cannot_be_opened_is_said_and_left_out(open_log, wandb, capsys):
    def refuse(**options):
        raise RuntimeError("api_key not configured")

    wandb.module.init = refuse
    with open_log(wandb=True) as run:
        run.metrics(ROW)
    assert capsys.readouterr().out == "warning: nothing goes to Weights & Biases: api_key not configured\n"


# What a run hands over


def test_a_run_hands_over_its_probe_and_its_pictures(run, wandb):
    code, _ = run("log.wandb=true", "log.images=true", "eval.probe=linear", "eval.every=5", "log.every=5")
    assert code == 0
    numbers, pictures = {}, {}
    for content, step in wandb.calls[2:-1]:
        for name, value in content.items():
            (pictures if isinstance(value, tuple) else numbers).setdefault(name, []).append(step)
    assert numbers["probe/linear/motion"] == [5, 10]
    assert numbers["probe/linear/shape"] == [5, 10]
    assert numbers["loss"] == [5, 10]
    assert {"viz/loss", "viz/masks", "viz/clips"} <= pictures.keys()
    assert wandb.calls[1][0] == "config"
    assert wandb.calls[1][1]["optim.steps"] == 10
