"""What the health of a run is measured on: clips of one length, so that its figures can be compared over the run."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa import health
from fastjepa.config import Settings
from fastjepa.data.batches import Batch, MixedBatch
from fastjepa.health import Health
from fastjepa.jepa import JEPAOutput


class Looked(NamedTuple):
    """Of the clips of one length in one batch: target features [B, N, E], predictions [..., E], prediction error."""

    targets: Tensor
    predictions: Sequence[Tensor]
    loss_jepa: Tensor


class Looking:
    """Takes what the health of a step is measured on from its batches, as the weights were that computed its loss.

    Where all clips have one length that is the last batch. Of several it is the length that most clips have (see
    `Data.usual_length`), in the batch of the step with most of them: ranks and what is left in the features depend on
    the number of tokens, and images would be compared with videos.
    """

    def __init__(self, s: Settings, levels: int, device: torch.device) -> None:
        self._settings, self._levels, self._device = s, levels, device
        self._mixed, self._length = len(s.data.lengths) > 1, s.data.usual_length
        self._found: Looked | None = None

    def at(self, last: bool) -> bool:
        """Whether a batch is needed, which is the `last` of the step or not."""
        return last or self._mixed

    def take(self, batch: Batch | MixedBatch, out: JEPAOutput) -> None:
        """A batch and what came of it."""
        assert out.every_target is not None
        assert out.predictions is not None
        if isinstance(batch, Batch):
            self._found = Looked(out.every_target, out.predictions, out.loss_jepa)
            return
        assert out.losses_jepa is not None
        for group, *found in zip(batch.groups, out.every_target, out.predictions, out.losses_jepa):
            if group.clips.shape[2] == self._length and (
                self._found is None or len(group.slots) >= len(self._found.targets)
            ):
                self._found = Looked(*found)

    def measured(self) -> tuple[Health, Tensor | None]:
        """The health, and the prediction error beside its trivial loss where that is not the error of the whole step.

        If the step had no clip of the length, no figure is known.
        """
        if self._found is None:
            return health.unknown(self._device), None
        # One clip of each video: clips of the same one are too alike to tell what is trivial.
        targets = self._found.targets[:: self._settings.data.clips_per_video]
        exponent = self._settings.loss.exponent
        measured = health.measure(targets, self._found.predictions, exponent, self._levels)
        return measured, self._found.loss_jepa if self._mixed else None
