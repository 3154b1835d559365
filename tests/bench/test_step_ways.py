"""The ways of taking a step: what is measured are the published settings, on draws that all ways share."""

from types import SimpleNamespace

import pytest
import torch

from bench.step import ways
from bench.test_step import CASES, pair_of

CPU = torch.device("cpu")


def test_what_is_measured_are_the_published_settings_with_the_batch_of_one_gpu():
    for model, clips, crop in (("vitl", 24, 224), ("vith", 24, 224), ("vith_384", 10, 384)):
        found = {way: ways.settings_of(model, way, quick=False) for way in ways.WAYS}
        for s in found.values():
            assert (s.group, s.optim.global_batch, s.data.batch_size, s.data.crop) == (clips, clips, clips, crop)
            assert (s.model.predictor_depth, s.data.frames, s.optim.dtype) == (12, 16, "bfloat16")
            assert (s.optim.clip_grad, s.compat.clip_after_warmup) == (10.0, 0)
        assert found["packed"].runtime == type(found["packed"].runtime)()  # what a run has by default
        assert found["packed-triton"].runtime.kernels == "triton"
        fused = found["packed-fused"].runtime.kernels
        assert {fused["mlp"], fused["embed"]} == {"fused"}
        assert {name for piece, name in fused.items() if piece not in ("mlp", "embed")} == {"triton"}
        assert set(fused) == set(ways.PIECES)
        references = ("reference", "reference-compiled", "reference-noised")
        assert {found[way].runtime.execution for way in references} == {"reference"}
        assert [found[way].runtime.compile for way in (*references, "packed-eager")] == [False, True, False, False]
        noised = {way for way, s in found.items() if s.model.targets == "noised"}
        assert noised == {"packed-noised", "reference-noised"}


def test_the_second_generation_is_measured_as_published():
    for model, encoder in (("vjepa2_vitl", "vit_large"), ("vjepa2_vitg", "vit_giant_xformers")):
        for way in ways.WAYS:
            s = ways.settings_of(model, way, quick=False)
            assert (s.model.name, s.model.positions, s.model.predictor_heads) == (encoder, "rope_v2", 12)
            assert (s.group, s.optim.global_batch, s.data.batch_size, s.data.crop) == (24, 24, 24, 256)
            assert s.optim.clip_grad is None
            # Every block is computed again in the public code's way alone.
            assert bool(s.runtime.recompute) == (s.runtime.execution == "reference")
        assert ways.settings_of(model, "packed", quick=True).model.name == "vit_nano"


def test_every_way_is_beside_another_on_every_model():
    assert {way for pair in ways.PAIRS for way in pair} == set(ways.WAYS)
    assert {case.id for case in CASES} == {f"{m}-{a}-{b}" for m in ways.MODELS for a, b in ways.PAIRS}
    assert [case.values[0] for case in CASES[: len(ways.MODELS)]] == list(ways.MODELS), (
        "the first pair of all models comes first"
    )


def test_draws_differ_and_are_the_same_for_both_sides():
    batches = ways.prepare(ways.settings_of("vitl", "packed", quick=True), 50, CPU)
    seen = {tuple(draw.context[0].flatten().tolist()) for draw in batches.draws}
    assert len(seen) > 45
    clips, draw = batches.at(51)
    assert clips is batches.clips[1]
    assert draw is batches.draws[1]
    assert clips.dtype == torch.uint8


def test_noise_is_drawn_anew_for_every_step():
    runner = ways.Runner(ways.settings_of("vitl", "packed-noised", quick=True), CPU)
    batches = ways.prepare(runner.settings, 1, CPU)
    losses = []
    for _ in range(2):
        losses.append(runner.forward(batches).item())
        runner.losses.append(torch.zeros(()))  # a step later, with the same weights, masks and clips but for the noise
        batches.clips[1] = batches.clips[0]
    assert losses[0] != losses[1]


def test_a_way_that_cannot_compile_here_is_planned_all_the_same(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    settings = ways.settings_of("vitl", "reference-compiled", quick=True)
    assert ways.plan_of(settings, CPU).shape.compiled
    with pytest.raises(ValueError, match=r"runtime\.compile: expected auto or false on this machine"):
        ways.Runner(settings, CPU)


def test_whether_ways_fit_together_counts_every_state_and_the_largest_activations():
    held = [dict.fromkeys(ways.STATE, 2.0) | {"activations": a, "input clips": 1.0} for a in (5.0, 7.0)]
    plans = [SimpleNamespace(held=one, state_bytes=2.0 * len(ways.STATE)) for one in held]
    needed = 2 * 2.0 * len(ways.STATE) + 8.0
    assert ways.fit_together(plans, needed)
    assert not ways.fit_together(plans, needed - 1)
    plan = ways.plan_of(ways.settings_of("vith", "packed", quick=False), CPU)
    assert 4.5e12 < plan.flop_per_clip < 4.8e12  # 4.644 TFLOP by hand


def test_ways_that_do_not_fit_are_not_measured_in_turns(monkeypatch):
    monkeypatch.setattr("bench.test_step.usable_memory", lambda device: 1.0)
    assert not pair_of("vitl", "packed", "reference", CPU, quick=True).together
    monkeypatch.setattr("bench.test_step.usable_memory", lambda device: 1e12)
    pair = pair_of("vitl", "packed", "reference", CPU, quick=True)
    assert pair.together
    assert pair.same
    assert not pair_of("vitl", "packed-noised", "packed", CPU, quick=True).same
