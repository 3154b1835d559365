"""Two contenders for the same training steps, in turns of a few, and what becomes of their times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.failures import FAILURES, CannotRun, reason
from bench.files import Row
from bench.pairing import rate_row, ratio_row
from bench.step.contenders import Contender
from fastjepa.gpus import peak_flops
from fastjepa.plan import Plan

STEPS, TURN = 50, 10
PARITY_STEPS = 20
# Of a loss in bfloat16, over the first steps of training: sums in another order, rounded to 8 bits of mantissa.
PARITY_BOUND = 0.02


@dataclass(frozen=True)
class Side:
    """One of the two: how its rows are called, how to build it, and the work of its steps by the plan."""

    name: str
    build: Callable[[], Contender]
    plan: Plan


@dataclass
class Pair:
    """`together`: whether both fit into memory; `same`: whether they compute the same losses from the same weights."""

    model: str
    ours: Side
    other: Side
    device: torch.device
    together: bool = True
    same: bool = True

    def measure(self, benchmark: BenchmarkFixture, steps: int = STEPS) -> list[Row]:
        """Rows of both and of their ratio. pytest-benchmark times our turns of `TURN` steps and one that is not timed.

        Whether both compute the same losses is for `disagreement` to say. Errors: CannotRun where one side cannot run
        on this machine, ValueError for a loss that is not finite.
        """
        times: dict[str, list[float]] = {side.name: [] for side in (self.ours, self.other)}
        known: dict[str, tuple[list[float], dict[str, Any]]] = {}
        rounds = -(-steps // TURN)
        ours, other = self.ours.name, self.other.name
        running: dict[str, Contender] = {}

        def turn(name: str) -> None:
            if name in running:
                times[name] += running[name].turn(TURN)

        def finish() -> None:
            # Facts of all first: closing one drops the compiled code of the others too.
            known.update({name: (one.losses(), one.facts()) for name, one in running.items()})
            close()

        def close() -> None:
            while running:
                running.popitem()[1].close()

        try:
            running[ours] = self._built(self.ours)
            if self.together:
                running[other] = self._built(self.other)
            benchmark.pedantic(turn, args=(ours,), setup=lambda: turn(other), rounds=rounds, iterations=1)
            finish()
            if not self.together:
                running[other] = self._built(self.other)
                for _ in range(rounds):
                    turn(other)
                finish()
        finally:
            close()
        losses, facts = ({name: found[place] for name, found in known.items()} for place in (0, 1))
        return self.rows(times, losses, facts)

    def _built(self, side: Side) -> Contender:
        try:
            return side.build()
        except torch.AcceleratorError:
            raise  # the device itself has failed, and everything after this would fail with it
        except FAILURES as error:
            if side is self.ours and not isinstance(error, ValueError):
                raise
            raise CannotRun(f"{side.name}: {reason(error)}") from None

    def rows(
        self, times: dict[str, list[float]], losses: dict[str, list[float]], facts: dict[str, dict[str, Any]]
    ) -> list[Row]:
        """A row each, and one of how many times the speed of the other ours has."""
        ours, other = self.ours.name, self.other.name
        parity = self.parity(losses) if self.same else None
        rows = [
            self._row(side, beside.name, times[side.name], losses[side.name]) | facts[side.name]
            for side, beside in ((self.ours, self.other), (self.other, self.ours))
        ]
        ratio = ratio_row(f"step {ours} over {other}", times, other, {"model": self.model})
        return [*rows, ratio | {"in_turns": self.together, "parity": parity}]

    def _row(self, side: Side, beside: str, ms: list[float], losses: list[float]) -> Row:
        plan, peak, part = side.plan, peak_flops(self.device), max(len(ms) // 10, 1)
        where = {"model": self.model, "way": side.name, "beside": beside}
        row = rate_row(f"step {side.name}", ms, plan.batch_size, "clips/s", where)
        tokens = {"clip": plan.tokens, "context": plan.context, "target": plan.target}
        return row | {
            # time of the last tenth over the first: above 1 the device slowed down, as hot or power-limited ones do
            "drift": sum(ms[-part:]) / sum(ms[:part]),
            "mfu": None if peak is None else row["value"] * plan.flop_per_clip / peak,
            "batch": plan.batch_size,
            "tokens": tokens,
            "flop_per_clip": plan.flop_per_clip,
            "loss_first": losses[0],
            "loss_last": losses[-1],
        }

    def parity(self, losses: dict[str, list[float]]) -> dict[str, Any]:
        """The largest relative difference of two losses over the first steps."""
        pairs = list(zip(losses[self.ours.name], losses[self.other.name]))[:PARITY_STEPS]
        largest = max(abs(mine / theirs - 1) for mine, theirs in pairs)
        return {"steps": len(pairs), "largest": largest, "bound": PARITY_BOUND, "within": largest <= PARITY_BOUND}


def disagreement(rows: list[Row]) -> str:
    """Why these rows of a pair are no figures of the same work; empty where they are."""
    apart = [row for row in rows if (row.get("parity") or {}).get("within") is False]
    if not apart:
        return ""
    return f"{apart[0]['name']}: losses differ by {apart[0]['parity']['largest']:.1e}, more than rounding explains"
