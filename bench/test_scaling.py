"""Cost of training against batch, tokens, frames, resolution, loader workers and processes: a case for each axis.

The first point of an axis is what pytest-benchmark's own table shows. On a CPU the model is a tiny one, timed by the
processor.
"""

import pytest

from bench.data.loading import LOADED, block_of, fresh, own_clock, processors, settings_of, why_not
from bench.pairing import alternate, rate_row, ratio_row
from bench.scaling import AXES, measure, points_of
from bench.scaling import settings_of as step_settings
from bench.step.processes import PROCESSES, step_times, too_many

KIND = "scaling"
ON_A_DEVICE = True
ROUNDS = {"cuda": 6, "cpu": 40}
PROCESS_ROUNDS = 2  # each starts all its processes anew
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
    """Steps of processes that train together by DDP, each with the clips that one has by itself."""
    benchmark.group = "step against processes"
    s = step_settings("processes", 1, device)
    fitting = [processes for processes in PROCESSES if not too_many(processes, device)]
    times: dict[int, list[float]] = {processes: [] for processes in fitting}

    def turn(processes):
        times[processes] += step_times(s, processes, device)

    def others():
        for processes in fitting[1:]:
            turn(processes)

    benchmark.pedantic(turn, args=(1,), setup=others, rounds=PROCESS_ROUNDS, iterations=1)
    for processes in PROCESSES:
        row = {"name": "step against processes", "parameters": {"model": s.model.name, "processes": processes}}
        if reason := too_many(processes, device):
            results([row | {"skipped": reason}])
            continue
        work = s.optim.global_batch * processes
        results([rate_row(work=work, ms=times[processes], unit="clips/s", **row) | {"clock": "wall"}])
    for processes in fitting[1:]:
        pair = {"these": times[processes], "one": [processes * ms for ms in times[1]]}
        parameters = {"model": s.model.name, "processes": processes}
        results(
            [ratio_row("step against processes, over the first point", pair, "one", parameters) | {"clock": "wall"}]
        )


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
