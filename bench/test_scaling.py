"""Cost of training against batch, tokens, frames, resolution, loader workers and processes: a case for each axis.

The first point of an axis is what pytest-benchmark's own table shows. On a CPU the model is a tiny one, timed by the
processor.
"""

import pytest

from bench.data.loading import LOADED, block_of, fresh, own_clock, processors, settings_of, why_not
from bench.pairing import alternate, rate_row
from bench.scaling import AXES, PROCESSES, Point, measure, points_of, why_one_process
from bench.scaling import settings_of as step_settings

KIND = "scaling"
ON_A_DEVICE = True
ROUNDS = {"cuda": 6, "cpu": 40}
WORKERS = (0, 1, 2, 4, 8, 16, 32)
WORKER_ROUNDS = 3
LOADED_CLIPS = 4  # of a batch: with the published 24, one process would need minutes for a block of many workers


@pytest.mark.parametrize("axis", AXES)
def test_step(benchmark, results, device, axis):
    """The packed step, from clips on the device to the updated target encoder, with one thing changed."""
    benchmark.group = f"step against {axis}"
    points = points_of(axis, device)
    measure(benchmark, points, ROUNDS[device.type])
    assert any(point.ms for point in points), points[0].skipped
    results([point.row(f"step against {axis}") for point in points])
    for point in points:
        results(point.over(points[0], f"step against {axis}"))


def test_processes(benchmark, results, device):
    """Steps of one process, and why there are none of several."""
    benchmark.group = "step against processes"
    s = step_settings("processes", 1, device)
    point = Point(s, {"model": s.model.name, "processes": 1}, device)
    measure(benchmark, [point], ROUNDS[device.type])
    assert point.ms, point.skipped
    results([point.row("step against processes")])
    results([{"name": "step against processes", "skipped": why_one_process(more),
              "parameters": {"model": s.model.name, "processes": more}} for more in PROCESSES[1:]])  # fmt: skip


def test_workers(benchmark, results, device, videos):
    """The loader, with a new start for each turn: its workers do not work while others are timed.

    All load the same clips, as many as the most workers need.
    """
    benchmark.group = "loader against workers"
    s = settings_of(videos.path(*LOADED), LOADED_CLIPS)
    fitting = [workers for workers in WORKERS if not why_not(workers)]
    block = block_of(max(fitting), LOADED_CLIPS)
    variants = {str(workers): lambda workers=workers: fresh(s, workers, device, block=block).ms for workers in fitting}
    times = alternate(benchmark, variants, own_clock, WORKER_ROUNDS, warm_up=0)
    where = {"clips": LOADED_CLIPS, "size": LOADED[0], "gop": LOADED[1], "crop": s.data.crop,
             "processors": processors()}  # fmt: skip
    for workers in WORKERS:
        row = {"name": "loader against workers", "parameters": where | {"workers": workers}}
        if reason := why_not(workers):
            results([row | {"skipped": reason}])
        else:
            work = block * LOADED_CLIPS
            results([rate_row(work=work, ms=times[str(workers)], unit="clips/s", **row) | {"clock": "wall"}])
