"""What checkpoints cost the demo: its training step with and without a save beside it, in turns.

    pytest bench/test_saving.py --benchmark-only

A turn is a block of steps that begins with a save, in a thread or before the first step, or has none. It ends when the
save has: all of its work is in the block, whoever does it. A block is far shorter than the 100 steps of the claim, so
that the difference stands out of the noise; slow-downs are scaled to one save in that many. By the clock on the wall
they hold where a processor is free for the thread; by processor time they hold where none is.
"""

import time

from bench.data.loading import own_clock
from bench.files import quantiles
from bench.pairing import alternate, time_row
from bench.step.ways import ROOT, Runner, prepare
from fastjepa import configfile
from fastjepa.checkpoint import Saver, save
from fastjepa.parallel import synchronise

KIND = "saving"
ON_A_DEVICE = True
BLOCK = 10  # steps of a turn
CLAIMED = 100  # steps from one save to the next
ROUNDS = 25
NONE, THREAD, BEFORE = "no save", "in a thread", "before the step"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
TRAINER = {"samples_seen": 0, "settings": {}, "data": "", "scaler": None}


class Blocks:
    """Blocks of steps of one run, with a save or without; the milliseconds of each, by clock and way."""

    def __init__(self, device, folder):
        self.settings = configfile.load(ROOT / "configs" / "demo.yaml", [])
        self.runner, self.batches = Runner(self.settings, device), prepare(self.settings, BLOCK, device)
        self.runner.step(self.batches)  # the optimizer has its state from its first step on
        self.folder, keep = folder, self.settings.checkpoint.keep
        self.saver = Saver(folder / "thread", keep=keep, keep_every=0, say=print)
        self.begun: list[float] = []
        self.times = {clock: {way: [] for way in (NONE, THREAD, BEFORE)} for clock in CLOCKS}

    def turn(self, way):
        """One block; its milliseconds on the wall."""
        synchronise(self.runner.device)
        before = {clock: read() for clock, read in CLOCKS.items()}
        self._save(way)
        for _ in range(BLOCK):
            self.runner.step(self.batches)
        synchronise(self.runner.device)
        if way == THREAD:
            outcome = self.saver.wait()
            assert outcome is not None, "it was begun"
            assert outcome.error is None, outcome.error
        for clock, read in CLOCKS.items():
            self.times[clock][way].append(1e3 * (read() - before[clock]))
        return self.times["wall"][way][-1]

    def _save(self, way):
        state, step = self.runner.update.tensors(), self.runner.taken
        if way == THREAD:
            began = time.perf_counter()
            self.saver.begin(step, state, TRAINER)
            self.begun.append(1e3 * (time.perf_counter() - began))
        elif way == BEFORE:
            save(self.folder / "before", step, state, TRAINER, self.settings.checkpoint.keep, print)


def test_saving(benchmark, results, device, tmp_path):
    """The demo's step with a save in a thread, one that it waits for, and none."""
    benchmark.group = "saving the demo"
    blocks = Blocks(device, tmp_path)
    ways = {way: lambda way=way: blocks.turn(way) for way in (NONE, THREAD, BEFORE)}
    alternate(benchmark, ways, own_clock, ROUNDS)
    where = {"recipe": "demo", "steps": BLOCK}
    state = sum(tensor.nbytes for tensor in blocks.runner.update.tensors().values())
    results([{"name": "state", "value": state / 1e6, "unit": "MB", "parameters": where}])
    results([time_row("the step waits for a save in a thread", blocks.begun[-ROUNDS:], where | {"clock": "wall"})])
    for clock, of_way in blocks.times.items():
        times, at = {way: ms[-ROUNDS:] for way, ms in of_way.items()}, where | {"clock": clock}
        results([time_row(f"steps, {way}", ms, at) for way, ms in times.items()])
        for way in (THREAD, BEFORE):
            more = [ms - plain for ms, plain in zip(times[way], times[NONE])]
            slower = [100 * (ms / plain - 1) * BLOCK / CLAIMED for ms, plain in zip(times[way], times[NONE])]
            results([row(f"a save {way}", more, "ms", at)])
            results([row(f"slow-down by saves {way}", slower, "%", at | {"every": CLAIMED})])


def row(name, values, unit, parameters):
    """Differences of rounds as a row."""
    p20, median, p80 = quantiles(values)
    return {"name": name, "value": median, "unit": unit, "p20": p20, "p80": p80, "n": len(values),
            "parameters": parameters}  # fmt: skip
