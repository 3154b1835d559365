"""Launches, bytes and work of one training step at full size, both executions: counted, so the same on any machine."""

import pytest

from bench.census.figures import census, result_rows
from bench.census.steps import MODELS

KIND = "census"
ON_A_DEVICE = False


@pytest.mark.parametrize("model", MODELS)
def test_census(benchmark, results, model):
    """The step of one model; the time is that of counting it."""
    benchmark.group = "census"
    results(result_rows(benchmark.pedantic(census, args=(model, 0), rounds=1, iterations=1)))
