"""What is known of steps whose loss or gradients were not finite: which videos they saw, and when it is enough.

Such a step has changed nothing (see `fastjepa.optim`). Nobody waits for the device to say so: its figures are copied to
the host while it computes on, and looked at when they have arrived, mostly a step or two later.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastjepa.data.dataset import RANDOM_REPLACEMENTS
from fastjepa.data.order import VideoOrder
from fastjepa.optim import StepNorms
from fastjepa.runfolder import write_atomically

# float16 finds its loss scale by overflowing: from 65536 down to 1 takes 16 steps that say nothing about the run.
OVERFLOWS_IN_A_ROW = 20
FILES_NAMED = 3


class Event(Protocol):
    """Something on the device that is over or not, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether it is over, without waiting."""

    def synchronize(self) -> None:
        """Wait until it is over."""


class Over:
    """What needs no waiting for: values that are on the host already."""

    def query(self) -> bool:
        """Yes."""
        return True

    def synchronize(self) -> None:
        """At once."""


@dataclass
class Pending:
    """A step of which the figures are on their way: the clips of each micro-batch, and when the values are there."""

    step: int
    slots: list[tuple[int, ...]]
    values: Tensor
    arrived: Event


def to_host(values: Tensor) -> tuple[Tensor, Event]:
    """Begin a copy to the host; the values may be read once the event is over."""
    if values.device.type != "cuda":
        return values, Over()
    # Only into page-locked memory the copy does not wait.
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host, torch.cuda.current_stream(values.device).record_event()


class BadSteps:
    """The bad steps of a run, listed in `listed` (bad_steps.jsonl): a line each with step, figures and videos.

    `names` gives the file of every clip of a micro-batch. After `most_in_a_row` bad steps in a row it is enough; with
    `scaled` losses (float16), steps whose loss is finite and whose gradients are not are how the scale is found, and 20
    of them are tolerated, or `most_in_a_row` if that is more.

    One process of several has its own, with a `listed` of its own, and names what it has seen itself; all of them come
    to the same end, at times that differ by a few steps.
    """

    def __init__(
        self,
        listed: Path,
        most_in_a_row: int,
        names: Callable[[Sequence[int]], list[str]],
        say: Callable[[str], None],
        *,
        scaled: bool = False,
    ) -> None:
        self.listed, self.names, self.say, self.scaled = listed, names, say, scaled
        self.most = most_in_a_row
        self.most_overflows = max(most_in_a_row, OVERFLOWS_IN_A_ROW) if scaled else most_in_a_row
        # Of the last steps that have arrived: all bad ones, and those whose loss was not finite.
        self.in_a_row, self.losses_in_a_row = 0, 0
        self.reason: str | None = None
        self.last: deque[dict[str, Any]] = deque(maxlen=self.most_overflows)
        self._pending: deque[Pending] = deque()

    def rewind(self, step: int) -> None:
        """Begin after this step, knowing what came before. Later lines are dropped: they come anew."""
        self._pending.clear()
        self.last.clear()
        self.in_a_row, self.losses_in_a_row, self.reason = 0, 0, None
        if not self.listed.is_file():
            return
        kept = []
        for line in self.listed.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                keep = entry["step"] <= step
            except (ValueError, KeyError, TypeError):
                keep = False  # half written where the process was killed
            if keep:
                kept.append(line)
                self.last.append(entry)
        write_atomically(self.listed, "".join(f"{line}\n" for line in kept))
        self._count_back(step)

    def _count_back(self, step: int) -> None:
        """How many of the steps up to this one were bad, without a good one between them."""
        only_losses = True
        for entry in reversed(self.last):
            if entry["step"] != step - self.in_a_row:
                return
            self.in_a_row += 1
            only_losses = only_losses and entry["not_finite"] == "loss"
            self.losses_in_a_row += only_losses

    def note(
        self, step: int, slots: Sequence[tuple[int, ...]], losses: Sequence[Tensor], loss: Tensor, norms: StepNorms
    ) -> None:
        """Take in a step without waiting for the device.

        `step` as in metrics.jsonl, counted from 1. `slots`: the clips of each micro-batch of this process. `losses`:
        the loss of each of them, 0-dim on the device; `loss`: that of the whole step, over all processes.
        """
        figures = [*losses, loss, norms.bad, norms.encoder, norms.predictor, norms.total]
        values, arrived = to_host(torch.stack([figure.detach().float() for figure in figures]))
        self._pending.append(Pending(step, list(slots), values, arrived))

    def check(self) -> bool:
        """Take in what has arrived, without waiting; whether the run is to be ended. `reason` says why then."""
        while self._pending and self._pending[0].arrived.query():
            self._take(self._pending.popleft())
        return self.reason is not None

    def wait(self) -> bool:
        """As `check`, after everything has arrived: before a checkpoint, and at the end."""
        while self._pending:
            self._pending[0].arrived.synchronize()
            self._take(self._pending.popleft())
        return self.reason is not None

    def diagnose(self, path: Path, norms: Mapping[str, float], more: Mapping[str, Any]) -> None:
        """Write what may explain it, as JSON: the last bad steps, the gradients that were not finite, and `more`.

        `norms`: the gradient norm of each parameter in the last bad step (`OptimizerPass.norms_of_bad_step`). A disk
        that is full is said.
        """
        content = {
            "reason": self.reason,
            "bad_steps": list(self.last),
            "parameters_not_finite": [name for name, norm in norms.items() if not math.isfinite(norm)],
            "gradient_norms": {name: _number(norm) for name, norm in norms.items()},
            **more,
        }
        try:
            write_atomically(path, json.dumps(content, indent=2))
        except OSError as error:
            self.say(f"warning: {path} cannot be written: {error}")

    def _take(self, done: Pending) -> None:
        """Count a step whose figures are here, and list it where it is bad."""
        figures = done.values.tolist()
        parts = len(done.slots)
        losses, (loss, bad, encoder, predictor, total) = figures[:parts], figures[parts:]
        if not bad:
            self.in_a_row = self.losses_in_a_row = 0
            return
        of_loss = not math.isfinite(loss)
        self.in_a_row += 1
        self.losses_in_a_row = self.losses_in_a_row + 1 if of_loss else 0
        # A loss that is finite here and not so as a whole was spoilt in another process, which names its videos.
        seen = [s for s, value in zip(done.slots, losses) if not of_loss or not math.isfinite(value)]
        samples = self.names([slot for slots in seen for slot in slots])
        entry = {
            "step": done.step,
            "not_finite": "loss" if of_loss else "gradient",
            "loss": _number(loss),
            "losses": [_number(value) for value in losses],
            "grad_norm": _number(total),
            "grad_norm_encoder": _number(encoder),
            "grad_norm_predictor": _number(predictor),
            "samples": samples,
        }
        self.last.append(entry)
        self._list(entry)
        # A loss scale that is too large is no news: the line of the log counts such steps.
        if samples and not (self.scaled and not of_loss):
            self._name(done.step, "loss is" if of_loss else "gradients are", samples)
        self._judge()

    def _list(self, entry: dict[str, Any]) -> None:
        try:
            with self.listed.open("a", encoding="utf-8") as out:
                out.write(json.dumps(entry) + "\n")
        except OSError as error:  # a full disk: the step is still counted and said
            self.say(f"warning: {self.listed} cannot be written: {error}")

    def _name(self, step: int, what: str, samples: list[str]) -> None:
        files = list(dict.fromkeys(samples))
        more = f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
        self.say(
            f"bad step   {step} changed nothing, as its {what} not finite; it saw {', '.join(files[:FILES_NAMED])}"
            f"{more} (listed in {self.listed})"
        )

    def _judge(self) -> None:
        if self.reason is not None:
            return
        if self.losses_in_a_row >= self.most:
            self.reason = f"the loss was not finite in {self.losses_in_a_row} steps in a row (optim.max_bad_steps)"
        elif self.in_a_row >= self.most_overflows:
            limit = "optim.max_bad_steps" if self.most_overflows == self.most else "float16 has found no loss scale"
            self.reason = f"loss or gradients were not finite in {self.in_a_row} steps in a row ({limit})"


def file_names(
    order: VideoOrder, paths: Sequence[str], clips_per_video: int, unusable: Callable[[str], bool]
) -> Callable[[Sequence[int]], list[str]]:
    """Gives the file of every clip slot: the video that was asked for, or what took the place of an unusable one."""

    def name(slot: int) -> str:
        video_slot = slot // clips_per_video
        video = order.video(video_slot)
        for attempt in range(RANDOM_REPLACEMENTS):
            if not unusable(paths[video]):
                break
            video = order.replacement(video_slot, attempt)
        return paths[video]

    return lambda slots: [name(slot) for slot in slots]


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite, and which of them it is may tell something."""
    return value if math.isfinite(value) else str(value)
