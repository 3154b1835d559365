"""What a run keeps for a resume, and how it goes on from there."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from fastjepa import checkpoint, config
from fastjepa.config import Settings
from fastjepa.log import Log
from fastjepa.optim import OptimizerPass
from fastjepa.parallel import World
from fastjepa.runfolder import RunFolder

SAVES_THAT_MAY_FAIL = 3
MASK_TOKENS = "predictor.mask_tokens."
# AdamW's state of a weight.
SLOTS = ("step", "exp_avg", "exp_avg_sq")


def never_trained(found: checkpoint.Found, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Mask tokens that the run of this checkpoint did not train, by name: their moments begin at zero.

    `shapes` of all weights that are trained now, by name. Errors: ValueError where a moment is missing otherwise, or
    has another shape or precision; CheckpointError where the checkpoint cannot be read.
    """
    stored = checkpoint.entries(found)
    missing, problems = [], []
    for name, shape in shapes.items():
        if name.startswith(MASK_TOKENS) and not any(f"optim.{slot}.{name}" in stored for slot in SLOTS):
            missing.append(name)
            continue
        for slot in SLOTS:
            entry, wanted = f"optim.{slot}.{name}", () if slot == "step" else tuple(shape)
            if entry not in stored:
                problems.append(f"{entry} is missing")
            elif stored[entry] != (wanted, torch.float32):
                size, dtype = stored[entry]
                problems.append(f"{entry} is {dtype} {list(size)} instead of {torch.float32} {list(wanted)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"init.optimizer: expected false, or a run that trained the same weights, given {found.folder}: "
            f"{'; '.join(problems[:3])}{more}"
        )
    return missing


class Keeper:
    """Saves and restores weights, moments and counters; `data` is the fingerprint of the videos.

    A save goes on in a thread while the run does; as a context a keeper waits for the last one. Every method is called
    by all processes of the run. `saved_step` is that of the newest checkpoint that is known to be whole, -1 before
    there is one.
    """

    def __init__(
        self,
        settings: Settings,
        run: RunFolder,
        log: Log,
        world: World,
        update: OptimizerPass,
        scaler: torch.amp.GradScaler | None,
        data: str,
    ) -> None:
        self.settings, self.log, self.world = settings, log, world
        self.update, self.scaler, self.data = update, scaler, data
        self.root = run.checkpoints
        kept = settings.checkpoint
        self.saver = checkpoint.Saver(
            self.root, keep=kept.keep, keep_every=kept.keep_every, say=log.say, group=world.saving
        )
        self.saved_step = -1
        self.failed = 0
        self._begun = -1

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()

    def restore(self, begins_with: checkpoint.Found | None = None) -> int:
        """Continue from the newest intact checkpoint; returns the step to start with.

        `begins_with` is a checkpoint of another run, whose optimizer state this one takes where it has no checkpoint
        yet. Errors: CheckpointError.
        """
        found = checkpoint.newest(self.root, self.log.say, self.world.saving)
        if found is None:
            if begins_with is not None:
                self._take_optimizer(begins_with)
            self.log.rewind(0)
            return 0
        checkpoint.load(found, self.update.tensors(), self.world.saving)
        self.update.restored()
        self._restore_scaler(found)
        self.saved_step = found.step
        self.log.rewind(found.step)
        self.log.say(f"resumed    from {found.folder}, step {found.step}")
        return found.step

    def _take_optimizer(self, found: checkpoint.Found) -> None:
        """Moments and step counts, and the scale of the loss. How many steps were skipped is each run's own."""
        shapes = {weight.name: weight.parameter.shape for weight in self.update.weights}
        own = {"optim.skipped", "optim.skipped_in_a_row"}
        own |= {f"optim.{slot}.{name}" for name in never_trained(found, shapes) for slot in SLOTS}
        state = {name: tensor for name, tensor in self.update.state().items() if name not in own}
        checkpoint.load(found, state, self.world.saving, part=True)
        self._restore_scaler(found)
        self.log.say(f"optimizer  moments and step counts are those of {found.folder}, step {found.step}")

    def _restore_scaler(self, found: checkpoint.Found) -> None:
        scaler = found.trainer.get("scaler")
        if self.scaler is not None and scaler is not None:  # a run that went on in float16 has none yet
            self.scaler.load_state_dict(scaler)

    def save(self, step: int, *, wait: bool = False) -> None:
        """Begin to keep the state of this step, unless that was done; `wait` until it is on the disk.

        A failure is said and tried again at the next interval.
        """
        if step not in (self.saved_step, self._begun):
            self.settle()
            if self.hopeless:
                return
            trainer: dict[str, Any] = {
                "processes": self.world.size,
                "settings": config.flat(self.settings),
                "data": self.data,
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
            }
            self.saver.begin(step, self.update.tensors(), trainer)
            self._begun = step
        if wait:
            self.settle()

    def settle(self) -> None:
        """Wait for the save that is under way, if there is one."""
        self._take(self.saver.wait())

    def look(self) -> None:
        """Say of a save that has failed meanwhile. Several processes learn of it at the next save, all at once."""
        if self.world.size == 1:
            self._take(self.saver.finished())

    def _take(self, outcome: checkpoint.Outcome | None) -> None:
        if outcome is None:
            return
        self._begun = -1
        if outcome.error is None:
            self.failed, self.saved_step = 0, outcome.step
            return
        self.failed += 1
        self.log.say(f"warning: {outcome.error}; failed saves in a row: {self.failed}")

    @property
    def hopeless(self) -> bool:
        """Whether so many saves in a row have failed that going on would be for nothing."""
        return self.failed >= SAVES_THAT_MAY_FAIL
