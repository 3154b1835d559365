"""Saves that go on while the run does: a snapshot in the step, the writing in a thread."""

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastjepa.checkpoint.errors import SaveFailed
from fastjepa.checkpoint.snapshot import Snapshot
from fastjepa.checkpoint.write import Say, why, write


@dataclass(frozen=True)
class Outcome:
    """How a save ended: `error` is the sentence of why it failed, None where the checkpoint is committed."""

    step: int
    error: str | None


class Saver:
    """Writes checkpoints in a thread, one at a time; as a context it waits for the last one at its end.

    It keeps a copy of the state in host memory, once and for good (see `Snapshot`). `keep`, `keep_every` and `group`
    are those of `save`. What a save has to say is said when its outcome is taken, in the caller's thread.

    With several processes all of them call `begin` and `wait` in the same order, and only what these two return is the
    same everywhere at the same time: decide on that. What `finished` returns is the same too, but not when. The group
    is the saver's own, for the thread's collectives run at any time.
    """

    def __init__(
        self, root: Path, *, keep: int, keep_every: int, say: Say, group: dist.ProcessGroup | None = None
    ) -> None:
        self.root, self.keep, self.keep_every, self.say, self.group = root, keep, keep_every, say, group
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._said: list[str] = []
        self._outcome: Outcome | None = None
        self._bug: BaseException | None = None

    def begin(self, step: int, tensors: dict[str, Tensor], trainer: dict[str, Any]) -> Outcome | None:
        """Save the state as it is now; what happens to it later does not matter. Returns once it is copied.

        On a CUDA device it does not wait for the copy: later work of the current stream does. It waits for the save
        before, if that has not ended, and returns its outcome where nobody has taken it. `trainer` is plain JSON.
        """
        before = self.wait()
        trainer = json.loads(json.dumps(trainer))
        refused = None
        try:
            self._snapshot.take(tensors)
        except (MemoryError, RuntimeError) as error:
            # The others' threads wait for this process: it says in its own what is wrong.
            refused = SaveFailed(why(step, self.root, f"no host memory for a copy of the state ({error})"))
        # Not a daemon: an interpreter that ends waits until the checkpoint is whole.
        self._thread = threading.Thread(
            target=self._run, args=(step, tensors, trainer, refused), name=f"save of step {step}"
        )
        self._thread.start()
        return before

    def finished(self) -> Outcome | None:
        """The outcome of a save that has ended since the last call; None where there is none. Does not wait."""
        if self._thread is not None and self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Outcome | None:
        """The outcome of the save that is under way, after its end, or of one that nobody has taken; else None.

        Errors: whatever else than a failure to write has ended the save.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        for line in self._said:
            self.say(line)
        bug, outcome = self._bug, self._outcome
        self._said, self._bug, self._outcome = [], None, None
        if bug is not None:
            raise bug
        return outcome

    def _run(self, step: int, tensors: dict[str, Tensor], trainer: dict[str, Any], refused: SaveFailed | None) -> None:
        def values() -> dict[str, Tensor]:
            if refused is not None:
                raise refused
            return self._snapshot.parts()

        try:
            if self._snapshot.device is not None:
                # A thread begins on the first device, where another process may be at work.
                torch.cuda.set_device(self._snapshot.device)
            write(
                self.root,
                step,
                tensors,
                trainer,
                keep=self.keep,
                keep_every=self.keep_every,
                say=self._said.append,
                group=self.group,
                values=values,
            )
            self._outcome = Outcome(step, None)
        except SaveFailed as error:
            self._outcome = Outcome(step, str(error))
        except BaseException as error:  # noqa: BLE001
            self._bug = error  # raised again by whoever takes the outcome

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome = self.wait()
        if outcome is not None and outcome.error is not None:
            self.say(f"warning: {outcome.error}")
