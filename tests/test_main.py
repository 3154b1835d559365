import errno
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastjepa import train
from fastjepa.__main__ import VERBS, main
from fastjepa.exits import Exit
from fastjepa.verbs.parsing import Parser

CONFIGS = Path(__file__).parents[1] / "configs"


def test_plan_shows_the_published_numbers_without_building_the_model(capsys):
    assert main(["plan", str(CONFIGS / "vitl.yaml")]) == 0
    out = capsys.readouterr().out
    assert "vit_large, 305.5 M" in out
    assert "1568 a clip" in out
    assert "lr 0.0002 -> 0.000625 -> 7.5e-05" in out
    assert "momentum 0.998 -> 0.9996" in out


def test_plan_refuses_impossible_masks_with_a_sentence(capsys):
    assert main(["plan", str(CONFIGS / "vitl.yaml"), "mask.sets.1.spatial_scale=[1.0, 1.0]"]) == 2
    assert "leave no context" in capsys.readouterr().err


def test_info_names_versions_and_devices(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out
    assert "cuda" in out
    told = [line.strip() for line in out.splitlines()]
    decoders = dict(line.removeprefix("decoder ").split(maxsplit=1) for line in told if line.startswith("decoder "))
    assert decoders.keys() == {"pyav", "torchcodec", "dali_gpu", "dali_cpu"}
    assert decoders["pyav"] == "ready"
    assert decoders["dali_gpu"] == "there is no CUDA device" or torch.cuda.is_available()


@pytest.mark.parametrize("arguments", [["trian"], ["plan"], ["plan", "--gpu", "h200"]])
def test_an_unknown_verb_or_a_plan_of_nothing_shows_the_usage(capsys, arguments):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "usage: python -m fastjepa" in err
    assert ("nearest valid verb: train" in err) == (arguments == ["trian"])


def test_no_verb_shows_the_verbs_and_the_five_minute_path(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb}" in out for verb in VERBS)
    assert "python -m fastjepa train configs/demo.yaml" in out


@pytest.mark.parametrize(("verb", "module"), [(verb, entry[0]) for verb, entry in VERBS.items()])
def test_every_verb_has_its_module(verb, module):
    assert callable(importlib.import_module(module).main)


def test_an_unknown_option_names_the_nearest(capsys):
    parser = Parser("info", "")
    parser.add_argument("--device")
    with pytest.raises(ValueError, match="unknown option --devcie=cpu, nearest valid option: --device"):
        parser.read(["--devcie=cpu"])
    assert main(["info", str(CONFIGS / "demo.yaml"), "more"]) == 2
    assert "expected one settings file, or run folders, given 2" in capsys.readouterr().err


def test_help_names_every_setting(capsys):
    assert main(["--help"]) == 0
    assert "optim.warmup_steps = 12000" in capsys.readouterr().out


def test_info_says_what_a_step_takes_and_why(capsys):
    assert main(["info", str(CONFIGS / "demo.yaml")]) == 0
    told = capsys.readouterr().out.partition("demo.yaml on ")[2]
    for piece in (
        "patches to tokens",
        "predictor input, noise",
        "norms",
        "MLP",
        "targets and loss",
        "optimizer and EMA",
    ):
        assert re.search(rf"^  {piece} +\S.*: \S.{{15,}}$", told, re.MULTILINE), piece
    for network in ("encoder", "predictor"):
        assert re.search(rf"^  attention, {network} +sdpa, the first that fits", told, re.MULTILINE)


def test_info_takes_what_settings_ask_for(capsys, tmp_path):
    (tmp_path / "own.yaml").write_text("runtime: {kernels: {norm: reference}, attention: math, device: cpu}")
    assert main(["info", str(tmp_path / "own.yaml")]) == 0
    told = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line.strip())
    told = {label: text.strip() for label, text in told.items()}
    assert told["norms"] == "fastjepa_kernels, reference implementations: asked for"
    assert told["MLP"].startswith("torch's own functions: no measurement says")
    assert told["attention, encoder"].startswith("math")
    assert told["decoding"] == "pyav: there is no GPU to decode on"


def test_info_of_what_is_no_run_is_a_sentence(capsys, tmp_path):
    assert main(["info", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("info: expected a run folder (with a config.yaml) or a settings file")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_is_a_usage_and_no_error(capsys, verb):
    try:
        code = main([verb, "--help"])
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    assert printed.out.startswith("usage: python -m fastjepa")


def test_help_of_a_group_shows_its_settings_only(capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "--help", "optim"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "  optim.lr = " in out
    assert "  data.path = " not in out
    with pytest.raises(SystemExit) as left:
        main(["train", "--help", "optm"])
    assert left.value.code == 2
    assert "nearest valid group: optim" in capsys.readouterr().err


def test_train_verb_and_module_are_the_same(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "nothing.yaml"])
    for run in (lambda: main(["train", "nothing.yaml"]), train.main):
        with pytest.raises(SystemExit) as exit_:
            run()
        assert exit_.value.code == 2
        assert "no such settings file" in capsys.readouterr().err


def test_the_384_recipe_has_the_published_batch_and_tokens(capsys):
    assert main(["plan", str(CONFIGS / "vith_384.yaml"), "data.batch_size=10"]) == 0
    out = capsys.readouterr().out
    assert "4608 a clip" in out
    assert "group of 10" in out
    assert "2400 clips a step = 10 x 240" in out


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["fastjepa"],
        ["fastjepa", "plan", str(CONFIGS / "demo.yaml")],
        ["fastjepa", "--help"],
        ["fastjepa.train", "--help"],
    ],
)
def test_a_reader_that_has_left_is_no_failure(arguments, unbuffered):
    command = [sys.executable, "-m", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (Exit.READER_LEFT, "")


def test_a_pipe_that_breaks_elsewhere_is_told(monkeypatch, capsys):
    def broken(arguments):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("fastjepa.verbs.plan.main", broken)
    assert main(["plan"]) == Exit.FAILED
    assert "Broken pipe" in capsys.readouterr().err
