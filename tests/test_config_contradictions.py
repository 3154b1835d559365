"""Settings that contradict each other: one sentence each, and none for what goes together."""

import pytest

from fastjepa import configfile
from fastjepa.config import Compat, Mask, Model, Settings, flat
from fastjepa.configchecks import NARROWEST_ROTARY, cross_checks
from fastjepa.models.rotary import axis_channels


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {steps: 100, warmup_steps: 101}", "optim.warmup_steps: expected at most optim.steps 100, given 101"),
        ("optim: {global_batch: 48}\ndata: {batch_size: 36}", "optim.global_batch: expected a multiple of data.batch_"),
        ("optim: {global_batch: 30}", "optim.global_batch: expected a multiple of mask.group 24, given 30"),
        ("data: {clips_per_video: 5}", "optim.global_batch: expected a multiple of data.clips_per_video 5, given 3072"),
        ("data: {clips_per_video: 4096}", "optim.global_batch: expected a multiple of data.clips_per_video 4096"),
        ("data: {clips_per_video: 2, batch_size: 3}", "data.batch_size: expected a multiple of data.clips_per_video 2"),
        (
            "data: {clips_per_video: 2}\noptim: {global_batch: 72}",
            "optim.global_batch: expected a multiple of mask.group 24 x data.clips_per_video 2, given 72",
        ),
        (
            "data: {fps: 6, stride: 2}",
            "data.stride: expected its default 4 beside data.fps, which takes its place, given 2",
        ),
        (
            "data: {fps: 6, duration: 2.5}",
            "data.fps: expected null beside data.duration, which says the same in seconds, given 6",
        ),
        *(
            (
                f"data: {{decoder: dali_{kind}, {key}: {value}}}",
                f"data.decoder: expected auto, pyav or torchcodec beside data.{key}, which works on whole frames in "
                f"the loader processes, given dali_{kind}",
            )
            for kind in ("gpu", "cpu")
            for key, value in (("motion_shift", "true"), ("auto_augment", "true"), ("erase", 0.5), ("cache_gb", 1.5))
        ),
        (
            "data: {duration: 2.0, stride: 2}",
            "data.stride: expected its default 4 beside data.duration, which takes its place, given 2",
        ),
        ("data: {frames: 15}", "data.frames: expected a multiple of data.tubelet 2, given 15"),
        ("data: {frames: 4, tubelet: 8}", "data.frames: expected at least one tubelet of 8 frames, given 4"),
        ("data: {crop: 100}", "data.crop: expected a multiple of data.patch 16, given 100"),
        ("data: {crop: 8}", "data.crop: expected a multiple of data.patch 16, given 8"),
        ("runtime: {stop_at: 90001}", "runtime.stop_at: expected at most optim.steps 90000, given 90001"),
        (
            "optim: {steps: 100, warmup_steps: 60, decay_steps: 50}",
            "optim.decay_steps: expected at most the 40 steps of optim.steps 100 after optim.warmup_steps 60, given 50",
        ),
        (
            "optim: {decay: constant, decay_steps: 50}",
            "optim.decay_steps: expected null with optim.decay constant, which has no decay, given 50",
        ),
        (
            "compat: {fps_whole_stride: true}",
            "compat.fps_whole_stride: expected false without data.fps, which it rounds, given true",
        ),
        (
            "mask: {sets: [{}, {full_complement: true, pred_full_complement: true}]}",
            "mask.sets.1.pred_full_complement: expected false beside full_complement, which also fills what cutting",
        ),
        (
            "mask: {sets: [{pred_full_complement: true, max_keep: 3}]}",
            "mask.sets.0.pred_full_complement: expected false beside max_keep, whose limit of the context it would",
        ),
        (
            "mask: {truncation: none, sets: [{pred_full_complement: true}]}",
            "mask.sets.0.pred_full_complement: expected false with mask.truncation none, which cuts nothing",
        ),
        (
            "mask: {truncation: none, sets: [{full_complement: true}]}",
            "mask.sets.0.full_complement: expected false with mask.truncation none, which cuts nothing",
        ),
        (
            "optim: {clip_grad: null}\ncompat: {clip_per_network: true}",
            "compat.clip_per_network: expected the default false with optim.clip_grad null, given true",
        ),
        (
            "optim: {clip_grad: null}\ncompat: {clip_after_warmup: 3}",
            "compat.clip_after_warmup: expected the default 0 with optim.clip_grad null, given 3",
        ),
        (
            "optim: {decay: constant, final_lr: 1e-3}",
            "optim.final_lr: expected the default 1e-06 with optim.decay constant, given 0.001",
        ),
        (
            "data: {sampling: replacement, shuffle_window: 7}",
            "data.shuffle_window: expected the default 1024 with data.sampling replacement, given 7",
        ),
        (
            "loss: {context_start: 5}",
            "loss.context_start: expected the default 0 with loss.context 0, given 5",
        ),
        ("init: {optimizer: true}", "init.optimizer: expected false without init.from, given true"),
        ("optim: {betas: [0.9, 1.0]}", "optim.betas: expected numbers from 0 to below 1, given 1.0 at place 2"),
        ("data: {scale: [0.5, 1.5]}", "data.scale: expected 0 < low <= high <= 1, given [0.5, 1.5]"),
        ("data: {scale: [0, 1]}", "data.scale: expected 0 < low <= high <= 1, given [0, 1]"),
        ("data: {aspect: [2.0, 1.0]}", "data.aspect: expected 0 < low <= high, given [2, 1]"),
        ("mask: {sets: [{}, {temporal_scale: [0.5, 0.4]}]}", "mask.sets.1.temporal_scale: expected 0 < low <= high <="),
        ("mask: {sets: [{spatial_scale: [0.5, 2]}]}", "mask.sets.0.spatial_scale: expected 0 < low <= high <= 1"),
        ("mask: {sets: [{aspect_ratio: [-1, 2]}]}", "mask.sets.0.aspect_ratio: expected 0 < low <= high, given"),
    ],
)  # fmt: skip
def test_a_contradiction_between_settings_is_refused(refuse_settings, text, sentence):
    (mistake,) = refuse_settings(text)
    assert mistake.startswith(f"run.yaml: {sentence}")


