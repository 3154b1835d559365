"""From a settings file to what the setting names: a value that gets lost on the way is a dead setting."""

import pytest
import torch

from fastjepa.build import build_dataset, build_masks
from fastjepa.exits import Exit
from fastjepa.models.pos_embed import position_table
from fastjepa.models.predictor import signal_left

COMPAT = {
    "compat.clip_after_warmup=5": lambda t: t.update.clip_from_step == 5,
    "compat.clip_per_network=true": lambda t: t.update.clip_per_network,
    "compat.ema_positions=true": lambda t: t.update.ema_positions,
    "compat.ipe_scale=1.25": lambda t: t.update.schedule.planned == 12,
    "compat.mask_token_by_length=true": lambda t: (
        t.jepa.mask_token_by == "length" and [p.requires_grad for p in t.jepa.predictor.mask_tokens] == [True, False]
    ),
    "compat.mask_token_by_length=false": lambda t: (
        t.jepa.mask_token_by == "set" and all(p.requires_grad for p in t.jepa.predictor.mask_tokens)
    ),
    "optim.decay=linear": lambda t: t.update.schedule.decay == "linear",
    "optim.decay_steps=3": lambda t: t.update.schedule.decays_from == t.settings.optim.steps - 3,
    "compat.sdpa_ignores_scale=true": lambda t: t.jepa.encoder.blocks[0].attn.sdpa_ignores_scale,
    "model.qk_scale=0.3": lambda t: t.jepa.predictor.predictor_blocks[0].attn.scale == 0.3,
    "optim.clip_grad=2.5": lambda t: t.update.clip_grad == 2.5,
    "optim.betas=[0.8, 0.9]": lambda t: t.update.optimizer.param_groups[0]["betas"] == (0.8, 0.9),
    "optim.eps=1e-6": lambda t: t.update.optimizer.param_groups[0]["eps"] == 1e-6,
    "loss.exponent=2.0": lambda t: t.jepa.loss_exp == 2.0,
    "loss.reg_coeff=0.1": lambda t: t.jepa.reg_coeff == 0.1,
    "model.levels=deep": lambda t: t.jepa.encoder.levels == [0, 1, 2] and t.jepa.predictor.levels == 3,
    "loss.context=0.5": lambda t: t.jepa.dense and t.jepa.context_distance and t.jepa.levels == 1,
    "loss.context=0.5 and loss.context_distance=false": lambda t: not t.jepa.context_distance,
    "model.noise=linear and model.targets=noised": lambda t: torch.equal(
        t.jepa.predictor.signal_left, signal_left("linear").to(t.jepa.predictor.signal_left.dtype)
    ),
    "model.targets=noised": lambda t: torch.equal(
        t.jepa.predictor.signal_left, signal_left("published").to(t.jepa.predictor.signal_left.dtype)
    ),
    "model.zero_init_mask_tokens=false": lambda t: all(token.any() for token in t.jepa.predictor.mask_tokens),
    "model.zero_init_mask_tokens=true": lambda t: not any(token.any() for token in t.jepa.predictor.mask_tokens),
    "model.init_std=0.3": lambda t: 0.2 < t.jepa.encoder.blocks[0].mlp.fc1.weight.std().item() < 0.35,
    "model.drop_path=0.2": lambda t: [b.drop_path.rate for b in t.jepa.encoder.blocks] == [0.0, 0.1, 0.2],
    "runtime.execution=reference and runtime.recompute=2": lambda t: t.jepa.encoder.recomputed == 2,
    "model.predictor_heads=4": lambda t: t.jepa.predictor.predictor_blocks[0].attn.num_heads == 4,
    # Shared equally, time has its third of the channels; otherwise it has half of them.
    "model.uniform_power=false": lambda t: (
        not torch.equal(t.jepa.encoder.pos_embed, position_table(64, t.jepa.encoder.grid, True))
    ),
    "runtime.execution=reference": lambda t: t.jepa.execution == "reference",
    "data.clips_per_video=2": lambda t: len(build_dataset(t.settings, t.videos)[0].clips) == 2,
    "data.sampling=replacement": lambda t: build_dataset(t.settings, t.videos).plan.order.replaces,
    "data.shuffle_window=77": lambda t: build_dataset(t.settings, t.videos).plan.order.window == 77,
    "data.fps=6 and data.stride=4": lambda t: build_dataset(t.settings, t.videos).plan.shapes[0].fps == 6,
    "data.fps=6 and data.stride=4 and compat.fps_whole_stride=true": lambda t: (
        build_dataset(t.settings, t.videos).plan.shapes[0].whole_stride
        and build_dataset(t.settings, t.videos).reader.needs_rate == "compat.fps_whole_stride"
    ),
    "mask.sets.0.full_complement=true and mask.sets.1.inv_block=true": lambda t: (
        [(g.full_complement, g.pred_full_complement, g.inv_block) for g in build_masks(t.settings).generators]
        == [(True, False, False), (False, False, True)]
    ),
    "mask.sets.1.pred_full_complement=true": lambda t: (
        [g.pred_full_complement for g in build_masks(t.settings).generators] == [False, True]
    ),
    "data.frame_rate=12.5": lambda t: build_dataset(t.settings, t.videos).reader.frame_rate == 12.5,
    "data.antialias=true": lambda t: build_dataset(t.settings, t.videos).antialias,
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
    run(*setting.split(" and "))
    assert COMPAT[setting](seen[0])
