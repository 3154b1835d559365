"""Wrong settings: every mistake is one sentence that names its place, and never another error."""

import re
from typing import get_args

import pytest

from fastjepa import config
from fastjepa.config import Compat, Mask, MaskSet, Model, Settings
from fastjepa.configchecks import NARROWEST_ROTARY, cross_checks
from fastjepa.configfile import SettingsError, load
from fastjepa.models.rotary import axis_channels

LEAVES = [key for key, _ in config.fields()] + [f"mask.sets.0.{key}" for key in MaskSet.model_fields]


@pytest.fixture
def read(tmp_path):
    """Settings from a YAML text and overrides."""

    def go(text="", *overrides):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return load(tmp_path / "run.yaml", list(overrides))

    return go


@pytest.fixture
def refuse(read, tmp_path):
    """The sentences for a wrong YAML text or override, without the path of its folder."""

    def go(text="", *overrides):
        with pytest.raises(SettingsError) as caught:
            read(text, *overrides)
        mistakes = caught.value.mistakes
        assert str(caught.value) == "\n".join(mistakes)
        assert mistakes
        assert len(set(mistakes)) == len(mistakes)
        assert not any("\n" in mistake for mistake in mistakes)
        return [mistake.replace(f"{tmp_path}/", "") for mistake in mistakes]

    return go


def yaml_of(key, value):
    """YAML text that sets one leaf."""
    *heads, leaf = key.split(".")
    inner = f"{{{leaf}: {value}}}"
    if heads[:2] == ["mask", "sets"]:
        return f"mask: {{sets: [{inner}]}}"
    return f"{heads[0]}: {inner}" if heads else f"{leaf}: {value}"


# -- refusals ---------------------------------------------------------------------------------------------------------

# The only leaves that take a text of any kind, null, or 2.5.
TEXT = {"data.path", "eval.data", "eval.test", "init.from", "log.folder", "resume"}
NULL = {
    "model.predictor_heads",
    "model.qk_scale",
    "optim.clip_grad",
    "optim.decay_steps",
    "runtime.stop_at",
    "runtime.threads",
}
NULL |= {
    "mask.sets.0.max_keep",
    "eval.data",
    "eval.test",
    "runtime.profile",
    "runtime.watchdog_minutes",
    "init.from",
    "data.duration",
    "data.fps",
    "data.frame_rate",
}
LARGE = {
    f"optim.{key}" for key in ("lr", "start_lr", "final_lr", "weight_decay", "final_weight_decay", "clip_grad", "eps")
}
LARGE |= {"data.fps", "data.frame_rate"}
LARGE |= {
    "model.qk_scale",
    "data.cache_gb",
    "data.duration",
    "data.decode_seconds",
    "runtime.watchdog_minutes",
    "loss.exponent",
    "loss.reg_coeff",
    "loss.context",
    "compat.ipe_scale",
}
# What a setting is of use with only.
BESIDE = {
    "compat.fps_whole_stride": ("data.fps=4",),
    "accept_changes": ("resume=runs/one",),
    "init.optimizer": ("init.from=runs/one",),
}
BOOL = {key for key, field in config.fields() if isinstance(field.default, bool) or bool in get_args(field.annotation)}
BOOL |= {f"mask.sets.0.{key}" for key in ("full_complement", "pred_full_complement", "inv_block")}
VALUES = {
    "null": NULL,
    "[7]": set(),
    "{a: 1}": {"data.path"},
    "{a: 0}": set(),
    "elephant": TEXT,
    "true": BOOL,
    ".nan": set(),
    ".inf": set(),
    "-3": set(),
    "2.5": LARGE,
    "'8'": TEXT,
    "'1e-4'": TEXT,
    "x" * 20_000: TEXT,
}  # fmt: skip


