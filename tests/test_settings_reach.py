"""From a settings file to what the setting names: a value that gets lost on the way is a dead setting."""

import pytest

from fastjepa.build import build_dataset
from fastjepa.exits import Exit

COMPAT = {
    "compat.clip_after_warmup=5": lambda t: t.update.clip_from_step == 5,
    "compat.clip_per_network=true": lambda t: t.update.clip_per_network,
    "compat.ema_positions=true": lambda t: t.update.ema_positions,
    "compat.ipe_scale=1.25": lambda t: t.update.schedule.planned == 12,
    "compat.sdpa_ignores_scale=true": lambda t: t.jepa.encoder.blocks[0].attn.sdpa_ignores_scale,
    "model.qk_scale=0.3": lambda t: t.jepa.predictor.predictor_blocks[0].attn.scale == 0.3,
    "optim.clip_grad=2.5": lambda t: t.update.clip_grad == 2.5,
    "optim.betas=[0.8, 0.9]": lambda t: t.update.optimizer.param_groups[0]["betas"] == (0.8, 0.9),
    "optim.eps=1e-6": lambda t: t.update.optimizer.param_groups[0]["eps"] == 1e-6,
    "loss.exponent=2.0": lambda t: t.jepa.loss_exp == 2.0,
    "loss.reg_coeff=0.1": lambda t: t.jepa.reg_coeff == 0.1,
    "runtime.execution=reference": lambda t: t.jepa.execution == "reference",
    "data.clips_per_video=2": lambda t: len(build_dataset(t.settings, t.videos)[0].clips) == 2,
    # The second block's projection is divided by sqrt(4) unless the weights are drawn again.
    "compat.reinit=true": lambda t: t.jepa.encoder.blocks[2].attn.proj.weight.std().item() > 0.035,
    "compat.reinit=false": lambda t: t.jepa.encoder.blocks[2].attn.proj.weight.std().item() < 0.025,
}


@pytest.mark.parametrize("setting", COMPAT)
def test_settings_reach_what_they_name(run, monkeypatch, setting):
    from fastjepa.loop import Trainer

    seen = []

    def look(self):
        seen.append(self)
        return Exit.DONE

    monkeypatch.setattr(Trainer, "train", look)
    run(setting)
    assert COMPAT[setting](seen[0])
