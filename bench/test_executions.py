"""The CPU ratio of the two executions: processor time of a whole training step, on one thread, steps alternating.

On a CPU only arithmetic shows: the memory traffic, launches and stalls that packing saves on a GPU hardly do. It is no
figure for a GPU.
"""

import pytest
import torch

from bench.executions import SHAPES, contenders, largest_difference
from bench.pairing import alternate, processor_clock, ratio_row, time_row

KIND = "executions"
ON_A_DEVICE = True
STEPS = {"64x3": 60, "64x3-noised": 60, "192x12": 12}  # the last takes a second each


@pytest.mark.parametrize("shape", SHAPES)
def test_executions(benchmark, results, device, shape):
    """Packed, the reference, and the reference with the public optimizer path; gradients are compared first."""
    if device.type != "cpu":
        pytest.skip("a figure of a CPU: the step bench measures the executions on a GPU")
    torch.set_num_threads(1)
    benchmark.group = f"executions {shape}"
    where = {"shape": shape, "threads": 1}
    worst = largest_difference(shape)
    times = alternate(benchmark, contenders(shape), processor_clock, STEPS[shape])
    results([time_row(f"step {name}", ms, where) for name, ms in times.items()])
    results([ratio_row(f"speed of packed over {name}", times, name, where) for name in list(times)[1:]])
    results([{"name": "largest gradient difference", "value": worst, "unit": "relative", "parameters": where}])
