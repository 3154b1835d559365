"""Runs with deep supervision and the dense loss: what they measure, and what may begin from their weights."""

import pytest
import torch

from fastjepa import health
from fastjepa.build import build_jepa
from fastjepa.configfile import load
from fastjepa.exits import Exit
from fastjepa.fit import architecture, state_of
from fastjepa.interop import read_weights

DENSE = ("model.levels=deep", "loss.context=0.5", "optim.steps=2", "optim.warmup_steps=1")
NO_MOVEMENT = ("optim.lr=0", "optim.start_lr=0", "optim.final_lr=0", "optim.momentum=1.0")


def test_health_is_measured_by_levels(run, monkeypatch):
    seen, plain = [], health.measure

    def measure(targets, predictions, exponent, levels):
        seen.append((targets.shape[-1], {p.shape[-1] for p in predictions}, levels))
        return plain(targets, predictions, exponent, levels)

    monkeypatch.setattr(health, "measure", measure)
    run(*DENSE)
    assert seen == [(3 * 64, {3 * 64}, 3)] * 2


def test_a_run_begins_from_a_deep_run(run):
    code, first = run(*DENSE, folder="first")
    assert code == Exit.DONE
    code, second = run(*DENSE, *NO_MOVEMENT, f"init.from={first}", folder="second")
    assert code == Exit.DONE
    given, found = (read_weights(folder).networks for folder in (first, second))
    for name, state in given.items():
        assert state.keys() == found[name].keys()
        assert all(torch.equal(found[name][key], tensor) for key, tensor in state.items()), name


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (DENSE[1:], "model.levels: the file was trained with last, the settings have deep"),
        (
            (DENSE[0], *DENSE[2:]),
            "loss.context: the predictor of the file has none, that of the settings a projection for context tokens",
        ),
    ],
)
def test_weights_of_another_kind_are_refused_by_the_setting_alone(run, capsys, made, sentence):
    _, other = run(*made, folder="other")
    capsys.readouterr()
    code, folder = run(*DENSE, f"init.from={other}", folder="next")
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    said = capsys.readouterr().err
    assert sentence in said
    assert not any(f"{key}: the " in said for key in ("model.predictor_dim", "model.name"))
    code, folder = run(*made, f"init.from={read_weights(other).path}", folder="next")
    assert code == Exit.DONE


def test_shapes_tell_levels_and_the_width_of_the_predictor(recipe):
    found = [architecture(state_of(build_jepa(load(recipe, list(given))))) for given in (DENSE[:2], ())]
    assert [(one.levels, one.predicts_context, one.predictor_dim) for one in found] == [(3, True, 16), (0, False, 16)]
