"""Every operation of `fastjepa_kernels` where a training step calls it, beside what it replaces.

A case is one pass of one operation at one place of a step. Its ways take turns: ours, eager, compiled, and what
libraries have. All of them are checked before they are timed; where ours is not exact enough the case fails, and where
another is not, its row says so. Times are the device's own.
"""

import gc
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
import torch._functorch.config

from bench.files import Row
from bench.kernels.cases import Prepared, Setting, failure_of_ours, measure, measure_ceilings, prepare
from fastjepa_kernels.dispatch import has_triton
from fastjepa_kernels.testing.cases_of_steps import Place, places

pytestmark = pytest.mark.gpu
KIND = "kernels"
ON_A_DEVICE = True
CASES = [pytest.param(place, which, id=f"{place}-{which}") for place in places() for which in place.case.passes()]


class Workbench:
    """What cases share: the ceilings of the session, and the place whose passes are timed one after another."""

    def __init__(self, device: torch.device) -> None:
        self.setting = Setting.of_a_gpu(device)
        self.unrecorded: list[Row] = measure_ceilings(self.setting)
        self.ceilings = {row["unit"]: row["value"] for row in self.unrecorded}
        self.prepared: Prepared | None = None

    def at(self, place: Place) -> Prepared:
        """The place with its ways compiled and checked. The one before is given up first, memory and all."""
        if self.prepared is None or self.prepared.place is not place:
            self.clear()
            self.prepared = prepare(place, self.setting)
        return self.prepared

    def clear(self) -> None:
        """Give up what is there. Compiled code holds on to what it was made for."""
        self.prepared = None
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def workbench(device: torch.device) -> Iterator[Workbench]:
    """Of a GPU that Triton has."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    if not has_triton():
        pytest.skip("Triton is not installed")
    # One graph is run backward again and again.
    with torch._functorch.config.patch(donated_buffer=False):
        bench = Workbench(device)
        yield bench
        bench.clear()


@pytest.mark.parametrize(("place", "which"), CASES)
def test_operation(benchmark, workbench, results, place, which):
    """One pass of one operation at one place."""
    benchmark.group = f"{place} {which}"
    try:
        rows = measure(benchmark, workbench.at(place), which, workbench.setting, workbench.ceilings)
    except torch.OutOfMemoryError:
        workbench.clear()
        pytest.skip("the inputs and their yardstick do not fit into this device's memory")
    results([*workbench.unrecorded, *rows])
    workbench.unrecorded = []
    if reason := failure_of_ours(rows):
        pytest.fail(f"ours: {reason}")
