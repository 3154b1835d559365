"""Whole training steps of the published models, from clips on the device to the updated target encoder.

    pytest bench/test_step.py --benchmark-only -k "vith and reference"

Clips are random bytes on the device, masks are drawn as a run draws them, a draw for each step and the same for both
sides. A case has two ways of taking the steps, in turns of ten; a way that lacks memory beside the other follows it.
"""

import pytest

from bench.failures import CannotRun
from bench.step.contenders import Own
from bench.step.pairs import STEPS, TURN, Pair, Side, disagreement
from bench.step.ways import MODELS, PAIRS, fit_together, plan_of, prepare, settings_of
from fastjepa.memory import usable_memory

KIND = "step"
ON_A_DEVICE = True
CASES = [pytest.param(model, ours, other, id=f"{model}-{ours}-{other}") for ours, other in PAIRS for model in MODELS]
WARM_UP_DRAWS = 20


@pytest.mark.parametrize(("model", "ours", "other"), CASES)
def test_step(benchmark, results, device, model, ours, other):
    """Two ways of one model, beside each other."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device: these steps take minutes each on a CPU")
    benchmark.group = f"step {model}"
    try:
        rows = pair_of(model, ours, other, device).measure(benchmark)
    except CannotRun as error:
        pytest.skip(str(error))
    results(rows)
    if wrong := disagreement(rows):
        pytest.fail(wrong, pytrace=False)


def pair_of(model, ours, other, device, *, quick=False):
    """The pair of these ways; `quick` has a tiny model in place of the published one."""
    settings = {way: settings_of(model, way, quick=quick) for way in (ours, other)}
    plans = {way: plan_of(s, device) for way, s in settings.items()}
    batches = prepare(settings[ours], STEPS + STEPS // TURN + WARM_UP_DRAWS, device)
    sides = [Side(way, lambda s=settings[way]: Own(s, batches, device), plans[way]) for way in (ours, other)]
    together = fit_together(list(plans.values()), usable_memory(device))
    same = settings[ours].model.targets == settings[other].model.targets
    return Pair(model, *sides, device, together=together, same=same)
