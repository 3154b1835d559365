"""Is the run healthy? Sentences about collapse, divergence, spikes and learning nothing, from rows of metrics.jsonl.

In a JEPA the loss does not tell: it falls where the targets collapse, and it rises while a healthy encoder's features
grow richer. What tells is how many directions the target features use, and how far they lie apart, against what this
run had before. An encoder that has learnt nothing yet uses more directions than one that has (random projections), so
what a healthy run comes to is measured from where its predictor begins to learn.

A young run and a collapsing one both lose the content of their targets. In a healthy one the predictor keeps up, its
loss falls to that of the trivial predictor; in a collapsing one the targets run away from it, and the loss, though it
falls, grows to twice the trivial one. Each alarm is said when it begins and when it is over.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

# Features collapse below LOW of the highest value since the run learns, and have collapsed below VERY_LOW of the
# highest of all; above OVER and VERY_OVER of the two it is over. In healthy runs the rank settles at a third of what it
# begins with, and the deviation dips to a fifth and returns.
LOW, VERY_LOW, OVER, VERY_OVER = 0.3, 0.1, 0.45, 0.15
# A single batch may be odd.
CHECKS_TO_CONFIRM = 2
# Values before there is anything to compare with; for spikes, as many of the last ones as are compared with.
FEWEST, WINDOW, FEWEST_OF_WINDOW = 3, 30, 10
# A spike: so many deviations (scaled median deviations) and so many times the median above the median.
SPIKES = {"loss": ("the loss", 8.0, 0.5), "grad_norm": ("the gradient norm", 10.0, 4.0)}
GROWN = 1.3  # times the median of the last rows: content that grew
COLLAPSES = {"rank": "effective rank", "feature_std": "standard deviation"}
# Content drains away where less than HALF of the highest is left and the predictor loses the targets: its loss ratio is
# LOST times the lowest that it had, or more, counted from 1. (It falls all the time in healthy runs, though slowly in
# some: to 1.2 there and to 1.1 on a plateau with noised targets; without momentum it doubles.) Below a QUARTER the
# content has drained away. It is back at MOST of the highest, or above LOW of it where the predictor learns.
HALF, QUARTER, MOST, LOST = 0.5, 0.25, 0.6, 1.2
# Of several rows the median counts: a few clips make an odd batch often.
SMOOTHED = 3
# Diverged: predictions are so many times as long as the targets, and the loss so many times what it was at first, or
# what it is at most where nothing is predicted: features with a deviation of 1 have a mean length below 1.
TOO_LONG, FAR, NOTHING = 1.5, 1.2, 1.0
# At first a predictor is no better than the mean of all clips. It learns once its loss is below this share of that.
LEARNS = 0.97
STEPS_TO_LEARN, CHECKS_TO_LEARN = 1000, 20


@dataclass(frozen=True)
class Alarm:
    """Something begins or is over; `severe`: the run is lost if it goes on.

    `kind` is "collapse", "divergence", "spike" or "trivial".

    `sentence` is for the log.
    """

    kind: str
    sentence: str
    severe: bool = False


class Alarms:
    """What is watched over the rows of a run, in the order of their steps.

    `warmup_steps`: those of the learning rate; nobody expects anything to be learnt before.
    """

    def __init__(self, warmup_steps: int) -> None:
        self._collapses = [_Collapse(key, name) for key, name in COLLAPSES.items()]
        self._drain = _Drain()
        self._divergence = _Divergence()
        self._spikes = [_Spike(key, *limits) for key, limits in SPIKES.items()]
        self._trivial = _Trivial(warmup_steps)
        self._settled = warmup_steps + STEPS_TO_LEARN
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._contents: deque[float] = deque(maxlen=WINDOW)

    def check(self, step: int, row: Mapping[str, Any]) -> list[Alarm]:
        """What begins or is over with this row of metrics.jsonl; what is missing, None or not finite is passed over."""
        alarms = self._divergence.check(step, row)
        ratio, loss, content = _finite(row, "loss_ratio"), _finite(row, "loss"), _finite(row, "content")
        if ratio is not None:
            alarms += self._trivial.check(step, ratio)
            if content is not None:
                alarms += self._drain.check(step, content, ratio)
        learns = self._trivial.has_learnt or step > self._settled
        for collapse in self._collapses:
            value = _finite(row, collapse.key)
            if value is not None:
                alarms += collapse.check(step, value, learns, _fallen(self._losses, loss))
        for spike in self._spikes:
            value = _finite(row, spike.key)
            if value is not None:
                # A loss that rises with the content of the targets is what a run comes alive by.
                alarms += spike.check(step, value, excused=spike.key == "loss" and self._grown(content))
        if loss is not None:
            self._losses.append(loss)
        if content is not None:
            self._contents.append(content)
        return alarms

    def _grown(self, content: float | None) -> bool:
        return content is not None and len(self._contents) > 0 and content > GROWN * median(self._contents)

    @property
    def collapsed(self) -> bool:
        """Whether the target features have collapsed and not recovered; after a replay as it was before."""
        return self._level == 2

    @property
    def collapsing(self) -> bool:
        """Whether the target features collapse or have collapsed."""
        return self._level > 0

    @property
    def diverged(self) -> bool:
        """Whether the loss is no longer finite, or far above what it was at first."""
        return self._divergence.said

    @property
    def stuck(self) -> bool:
        """Whether it was said that nothing but the position is learnt, and this still holds."""
        return self._trivial.said

    @property
    def _level(self) -> int:
        return max(self._drain.level, *(collapse.level for collapse in self._collapses))

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the rows that a resumed run has kept; what they raised has been said."""
        for row in rows:
            self.check(row["step"], row)


