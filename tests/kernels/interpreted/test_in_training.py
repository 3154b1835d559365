"""A few steps of training through the Triton kernels, interpreted: the losses of their plain form."""

from collections import Counter

import pytest
import torch

from fastjepa.fused import Fused
from fastjepa.noise import noise_draws
from fastjepa.optim import OptimizerPass
from fastjepa.schedules import Schedule
from tests.small_jepa import clips, make, masks

STEPS = 2


def train(impl: str, noised: bool, rotary: str | None = None) -> list[float]:
    """Noised targets with the kernels that compute products too, mask tokens with the others.

    With `rotary` positions there are clips of two lengths.
    """
    jepa = make(noised=noised, widths=(32, 48), rotary=rotary, operations=Fused(impl, with_product=noised)).float()
    schedule = Schedule(10, 2, 1e-2, 1e-3, 1e-4, 0.04, 0.4, 0.9, 1.0)
    update = OptimizerPass(jepa, schedule, clip_grad=0.1, kernels=impl)
    context, target = masks(2)
    video = clips(2).float()
    if rotary is not None:
        shorter = masks(1, frames=2)
        video, context, target = [video, clips(1, 2).float()], [context, shorter[0]], [target, shorter[1]]
    losses = []
    for step in range(STEPS):
        draws = None
        if noised:
            draws = noise_draws(0, range(2 * step, 2 * step + 2), target, 48, torch.device("cpu"), keyed=True)
        loss = jepa(video, context, target, draws).loss
        update.backward(loss)
        update.step(step, loss.detach())
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("noised", [False, True], ids=["mask_tokens", "noised"])
def test_a_few_steps_give_the_losses_of_the_plain_form(noised: bool, launches: Counter) -> None:
    expected = train("reference", noised)
    assert not launches
    assert train("triton", noised) == pytest.approx(expected, rel=1e-5)
    assert len(launches) >= 11, launches


@pytest.mark.parametrize("style", ["v2", "interleaved"])
def test_rotary_positions_give_the_losses_of_the_plain_form(style: str, launches: Counter) -> None:
    expected = train("reference", False, style)
    assert not launches
    assert train("triton", False, style) == pytest.approx(expected, rel=1e-5)
    assert {"ready_kernel", "back_kernel", "assemble_kernel"} <= set(launches), launches
