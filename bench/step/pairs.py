"""Two contenders for the same training steps, in turns of a few, and what becomes of their times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.files import Row
from bench.measure import CANNOT_RUN
from bench.pairing import rate_row, ratio_row
from bench.step.contenders import Contender, free
from fastjepa.gpus import peak_flops
from fastjepa.plan import Plan

try:
    from triton.errors import TritonError
except ImportError:  # no Triton on this machine: nothing raises its errors
    TritonError = RuntimeError

STEPS, TURN = 60, 10
PARITY_STEPS = 20
# Of a loss in bfloat16, over the first steps of training: sums in another order, rounded to 8 bits of mantissa.
PARITY_BOUND = 0.02
# A kernel that does not compile is Triton's error, settings that this machine cannot follow are ValueErrors.
FAILURES = (*CANNOT_RUN, TritonError, ValueError)


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

        A side that cannot run here skips the case with the reason. Errors: AssertionError where losses differ by more
        than rounding explains.
        """
        times: dict[str, list[float]] = {side.name: [] for side in (self.ours, self.other)}
        losses: dict[str, list[float]] = {}
        facts: dict[str, dict[str, Any]] = {}
        rounds = -(-steps // TURN)
        ours = self._built(self.ours)
        other = self._built(self.other) if self.together else None

        def turn(name: str, contender: Contender | None) -> None:
            if contender is not None:
                times[name] += contender.turn(TURN)

        def finish(name: str, contender: Contender) -> None:
            losses[name], facts[name] = contender.losses(), contender.facts()
            contender.close()

        benchmark.pedantic(
            turn, args=(self.ours.name, ours), setup=lambda: turn(self.other.name, other), rounds=rounds, iterations=1
        )
        finish(self.ours.name, ours)
        del ours
        if other is None:
            free()
            other = self._built(self.other)
            for _ in range(rounds):
                turn(self.other.name, other)
        finish(self.other.name, other)
        return self.rows(times, losses, facts)

    def _built(self, side: Side) -> Contender:
        try:
            return side.build()
        except torch.AcceleratorError:
            raise  # the device itself has failed, and everything after this would fail with it
        except FAILURES as error:
            if side is self.ours and not isinstance(error, ValueError):
                raise
            pytest.skip(f"{side.name}: {reason(error)}")

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
        """The largest relative difference of two losses over the first steps. Errors: AssertionError beyond the bound.

        Steps of unlike work are no comparison.
        """
        pairs = list(zip(losses[self.ours.name], losses[self.other.name]))[:PARITY_STEPS]
        largest = max(abs(mine / theirs - 1) for mine, theirs in pairs)
        assert largest <= PARITY_BOUND, (
            f"losses of {self.ours.name} and {self.other.name} differ by {largest:.1e}, more than rounding explains"
        )
        return {"steps": len(pairs), "largest": largest, "bound": PARITY_BOUND}


def reason(error: BaseException) -> str:
    """An error in a line: the first line of what a compiler raises only says which compiler it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300] or 'no message'}"
