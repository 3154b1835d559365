"""The random draws of the noised predictor, each a pure function of what it is for.

The noise of a row depends on (seed, slot, mask set, token), the noise step of a clip on (seed, slot, mask set): how a
step is divided into batches, groups or ranks changes nothing, and kernels can make the noise where they need it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjepa.masks import Ragged, TokenSet
from fastjepa.models.predictor import NOISE_STEPS, Draw, RowNoise
from fastjepa.streams import Purpose, torch_seed
from fastjepa_kernels import philox_normal, row_keys
from fastjepa_kernels.noise import TOKEN_BITS
from fastjepa_kernels.reference.philox import philox_words

# A token number that no clip has: the stream of a clip's noise step.
_STEP = 2**TOKEN_BITS - 1


def noise_seed(seed: int, device: torch.device) -> Tensor:
    """The seed of all noise of a run on the device, 0-dim: a fill, not a copy, so that the host waits for nothing."""
    return torch.full((), torch_seed(seed, Purpose.NOISE), device=device)


def noise_draws(
    seed: int | Tensor,
    slots: Sequence[int],
    masks_target: Sequence[TokenSet],
    width: int,
    device: torch.device,
    *,
    keyed: bool = False,
) -> list[Draw]:
    """(timesteps int64 [B], noise float32 [B, Kt, P]) a mask set, or [R, P] rows where lengths differ, on the device.

    `width` P is that of the predictor. `seed` is that of the run, or what `noise_seed` made of it: clips of several
    lengths, whose draws are made a length at a time, share one where they go through one kernel. `keyed` gives, in
    place of the noise, the `RowNoise` that a kernel makes the same numbers from. Source: Philox-4x32-10 (Random123),
    see `fastjepa_kernels.philox_normal`.
    """
    words = seed if isinstance(seed, Tensor) else noise_seed(seed, device)
    slot = _on_device(list(slots), device)
    draws: list[Draw] = []
    for number, token_set in enumerate(masks_target):
        steps = philox_words(row_keys(slot, _STEP, number), 1, words)[..., 0].flatten() % NOISE_STEPS
        if isinstance(token_set, Ragged):
            lengths = _on_device(list(token_set.lengths), device)
            of_row = slot.repeat_interleave(lengths, output_size=sum(token_set.lengths))
            keys = row_keys(of_row, token_set.index, number)
        else:
            keys = row_keys(slot.unsqueeze(1), token_set, number)
        draws.append((steps, RowNoise(keys, words) if keyed else philox_normal(keys, width, words)))
    return draws


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Host numbers as int64 on the device, from page-locked memory where it is a GPU."""
    made = torch.tensor(numbers)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