class _Collapse:
    """One figure of the target features against its own highest values: of all, and since the run learns."""

    def __init__(self, key: str, name: str) -> None:
        self.key, self.name = key, name
        self.seen, self.of_all, self.since = 0, (0.0, 0), (0.0, 0)
        self.level, self.low, self.very_low, self.high = 0, 0, 0, 0

    def check(self, step: int, value: float, learns: bool, fallen: str) -> list[Alarm]:
        self.seen += 1
        self.of_all = max(self.of_all, (value, step))
        if learns:
            self.since = max(self.since, (value, step))
        if self.seen <= FEWEST or not self.of_all[0]:
            return []
        collapsed = value < VERY_LOW * self.of_all[0]
        highest, at = self.of_all if collapsed or not self.since[0] else self.since
        self.low = self.low + 1 if value < LOW * self.since[0] else 0
        self.very_low = self.very_low + 1 if collapsed else 0
        self.high = self.high + 1 if value > max(OVER * self.since[0], VERY_OVER * self.of_all[0]) else 0
        figures = f"their {self.name} is {value:.3g}, {value / highest:.0%} of the {highest:.3g} of step {at}"
        if self.very_low >= CHECKS_TO_CONFIRM and self.level < 2:
            self.level = 2
            text = f"the target features have collapsed: {figures}{fallen}; "
            advice = "what is learnt from here on is lost: go back to a checkpoint before that, with a lower optim.lr"
            return [Alarm("collapse", f"warning: step {step}: {text}{advice}", severe=True)]
        if self.low >= CHECKS_TO_CONFIRM and self.level < 1:
            self.level = 1
            text = f"the target features are collapsing: {figures}{fallen}; "
            advice = "a lower optim.lr, or an optim.momentum nearer to 1, may prevent it; keep a checkpoint of before"
            return [Alarm("collapse", f"warning: step {step}: {text}{advice}")]
        if self.high >= CHECKS_TO_CONFIRM and self.level:
            self.level = 0
            return [Alarm("collapse", f"step {step}: the target features have recovered: {figures}")]
        return []


class _Drain:
    """The content of the targets, together with whether the predictor keeps up with what they become."""

    def __init__(self) -> None:
        self.highest, self.lowest = (0.0, 0), math.inf
        self.level, self.lost, self.empty = 0, 0, 0
        self.last: deque[tuple[float, float]] = deque(maxlen=SMOOTHED)

    def check(self, step: int, content: float, ratio: float) -> list[Alarm]:
        self.highest, self.lowest = max(self.highest, (content, step)), min(self.lowest, ratio)
        self.last.append((content, ratio))
        highest, at = self.highest
        if len(self.last) < SMOOTHED or not highest:
            return []
        left, lost = (median(values) for values in zip(*self.last))
        share = left / highest
        self.lost = self.lost + 1 if share < HALF and lost > LOST * max(1.0, self.lowest) else 0
        self.empty = self.empty + 1 if share < QUARTER else 0
        figures = f"the content of {highest:.3g} of step {at} is down to {left:.3g}"
        why = f"and the loss is {lost:.2f} of the trivial one: the targets change faster than the predictor learns"
        if self.level < 2 and self.empty >= CHECKS_TO_CONFIRM and (self.level or self.lost >= CHECKS_TO_CONFIRM):
            self.level = 2
            text = f"the target features have collapsed: {figures}; "
            advice = "what is learnt from here on is lost: go back to a checkpoint before that, with a lower optim.lr"
            return [Alarm("collapse", f"warning: step {step}: {text}{advice} or an optim.momentum nearer to 1", True)]
        if self.level < 1 and self.lost >= CHECKS_TO_CONFIRM:
            self.level = 1
            text = f"the target features are collapsing: {figures}, {why}; "
            advice = "a lower optim.lr, or an optim.momentum nearer to 1, may prevent it; keep a checkpoint of before"
            return [Alarm("collapse", f"warning: step {step}: {text}{advice}")]
        if self.level and (share > MOST or (share > LOW and lost < LEARNS)):
            self.level = 0
            return [Alarm("collapse", f"step {step}: the target features have recovered: their content is {left:.3g}")]
        return []


