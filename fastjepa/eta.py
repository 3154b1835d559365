"""How long a run still takes: from its steps so far, and from what comes between them.

A step's time is the mean over the newer half of what this process has trained, without its first step, which compiles;
so neither one slow interval nor a slow beginning decides. Probes, checkpoints and the like are counted apart: how many
are left is known, and what one costs is the mean of those seen.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

# Points in time that are kept; every second one is dropped where there are more.
MOST_POINTS = 512


@dataclass
class Aside:
    """What happens every `every` steps (0: never) and `at_end`, beside training.

    `guess` is what one takes as long as, in steps, until one was seen.
    """

    every: int
    at_end: bool
    guess: float = 0.0
    seconds: float = 0.0
    count: int = 0

    def left(self, step: int, last: int) -> int:
        """How many are still to come once this step is computed: its own one, too."""
        between = (last - 1) // self.every - max(step - 1, 0) // self.every if self.every else 0
        return between + (1 if self.at_end else 0)


class Eta:
    """Seconds left of a run whose last step is `last`. `clock` gives seconds that only grow."""

    def __init__(self, last: int, asides: Mapping[str, Aside], clock: Callable[[], float] = time.perf_counter) -> None:
        self.last, self.asides, self._clock = last, dict(asides), clock
        self._points: deque[tuple[int, float]] = deque()
        self._outside = 0.0
        self._each: float | None = None

    def stepped(self, step: int) -> None:
        """A step has ended, and the device has nothing left to do: after a log step, and after the first one."""
        if self._points and self._points[-1][0] == step:
            self._points.pop()
        self._points.append((step, self._clock() - self._outside))
        if len(self._points) > MOST_POINTS:
            self._points = deque(point for place, point in enumerate(self._points) if place % 2 == 0)

    def forget(self) -> None:
        """The steps since the last call of `stepped` were slower than those to come: begin to measure again."""
        self._each = self.step_seconds()
        self._points.clear()

    @contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """Around what is no training: its time is not that of steps. `kind` is one of the asides, or its own."""
        began = self._clock()
        try:
            yield
        finally:
            spent = self._clock() - began
            self._outside += spent
            if kind in self.asides:
                self.asides[kind].seconds += spent
                self.asides[kind].count += 1

    def left(self, step: int) -> float | None:
        """Seconds until the run is done, after this step; None as long as nothing tells."""
        each = self.step_seconds()
        if each is None:
            return None
        total = each * (self.last - step)
        for one in self.asides.values():
            total += one.left(step, self.last) * (one.seconds / one.count if one.count else one.guess * each)
        return total

    def step_seconds(self) -> float | None:
        """What a step takes, over the newer half of those seen."""
        if len(self._points) < 2:
            return self._each
        end_step, end = self._points[-1]
        middle = (self._points[0][0] + end_step) / 2
        start_step, start = max((point for point in self._points if point[0] <= middle), key=lambda point: point[0])
        return (end - start) / (end_step - start_step)