@pytest.mark.parametrize(
    "text",
    [
        "optim: {clip_grad: null}\ncompat: {clip_per_network: true}",
        "optim: {decay: constant, final_lr: 1e-3}",
        "data: {path: {a: {frames: 1, stride: 4}, b: 1}}",
    ],
)
def test_what_nothing_reads_is_taken_of_a_run_that_has_begun(refuse_settings, tmp_path, text):
    refuse_settings(text)
    settings = configfile.load(tmp_path / "run.yaml", stored=True)
    assert configfile.restore(flat(settings), "a checkpoint") == settings


def test_what_is_no_contradiction_is_accepted(read_settings):
    read_settings("optim: {steps: 100, warmup_steps: 100}\nruntime: {stop_at: 100}")
    read_settings("optim: {steps: 100, warmup_steps: 60, decay: linear, decay_steps: 40}")
    read_settings("init: {from: runs/one, optimizer: true}\nmodel: {name: vit_giant_xformers, predictor_heads: 12}")
    read_settings("model: {name: vit_giant_xformers, predictor_dim: 352}")
    read_settings("optim: {global_batch: 30}\nmask: {truncation: none}")
    read_settings("optim: {global_batch: 6}\ndata: {batch_size: 3, aspect: [0.5, 3.0], scale: [1.0, 1.0]}")
    read_settings("data: {frames: 8, tubelet: 8}\noptim: {betas: [0, 0]}")
    read_settings("data: {clips_per_video: 2, batch_size: 6}\noptim: {global_batch: 72}\nmask: {group: 12}")
    read_settings("data: {clips_per_video: 5, batch_size: 5}\noptim: {global_batch: 30}\nmask: {truncation: none}")
    read_settings("data: {duration: 2.0, stride: 4}")
    read_settings("data: {fps: 4}\ncompat: {fps_whole_stride: true}")
    read_settings("mask: {truncation: none, sets: [{full_complement: true, max_keep: 9, inv_block: true}]}")
    assert not list(cross_checks(Settings()))


@pytest.mark.parametrize(
    "text",
    ["optim: {steps: ten, warmup_steps: 99999999}", "optim: 3\nruntime: {stop_at: 91000}", "data: 3\nmask: {group: 3}"],
)
def test_a_wrong_setting_brings_no_sentence_about_its_combinations(refuse_settings, text):
    assert len(refuse_settings(text)) == 1


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {"noise": "linear"},
            "model.noise: expected the default published with model.targets mask_tokens, given linear",
        ),
        (
            {"targets": "noised", "zero_init_mask_tokens": False},
            "model.zero_init_mask_tokens: expected the default true with model.targets noised, given false",
        ),
        (
            {"positions": "rope_v2", "uniform_power": False},
            "model.uniform_power: expected the default true with model.positions rope_v2, given false",
        ),
        (
            {"positions": "rope", "predictor_dim": 8, "predictor_heads": 2},
            "model.predictor_dim: expected at least 6 channels for each of the 2 heads (model.predictor_heads) with "
            "model.positions rope, which turns pairs of them along three axes, given 8",
        ),
        (
            {"positions": "rope_v2", "predictor_dim": 64},
            "model.predictor_dim: expected at least 6 channels for each of the 16 heads (model.name) with "
            "model.positions rope_v2, which turns pairs of them along three axes, given 64",
        ),
        ({"positions": "rope", "predictor_dim": 12, "predictor_heads": 2}, None),
        ({"positions": "table", "predictor_dim": 8, "predictor_heads": 2, "uniform_power": False}, None),
        ({"targets": "noised", "noise": "linear"}, None),
        ({"zero_init_mask_tokens": False}, None),
    ],
)
def test_what_the_kind_of_target_or_of_positions_does_not_go_with_is_a_contradiction(model, sentence):
    found = [sentence for _, sentence in cross_checks(Settings(model=Model(**model)))]
    assert found == ([] if sentence is None else [sentence])


def test_the_narrowest_rotary_head_is_the_first_that_can_be_turned():
    assert [axis_channels(NARROWEST_ROTARY - 1), axis_channels(NARROWEST_ROTARY)] == [0, 2]


@pytest.mark.parametrize(
    ("model", "compat", "sentence"),
    [
        (
            {"positions": "rope"},
            "ema_positions",
            "compat.ema_positions: expected the default false with model.positions rope, given true",
        ),
        (
            {"targets": "noised"},
            "mask_token_by_length",
            "compat.mask_token_by_length: expected the default false with model.targets noised, given true",
        ),
        ({}, "ema_positions", None),
        ({"positions": "rope_v2"}, "mask_token_by_length", None),
    ],
)
def test_what_the_networks_do_not_read_is_a_contradiction(model, compat, sentence):
    settings = Settings(model=Model(**model), compat=Compat(**{compat: True}))
    assert [said for _, said in cross_checks(settings)] == ([] if sentence is None else [sentence])


def test_tubes_are_one_mask_set_and_choose_no_mask_token():
    settings = Settings(mask=Mask(kind="tube"), compat=Compat(mask_token_by_length=True))
    said = "compat.mask_token_by_length: expected the default false with mask.kind tube, given true"
    assert said in [sentence for _, sentence in cross_checks(settings)]
