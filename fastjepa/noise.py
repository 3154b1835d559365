"""The random draws of the noised predictor: a stream a clip, so how a step is divided into batches changes nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjepa.masks import Ragged, TokenSet
from fastjepa.models.predictor import NOISE_STEPS
from fastjepa.streams import Purpose, torch_seed


def noise_draws(
    seed: int, slots: Sequence[int], masks_target: Sequence[TokenSet], width: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """(timesteps int64 [B], noise float32 [B, Kt, P]) a mask set, or [R, P] rows where lengths differ, on the device.

    `width` P is that of the predictor. A pure function of (seed, slot, mask set, Kt) and the kind of device.
    """
    generator = torch.Generator(device)
    draws = []
    for number, token_set in enumerate(masks_target):
        ragged = isinstance(token_set, Ragged)
        lengths = token_set.lengths if isinstance(token_set, Ragged) else (token_set.shape[1],) * len(token_set)
        steps, noise = [], []
        for slot, length in zip(slots, lengths, strict=True):
            generator.manual_seed(torch_seed(seed, Purpose.NOISE, slot, number))
            steps.append(torch.randint(NOISE_STEPS, (1,), generator=generator, device=device))
            noise.append(torch.randn(length, width, generator=generator, device=device))
        draws.append((torch.cat(steps), torch.cat(noise) if ragged else torch.stack(noise)))
    return draws
