"""A word and a sentence for the state that a run is in: what a person wants to know before any figure."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Any

from fastjepa.alarms import FEWEST, LEARNS, Alarms

# A predictor that knows the position comes so near to the trivial one; it has forgotten it far above that.
KNOWS, FORGOT = 1.1, 1.2
# Rows whose median loss ratio counts.
SMOOTHED = 7


@dataclass(frozen=True)
class Verdict:
    """`word` is for the console and the rows of metrics.jsonl, `sentence` for who wants to know what it means."""

    word: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.word}: {self.sentence}"


EARLY = Verdict("early", "too early to tell: the predictor does not know the position yet")
POSITION = Verdict("position only", "only the position is predicted so far, as usual at the beginning")
ALIVE = Verdict("alive", "more than the position is predicted")
STUCK = Verdict("stuck", "nothing but the position is predicted, for longer than is usual")
COLLAPSING = Verdict("collapsing", "the targets lose what they tell clips apart by, and the predictor does not keep up")
COLLAPSED = Verdict("collapsed", "the targets tell hardly anything any more: a low loss is no progress")
DIVERGED = Verdict("diverged", "the loss is not finite, or far above what it was at first")
UNKNOWN = Verdict("unknown", "clips of one video at a time give no loss to compare with; nothing has collapsed")


class Judge:
    """The verdict on a run, row after row, from its alarms and from whether its predictor learns.

    It is the same for a run that was resumed and for one that was not, and does not waver with single batches.
    """

    def __init__(self, alarms: Alarms) -> None:
        self.alarms, self.verdict = alarms, EARLY
        self._checks, self._alive = 0, False
        self._ratios: deque[float] = deque(maxlen=SMOOTHED)

    def check(self, step: int, row: Mapping[str, Any]) -> list[str]:
        """What there is to say of this row of metrics.jsonl: alarms, and the verdict where it has changed."""
        said = [alarm.sentence for alarm in self.alarms.check(step, row)]
        self._checks += 1
        ratio = row.get("loss_ratio")
        if ratio is not None and isfinite(ratio):
            self._ratios.append(ratio)
        before, self.verdict = self.verdict, self._judge()
        return said if self.verdict is before else [*said, f"verdict    step {step}: {self.verdict}"]

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the rows that a resumed run has kept."""
        for row in rows:
            self.check(row["step"], row)

    def _judge(self) -> Verdict:
        alarms = self.alarms
        if alarms.diverged:
            return DIVERGED
        if alarms.collapsed:
            return COLLAPSED
        if alarms.collapsing:
            return COLLAPSING
        if self._checks < FEWEST:
            return EARLY
        if not self._ratios:
            return UNKNOWN
        usual = median(self._ratios)
        # Two limits, so that a run between them does not change its verdict with every row.
        self._alive = usual < (1.0 if self._alive else LEARNS)
        if self._alive:
            return ALIVE
        if alarms.stuck or self.verdict is STUCK:
            return STUCK
        return POSITION if usual < (KNOWS if self.verdict is EARLY else FORGOT) else EARLY
