"""Wrong settings: every mistake is one sentence that names its place, and never another error."""

import re
from typing import get_args

import pytest

from fastjepa import config
from fastjepa.config import MaskSet
from fastjepa.configfile import SettingsError, load

LEAVES = [key for key, _ in config.fields()] + [f"mask.sets.0.{key}" for key in MaskSet.model_fields]


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
def test_any_value_of_a_setting_is_taken_if_valid_and_refused_by_name_if_not(read_settings, refuse_settings, key):
    for value, valid_for in VALUES.items():
        if key in valid_for:
            beside = BESIDE.get(key, ())
            read_settings(yaml_of(key, value), *beside)
            read_settings("", f"{key}={value}", *beside)
            continue
        for mistakes, place in (
            (refuse_settings(yaml_of(key, value)), "run.yaml"),
            (refuse_settings("", f"{key}={value}"), "command line"),
        ):
            assert len(mistakes) == 1, mistakes
            assert re.match(rf"{place}: {re.escape(key)}(\.0)?: expected ", mistakes[0]), mistakes
            assert len(mistakes[0]) < 500


@pytest.mark.parametrize("key", LEAVES)
def test_a_misspelt_setting_is_refused_with_the_right_name(refuse_settings, key):
    wrong = f"{key}{key[-1]}"
    assert refuse_settings(yaml_of(wrong, 1)) == [f"run.yaml: unknown key {wrong}, nearest valid key: {key}"]
    assert refuse_settings("", f"{wrong}=1") == [f"command line: unknown key {wrong}, nearest valid key: {key}"]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("modle", "model"), ("optim.frames", "data.frames"), ("lr", "optim.lr"), ("mask.sets.7x.num_blocks", "mask.sets")],
)
def test_a_setting_in_the_wrong_place_is_refused_with_its_right_place(refuse_settings, wrong, nearest):
    assert refuse_settings("", f"{wrong}=1") == [f"command line: unknown key {wrong}, nearest valid key: {nearest}"]


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
def test_a_file_of_the_wrong_form_is_refused_in_one_sentence(refuse_settings, text, sentence):
    (mistake,) = refuse_settings(text)
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
def test_a_wrong_override_is_refused_in_one_sentence(refuse_settings, text, override, sentence):
    mistakes = refuse_settings(text, override)
    assert mistakes[0].startswith(sentence)
    assert len(mistakes) == (2 if text else 1)


def test_all_mistakes_are_listed_at_once_each_with_its_place(refuse_settings, tmp_path):
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
    assert refuse_settings(text, "optim.eps=0", "nonsense", "mask.sets.2.num_blocks=-1") == [
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
    ("own", "sentence"),
    [
        ("base: 3", "run.yaml: base: expected the name of a YAML file, given 3"),
        ("base: 0", "run.yaml: base: expected the name of a YAML file, given 0"),
        ("base: mask.yaml", "mask.yaml: mask.sets.0.aspect_ratio: expected 0 < low <= high, given [2, 1]"),
        ("base: bose.yaml", "bose.yaml: no such settings file, nearest: base.yaml"),
        ("base: run.yaml", "run.yaml: base: expected bases that come to an end, given run.yaml -> run.yaml"),
        (
            "base: loop.yaml",
            "run.yaml: base: expected bases that come to an end, given run.yaml -> loop.yaml -> run.yaml",
        ),
        ("base: base.yaml\noptim: {lr: 1.0}", "base.yaml: unknown key model.nam, nearest valid key: model.name"),
        ("base: base.yaml\nmodel: {nam: 3}", "run.yaml: unknown key model.nam, nearest valid key: model.name"),
    ],
)
def test_a_mistake_around_a_base_names_the_right_file(refuse_settings, tmp_path, own, sentence):
    (tmp_path / "base.yaml").write_text("model: {nam: vit_tiny}")
    (tmp_path / "loop.yaml").write_text("base: run.yaml")
    (tmp_path / "mask.yaml").write_text("mask: {sets: [{aspect_ratio: [2, 1]}]}")
    assert refuse_settings(own) == [sentence]


def test_a_base_may_have_a_base_of_its_own(read_settings, refuse_settings, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "first.yaml").write_text("model: {name: vit_tiny, predictor_depth: 3}\noptim: {lr: 0.5}")
    (tmp_path / "more" / "second.yaml").write_text("base: first.yaml\nmodel: {predictor_depth: 4}\ndata: {flip: true}")
    settings = read_settings("base: more/second.yaml\ndata: {frames: 8}")
    assert (settings.model.name, settings.model.predictor_depth, settings.optim.lr) == ("vit_tiny", 4, 0.5)
    assert (settings.data.flip, settings.data.frames) == (True, 8)
    (tmp_path / "more" / "first.yaml").write_text("model: {nam: vit_tiny}")
    assert refuse_settings("base: more/second.yaml") == [
        "more/first.yaml: unknown key model.nam, nearest valid key: model.name"
    ]
