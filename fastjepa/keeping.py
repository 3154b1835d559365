"""What a run keeps for a resume, and how it goes on from there."""

from typing import Any

import torch

from fastjepa import checkpoint, config
from fastjepa.config import Settings
from fastjepa.log import Log
from fastjepa.optim import OptimizerPass
from fastjepa.parallel import World
from fastjepa.runfolder import RunFolder

SAVES_THAT_MAY_FAIL = 3


class Keeper:
    """Saves and restores weights, moments and counters; `data` is the fingerprint of the videos.

    `saved_step` is that of the newest checkpoint that is known to be good, -1 before there is one.
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
        self.settings, self.run, self.log, self.world = settings, run, log, world
        self.update, self.scaler, self.data = update, scaler, data
        self.saved_step = -1
        self.failed = 0

    def restore(self) -> int:
        """Continue from the newest intact checkpoint; returns the step to start with.

        Errors: CheckpointError.
        """
        found = checkpoint.newest(self.run.checkpoints, self.log.say)
        if found is None:
            self.log.rewind(0)
            return 0
        checkpoint.load(found, self.update.tensors())
        self.update.restored()
        scaler = found.trainer.get("scaler")
        if self.scaler is not None and scaler is not None:  # a run that went on in float16 has none yet
            self.scaler.load_state_dict(scaler)
        self.saved_step = found.step
        self.log.rewind(found.step)
        self.log.say(f"resumed    from {found.folder}, step {found.step}")
        return found.step

    def save(self, step: int, *, wait: bool = False) -> None:
        """Keep the state of this step, unless it is kept already.

        A failure is said and tried again at the next interval.
        """
        if step == self.saved_step:
            return
        trainer: dict[str, Any] = {
            "samples_seen": step * self.settings.optim.global_batch,
            "processes": self.world.size,
            "settings": config.flat(self.settings),
            "data": self.data,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        try:
            checkpoint.save(
                self.run.checkpoints, step, self.update.tensors(), trainer, self.settings.checkpoint.keep, self.log.say
            )
        except checkpoint.SaveFailed as error:
            self.failed += 1
            self.log.say(f"warning: {error}; failed saves in a row: {self.failed}")
            return
        self.failed, self.saved_step = 0, step

    @property
    def hopeless(self) -> bool:
        """Whether so many saves in a row have failed that going on would be for nothing."""
        return self.failed >= SAVES_THAT_MAY_FAIL
