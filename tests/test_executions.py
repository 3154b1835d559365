"""The packed and the reference execution over 200 steps of the demo: the same training, within rounding."""

import functools
from pathlib import Path

import pytest
import torch

from fastjepa import configfile, parallel
from fastjepa.build import build_dataset, build_jepa, build_masks, build_optimizer_pass
from fastjepa.data.loader import make_loader, running
from fastjepa.data.source import open_videos
from fastjepa.noise import noise_draws

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
CPU = torch.device("cpu")
STEPS, CLIPS = 200, 4
# The demo on fewer videos and with fewer clips a step: bfloat16 is slow on a CPU.
FEWER = (
    "data.path=synthetic://moving-shapes?videos=64&size=48&frames=10", "data.workers=0", "runtime.device=cpu",
    f"optim.global_batch={CLIPS}", f"data.batch_size={CLIPS}", f"mask.group={CLIPS}",
)  # fmt: skip
NOISED = ("model.targets=noised", "model.noise=linear")


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """What the loader gives for the 200 steps."""
    s = configfile.load(DEMO, FEWER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        videos = open_videos(s.data.path, s.optim.seed, lambda done, total: None)
        loader = make_loader(
            build_dataset(s, videos), build_masks(s), first_step=0, last_step=STEPS, global_batch=CLIPS,
            batch_size=CLIPS, workers=0, pin_memory=False, tokens=build_jepa(s).encoder.num_patches,
        )  # fmt: skip
        with running(loader) as iterator:
            return list(iterator)


@pytest.fixture(scope="module")
def losses(batches):
    """A function that trains and gives the loss of every step, float64 [200]; each way of training runs once."""

    @functools.cache
    def train(execution, dtype, *overrides):
        rounded = "bfloat16" if dtype == "bfloat16" else "float32"
        s = configfile.load(DEMO, [*FEWER, f"runtime.execution={execution}", f"optim.dtype={rounded}", *overrides])
        weights = torch.float64 if dtype == "float64" else torch.float32
        jepa = build_jepa(s).to(weights)
        update = build_optimizer_pass(s, jepa, None)
        values = []
        for step, batch in enumerate(batches):
            draws = None
            if s.model.targets == "noised":
                pairs = noise_draws(s.optim.seed, batch.slots, batch.masks_target, s.model.predictor_dim, CPU)
                draws = [(timesteps, noise.to(weights)) for timesteps, noise in pairs]
            with parallel.autocast(CPU, rounded):
                out = jepa(batch.clips, batch.masks_context, batch.masks_target, draws, union=batch.union)
                loss = out.loss
            update.backward(loss)
            update.step(step, loss.detach())
            values.append(loss.item())
        return torch.tensor(values, dtype=torch.float64)

    return train


@pytest.mark.parametrize("path", [(), NOISED], ids=["mask_tokens", "noised"])
def test_both_executions_train_alike_for_200_steps(losses, path):
    """In float64, because training multiplies rounding differences by ten thousands over so many steps."""
    packed, reference = (losses(execution, "float64", *path) for execution in ("packed", "reference"))
    assert reference[-20:].mean() < 0.95 * reference[:20].mean()  # it does train
    torch.testing.assert_close(packed, reference, rtol=1e-10, atol=0)


def test_in_bfloat16_packed_stays_as_near_to_full_precision_as_the_reference(losses):
    """Against float64: a float32 run is itself as far from it at the end as a bfloat16 one."""
    exact = losses("reference", "float64")
    packed, reference = ((losses(e, "bfloat16") - exact).abs() for e in ("packed", "reference"))
    for steps in (50, STEPS):
        assert 0 < packed[:steps].mean() <= 2 * reference[:steps].mean()
