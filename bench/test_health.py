"""What the figures of health cost the demo: a training step with a look at it beside one without, in turns.

    pytest bench/test_health.py --benchmark-only

A look is all that a log step does more than another: the features of all tokens, the distance of the target encoder,
the figures, and their one transfer to the host. Its share of a step is that over the steps between two looks. By the
processor's clock, and by that on the wall.
"""

import time

import torch

from bench.files import quantiles
from bench.pairing import alternate, processor_clock, time_row
from bench.step.ways import ROOT, Runner, prepare
from fastjepa import configfile, health
from fastjepa.parallel import synchronise
from fastjepa.reporting import transferred

KIND = "health"
ON_A_DEVICE = True
ROUNDS = 200
DRAWS = 8
OFTEN = 10  # log.every where nothing else is asked for
WITHOUT, WITH = "a step without a look", "a step with a look"


class Looks:
    """Steps of one run, with a look or without; the milliseconds of each on the wall beside what a clock takes."""

    def __init__(self, device: torch.device) -> None:
        self.settings = configfile.load(ROOT / "configs" / "demo.yaml", [])
        self.runner, self.batches = Runner(self.settings, device), prepare(self.settings, DRAWS, device)
        self.wall: dict[str, list[float]] = {WITHOUT: [], WITH: []}

    def step(self, way: str) -> None:
        """One step; what a look leaves ends on the host, as in a run."""
        began = time.perf_counter()
        runner, look = self.runner, way == WITH
        # Both steps of a round get the same masks, whose lengths a step's time depends on.
        clips, draw = self.batches.at(runner.taken // 2)
        out = runner.exchange.loss(clips, draw.context, draw.target, None, union=draw.union, look=look)
        runner.update.backward(out.loss)
        loss = out.loss.detach()
        distance = runner.update.ema_distance() if look else None
        runner.update.step(runner.taken, loss)
        runner.losses.append(loss)
        if look:
            found = health.measure(out.every_target, out.predictions, self.settings.loss.exponent)
            transferred({"ema_distance": distance, **vars(found)})
        synchronise(runner.device)
        self.wall[way].append(1e3 * (time.perf_counter() - began))


def test_health(benchmark, results, device):
    """The demo's step with a look and without."""
    benchmark.group = "health of the demo"
    looks = Looks(device)
    ways = {way: lambda way=way: looks.step(way) for way in (WITHOUT, WITH)}
    processor = alternate(benchmark, ways, processor_clock, ROUNDS)
    log_every = looks.settings.log.every
    for clock, times in {"processor": processor, "wall": {way: ms[-ROUNDS:] for way, ms in looks.wall.items()}}.items():
        where = {"recipe": "demo", "clock": clock}
        results([time_row(way, ms, where) for way, ms in times.items()])
        more = [look - plain for look, plain in zip(times[WITH], times[WITHOUT])]
        results([row("a look", more, "ms", where)])
        for every in (OFTEN, log_every):
            share = [100 * ms / (every * plain) for ms, plain in zip(more, times[WITHOUT])]
            results([row("share of the steps between two looks", share, "%", where | {"every": every})])


def row(name, values, unit, parameters):
    """Differences of rounds as a row."""
    p20, median, p80 = quantiles(values)
    return {"name": name, "value": median, "unit": unit, "p20": p20, "p80": p80, "n": len(values),
            "parameters": parameters}  # fmt: skip
