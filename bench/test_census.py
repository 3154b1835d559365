"""Launches, bytes and work of one training step at full size, both executions: counted, so the same on any machine."""

import pytest

from bench.census.figures import census, result_rows, rows_without
from bench.census.steps import MODELS
from fastjepa.pieces import PIECES

KIND = "census"
ON_A_DEVICE = False


@pytest.mark.parametrize("model", MODELS)
def test_census(benchmark, results, model):
    """The step of one model; the time is that of counting it."""
    benchmark.group = "census"
    results(result_rows(benchmark.pedantic(census, args=(model, 0), rounds=1, iterations=1)))


@pytest.mark.parametrize("piece", PIECES)
def test_without_a_kernel(benchmark, results, piece):
    """The packed step of ViT-L with torch's own functions in place of the kernels of one piece."""
    benchmark.group = "census without a kernel"
    results(benchmark.pedantic(rows_without, args=("vitl", piece), rounds=1, iterations=1))