@pytest.mark.parametrize("key", LEAVES)
def test_any_value_of_a_setting_is_taken_if_valid_and_refused_by_name_if_not(read, refuse, key):
    for value, valid_for in VALUES.items():
        if key in valid_for:
            beside = BESIDE.get(key, ())
            read(yaml_of(key, value), *beside)
            read("", f"{key}={value}", *beside)
            continue
        for mistakes, place in (
            (refuse(yaml_of(key, value)), "run.yaml"),
            (refuse("", f"{key}={value}"), "command line"),
        ):
            assert len(mistakes) == 1, mistakes
            assert re.match(rf"{place}: {re.escape(key)}(\.0)?: expected ", mistakes[0]), mistakes
            assert len(mistakes[0]) < 500


@pytest.mark.parametrize("key", LEAVES)
def test_a_misspelt_setting_is_refused_with_the_right_name(refuse, key):
    wrong = f"{key}{key[-1]}"
    assert refuse(yaml_of(wrong, 1)) == [f"run.yaml: unknown key {wrong}, nearest valid key: {key}"]
    assert refuse("", f"{wrong}=1") == [f"command line: unknown key {wrong}, nearest valid key: {key}"]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("modle", "model"), ("optim.frames", "data.frames"), ("lr", "optim.lr"), ("mask.sets.7x.num_blocks", "mask.sets")],
)
def test_a_setting_in_the_wrong_place_is_refused_with_its_right_place(refuse, wrong, nearest):
    assert refuse("", f"{wrong}=1") == [f"command line: unknown key {wrong}, nearest valid key: {nearest}"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- model", "run.yaml: expected a mapping of settings, given a list"),
        ("hello", "run.yaml: expected a mapping of settings, given a str"),
        ("model: {name: vit_tiny, name: vit_huge}", 'run.yaml: line 1: not valid YAML: found duplicate key "name"'),
        ("loss:\n  exponent: 1.0\nloss:\n", 'run.yaml: line 3: not valid YAML: found duplicate key "loss"'),
        ("a: [1,\nb: 2", "run.yaml: line 2: not valid YAML: "),
        ("model:\n\tname: vit_tiny", "run.yaml: line 2: not valid YAML: "),
        ("a: 1\n---\nb: 2", "run.yaml: line 2: not valid YAML: "),
        ("a: *unknown", "run.yaml: line 1: not valid YAML: "),
        ("a: \x00", "run.yaml: not valid YAML: "),
        ("a: " + "[" * 5000, "run.yaml: not valid YAML: a value cannot be read: "),
        ("data: {path: !!python/object/apply:os.system [ls]}", "run.yaml: line 1: not valid YAML: could not determine"),
        ("log: {folder: 2024-02-30}", "run.yaml: not valid YAML: a value cannot be read: day is out of range"),
        ("optim: {steps: !!int ten}", "run.yaml: not valid YAML: a value cannot be read: "),
        ("data: {flip: !!bool perhaps}", "run.yaml: not valid YAML: a value cannot be read: "),
        ("model: vit_tiny", "run.yaml: model: expected a group of settings, given 'vit_tiny'"),
        ("model:", "run.yaml: model: expected a group of settings, given null"),
        ("model: [name]", "run.yaml: model: expected a group of settings, given ['name']"),
        ("model: &m {name: *m}", "run.yaml: model.name: expected one of vit_nano, "),
        ("1: 2", "run.yaml: unknown key 1"),
        ("model: {1: 2}", "run.yaml: unknown key model.1"),
        ("mask: {sets: [{1: 2}]}", "run.yaml: unknown key mask.sets.0.1"),
        ("mask: {sets: []}", "run.yaml: mask.sets: expected a list of mask sets, at least one, given []"),
        ("mask: {sets: [{}, 3]}", "run.yaml: mask.sets.1: expected a group of settings, given 3"),
    ],
)
def test_a_file_of_the_wrong_form_is_refused_in_one_sentence(refuse, text, sentence):
    (mistake,) = refuse(text)
    assert mistake.startswith(sentence)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "demo.yaml").write_text("")
    (tmp_path / "latin.yaml").write_bytes(b"log: {folder: \xff}")
    for name, words in (
        ("dmo.yaml", f"no such settings file, nearest: {tmp_path}/demo.yaml"),
        ("latin.yaml", "cannot"),
    ):
        with pytest.raises(SettingsError) as caught:
            load(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {words}")
    for name in ("other/file.yaml", "", "demo.yaml/inside"):
        with pytest.raises(SettingsError, match="no such settings file"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "override", "sentence"),
    [
        ("", "optim.lr", "command line: expected key=value, given 'optim.lr'"),
        ("", "=5", "command line: expected key=value, given '=5'"),
        ("", "modle.name=vit_tiny", "command line: unknown key modle, nearest valid key: model"),
        (
            "",
            "data.batch_size=36",
            "command line: optim.global_batch: expected a multiple of data.batch_size 36, given",
        ),
        ("", "optim.lr=[", "command line: optim.lr: not a valid YAML value: '['"),
        ("", "optim.lr=!!int x", "command line: optim.lr: not a valid YAML value: '!!int x'"),
        ("", "optim.steps=", "command line: optim.steps: expected a whole number (at least 1), given ''"),
        ("", "mask.sets.2.num_blocks=3", "command line: mask.sets.2: expected mask.sets.0.KEY to mask.sets.1.KEY"),
        ("", "mask.sets.0=3", "command line: mask.sets.0: expected mask.sets.0.KEY to mask.sets.1.KEY"),
        ("", "mask.sets.².num_blocks=3", "command line: unknown key mask.sets.².num_blocks"),
        ("mask: 3", "mask.sets.0.num_blocks=3", "command line: mask.sets.0.num_blocks: mask is not a group of"),
        ("mask: {sets: 3}", "mask.sets.0.num_blocks=3", "command line: mask.sets.0: mask.sets is not a list of"),
        ("mask: {sets: [3]}", "mask.sets.0.num_blocks=3", "command line: mask.sets.0: expected mask.sets.0.KEY to"),
        ("model: 3", "model.name=vit_tiny", "command line: model.name: model is not a group of settings in the file"),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(refuse, text, override, sentence):
    mistakes = refuse(text, override)
    assert mistakes[0].startswith(sentence)
    assert len(mistakes) == (2 if text else 1)


def test_all_mistakes_are_listed_at_once_each_with_its_place(refuse, tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {steps: 10, warmup_steps: 20, lr: fast}\nmodel: {init_std: 7.0}")
    text = """
base: base.yaml
modle: {name: vit_tiny}
model: {predictor_dim: 33}
data: {decoder: dayli, batch_size: 0, frames: 15, crop: 100, scale: [1.0, 0.5]}
mask:
  sets:
    - {num_blocks: x, spatial_scale: [0.9, 0.1], spatial_scales: 3}
    - 7
    - {aspect_ratio: [2.0, 1.0], max_keep: 0}
eval: 3
"""
    assert refuse(text, "optim.eps=0", "nonsense", "mask.sets.2.num_blocks=-1") == [
        "command line: expected key=value, given 'nonsense'",
        "base.yaml: optim.lr: expected a number (at least 0), given 'fast'",
        "command line: optim.eps: expected a number (above 0), given 0",
        "run.yaml: model.predictor_dim: expected a whole number (at least 2, a multiple of 2), given 33",
        "base.yaml: model.init_std: expected a number (above 0, at most 1), given 7.0",
        "run.yaml: unknown key modle, nearest valid key: model",
        "run.yaml: data.batch_size: expected auto or a whole number (at least 1), given 0",
        "run.yaml: data.decoder: expected one of auto, pyav, torchcodec, dali_gpu, dali_cpu, given 'dayli'",
        "run.yaml: mask.sets.0.num_blocks: expected a whole number (at least 1), given 'x'",
        "run.yaml: unknown key mask.sets.0.spatial_scales, nearest valid key: mask.sets.0.spatial_scale",
        "run.yaml: mask.sets.1: expected a group of settings, given 7",
        "command line: mask.sets.2.num_blocks: expected a whole number (at least 1), given -1",
        "run.yaml: mask.sets.2.max_keep: expected a whole number (at least 1) or null, given 0",
        "run.yaml: eval: expected a group of settings, given 3",
        "run.yaml: data.frames: expected a multiple of data.tubelet 2, given 15",
        "run.yaml: data.crop: expected a multiple of data.patch 16, given 100",
        "base.yaml: optim.warmup_steps: expected at most optim.steps 10, given 20",
        "run.yaml: data.scale: expected 0 < low <= high <= 1, given [1, 0.5]",
        "run.yaml: mask.sets.0.spatial_scale: expected 0 < low <= high <= 1, given [0.9, 0.1]",
        "run.yaml: mask.sets.2.aspect_ratio: expected 0 < low <= high, given [2, 1]",
    ]


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
def test_a_contradiction_between_settings_is_refused(refuse, text, sentence):
    (mistake,) = refuse(text)
    assert mistake.startswith(f"run.yaml: {sentence}")


def test_what_is_no_contradiction_is_accepted(read):
    read("optim: {steps: 100, warmup_steps: 100}\nruntime: {stop_at: 100}")
    read("optim: {steps: 100, warmup_steps: 60, decay: linear, decay_steps: 40}")
    read("init: {from: runs/one, optimizer: true}\nmodel: {name: vit_giant_xformers, predictor_heads: 12}")
    read("model: {name: vit_giant_xformers, predictor_dim: 352}")
    read("optim: {global_batch: 30}\nmask: {truncation: none}")
    read("optim: {global_batch: 6}\ndata: {batch_size: 3, aspect: [0.5, 3.0], scale: [1.0, 1.0]}")
    read("data: {frames: 8, tubelet: 8}\noptim: {betas: [0, 0]}")
    read("data: {clips_per_video: 2, batch_size: 6}\noptim: {global_batch: 72}\nmask: {group: 12}")
    read("data: {clips_per_video: 5, batch_size: 5}\noptim: {global_batch: 30}\nmask: {truncation: none}")
    read("data: {duration: 2.0, stride: 4}")
    read("data: {fps: 4}\ncompat: {fps_whole_stride: true}")
    read("mask: {truncation: none, sets: [{full_complement: true, max_keep: 9, inv_block: true}]}")
    assert not list(cross_checks(Settings()))


@pytest.mark.parametrize(
    "text",
    ["optim: {steps: ten, warmup_steps: 99999999}", "optim: 3\nruntime: {stop_at: 91000}", "data: 3\nmask: {group: 3}"],
)
def test_a_wrong_setting_brings_no_sentence_about_its_combinations(refuse, text):
    assert len(refuse(text)) == 1


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ("base: 3", "run.yaml: base: expected the name of a YAML file, given 3"),
        ("base: 0", "run.yaml: base: expected the name of a YAML file, given 0"),
        ("base: mask.yaml", "mask.yaml: mask.sets.0.aspect_ratio: expected 0 < low <= high, given [2, 1]"),
        ("base: bose.yaml", "bose.yaml: no such settings file, nearest: base.yaml"),
        ("base: run.yaml", "run.yaml: base: a base file cannot name a base of its own"),
        ("base: base.yaml\noptim: {lr: 1.0}", "base.yaml: unknown key model.nam, nearest valid key: model.name"),
        ("base: base.yaml\nmodel: {nam: 3}", "run.yaml: unknown key model.nam, nearest valid key: model.name"),
    ],
)
def test_a_mistake_around_a_base_names_the_right_file(refuse, tmp_path, own, sentence):
    (tmp_path / "base.yaml").write_text("model: {nam: vit_tiny}")
    (tmp_path / "mask.yaml").write_text("mask: {sets: [{aspect_ratio: [2, 1]}]}")
    assert refuse(own) == [sentence]


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