class _Divergence:
    """Whether the loss has left what numbers can hold, or what it began with, because the predictions have."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.bad, self.said = 0, False

    def check(self, step: int, row: Mapping[str, Any]) -> list[Alarm]:
        keys = [key for key in ("loss", "grad_norm") if key in row]
        broken = [key for key in keys if _finite(row, key) is None]
        loss, length = _finite(row, "loss"), _finite(row, "norm_ratio")
        far = False
        if loss is not None:
            if len(self.first) < FEWEST:
                self.first.append(loss)
            far = loss > FAR * self._start and length is not None and length > TOO_LONG
        if keys:
            self.bad = self.bad + 1 if broken or far else 0
        if not self.said and self.bad >= CHECKS_TO_CONFIRM:
            self.said = True
            names = " and ".join(SPIKES[key][0] for key in broken)
            text = f"{names} not finite" if broken else f"the loss is {loss:.4g}, far above {self._start:.3g}"
            advice = "go back to a checkpoint before that, with a lower optim.lr or optim.clip_grad"
            return [Alarm("divergence", f"warning: step {step}: the run has diverged: {text}; {advice}", severe=True)]
        if self.said and not self.bad and loss is not None and loss < self._start:
            self.said = False
            return [Alarm("divergence", f"step {step}: the loss is back at {loss:.4g}")]
        return []

    @property
    def _start(self) -> float:
        """What the loss was at most before there was anything to compare with."""
        return min(NOTHING, max(self.first))


class _Spike:
    """A figure against the median of its last values."""

    def __init__(self, key: str, name: str, deviations: float, times: float) -> None:
        self.key, self.name, self.deviations, self.times = key, name, deviations, times
        self.last: deque[float] = deque(maxlen=WINDOW)
        # Of the spike that lasts: what was usual before it, the limit, and since how many checks.
        self.usual, self.limit, self.lasts = 0.0, 0.0, 0

    def check(self, step: int, value: float, *, excused: bool) -> list[Alarm]:
        alarms = self._going_on(step, value) if self.lasts else [] if excused else self._beginning(step, value)
        self.last.append(value)
        return alarms

    def _beginning(self, step: int, value: float) -> list[Alarm]:
        if len(self.last) < FEWEST_OF_WINDOW:
            return []
        usual = median(self.last)
        deviation = 1.4826 * median(abs(one - usual) for one in self.last)
        limit = usual + max(self.deviations * deviation, self.times * abs(usual))
        if value <= limit:
            return []
        self.usual, self.limit, self.lasts = usual, limit, 1
        text = f"{self.name} jumped to {value:.4g}; the median of the last {len(self.last)} rows is {usual:.4g}"
        return [Alarm("spike", f"warning: step {step}: {text}; a lower optim.lr or optim.clip_grad helps if it recurs")]

    def _going_on(self, step: int, value: float) -> list[Alarm]:
        self.lasts += 1
        if value < (self.usual + self.limit) / 2:
            self.lasts = 0
            return [Alarm("spike", f"step {step}: {self.name} is back at {value:.4g}")]
        if self.lasts > WINDOW:  # all that is compared with is of the new level
            self.lasts = 0
            return [Alarm("spike", f"step {step}: {self.name} stays at {value:.4g}, it was {self.usual:.4g} before")]
        return []


class _Trivial:
    """Whether the predictor is better than one that knows the position only."""

    def __init__(self, warmup_steps: int) -> None:
        self.starts, self.patience = warmup_steps, max(STEPS_TO_LEARN, warmup_steps)
        self.since: int | None = None
        self.checks, self.learns, self.said, self.has_learnt = 0, 0, False, False

    def check(self, step: int, ratio: float) -> list[Alarm]:
        self.learns = self.learns + 1 if ratio < LEARNS else 0
        self.has_learnt = self.has_learnt or self.learns >= CHECKS_TO_CONFIRM
        if step <= self.starts:
            return []
        if ratio < 1:
            self.since, self.checks = None, 0
        else:
            self.since = step if self.since is None else self.since
            self.checks += 1
        if self.said and self.learns >= CHECKS_TO_CONFIRM:
            self.said = False
            return [Alarm("trivial", f"step {step}: the predictor learns, its loss is {ratio:.3g} of the trivial one")]
        if self.said or self.since is None or step - self.since < self.patience or self.checks < CHECKS_TO_LEARN:
            return []
        self.said = True
        text = f"for {step - self.since} steps the loss has been no better than that of a predictor which knows the "
        advice = "position only; the learning rate, the masks or the videos do not fit"
        return [Alarm("trivial", f"warning: step {step}: {text}{advice}")]


def _fallen(losses: Sequence[float], loss: float | None) -> str:
    """What to say of a loss that fell meanwhile."""
    if loss is None or len(losses) < FEWEST or loss > 0.7 * median(losses):
        return ""
    return f", and the loss that fell from {median(losses):.3g} to {loss:.3g} meanwhile is no progress"


def _finite(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
