"""Every operation of `fastjepa_kernels` beside what it replaces: eager, compiled, the best library call.

    pytest -o addopts="--import-mode=importlib --strict-markers" bench/test_kernels.py --benchmark-only

The table of pytest-benchmark is what a caller waits for, the host's launches among it. `extra_info` of the JSON holds
the device's own time, with cold caches: `device_ms`, `p20_ms`, `p80_ms`. Results are checked before they are timed.
"""

import statistics

import pytest
import torch

from fastjepa_kernels.testing.cases import CASES, fresh, results, timed, yardstick
from fastjepa_kernels.tune import cuda_clock

pytestmark = pytest.mark.gpu
KIND = "kernels"
ON_A_DEVICE = True
DTYPE = torch.bfloat16
SAMPLES = 60
SHAPES = [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in case.benched()]
WAYS = ("ours", "eager", "compiled", "library")


def way_of(case, way):
    """The call that is timed: ours, what it replaces, that compiled, or the library's."""
    if way == "library" and case.best is None:
        pytest.skip("the eager form is the library call")
    if way == "compiled":
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False  # one graph is run backward again and again
        return torch.compile(case.eager, dynamic=False)
    return {"ours": case.ours(), "eager": case.eager, "library": case.best}[way]


@pytest.mark.parametrize(("case", "name"), SHAPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_operation(benchmark, case, name, which, way):
    """One pass of one operation at one shape, checked where it is ours, then timed."""
    if which not in case.passes():
        pytest.skip("there is no backward pass")
    if not torch.cuda.is_available():  # `--benchmark-only` runs what the mark leaves in
        pytest.skip("needs a CUDA device")
    call, inputs = way_of(case, way), case.make(case.shapes[name], torch.device("cuda"), DTYPE)
    if way == "ours":
        yardstick(case, inputs, DTYPE)(results(case, call, fresh(case, inputs), DTYPE))
    run = timed(case, call, fresh(case, inputs), which)
    for _ in range(3):  # compilation belongs to nobody's time
        run()
    samples = sorted(cuda_clock(run) for _ in range(SAMPLES))
    benchmark.group = f"{case.name} {name} {which}"
    benchmark.extra_info.update(
        operation=case.name, shape=case.shapes[name], which=which, way=way, dtype=str(DTYPE),
        device_ms=statistics.median(samples), p20_ms=samples[SAMPLES // 5], p80_ms=samples[-1 - SAMPLES // 5],
        gpu=torch.cuda.get_device_name(), torch=torch.__version__, peak_bytes=_peak(run),
    )  # fmt: skip

    def waited():
        run()
        torch.cuda.synchronize()

    benchmark.pedantic(waited, rounds=20, iterations=1, warmup_rounds=2)


def _peak(run):
    """What one call allocates at most, beyond what is there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
