"""Settings: what is accepted, what is refused, in which words, and what names a run."""

import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from fastjepa import config, configfile
from fastjepa.config import SECTIONS, Log, Mask, MaskSet, Model, Optim, Settings
from fastjepa.configfile import dump, help_text, load
from fastjepa.expectation import expectation

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
SET_KEYS = [f"mask.sets.0.{key}" for key in MaskSet.model_fields]
FIELDS = list(config.fields())
LEAVES = [key for key, _ in FIELDS] + SET_KEYS
EVERY = [*FIELDS, *((f"mask.sets.0.{k}", f) for k, f in MaskSet.model_fields.items())]


def another(value, field):
    """A valid value that differs."""
    if isinstance(value, bool):
        return not value
    if get_origin(field.annotation) is Literal:
        return next(v for v in get_args(field.annotation) if v != value)
    if value is None or value == "auto":
        if "text" in expectation(field):
            return "weights.pt"
        return 8 if field.annotation is not str else "cpu" if "cpu" in expectation(field) else "somewhere"
    if isinstance(value, int):
        return 2 * value + 2
    if isinstance(value, float):
        return value / 2 or 0.5
    if isinstance(value, tuple):
        return value[:1] if isinstance(value[0], MaskSet) else (value[0] * 0.9, value[1])
    return f"{value}2"


def one_changed(key, field):
    """Settings that differ from the defaults in one field."""
    head, _, leaf = key.rpartition(".")
    values = {"eval.probe": "none", "compat.ipe_scale": 1.5, "runtime.kernels": "triton", "runtime.compile": True}
    values["runtime.profile"] = "1..2"
    value = values[key] if key in values else another(field.default, field)
    return Settings(**({head: SECTIONS[head](**{leaf: value})} if head else {leaf: value}))


# -- the schema -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_recipe_loads(path):
    assert load(path) != Settings()


def test_the_recipe_of_vit_huge_is_that_of_vit_large_with_another_encoder():
    large = load(ROOT / "configs" / "vitl.yaml")
    assert load(ROOT / "configs" / "vith.yaml") == large.model_copy(
        update={"model": large.model.model_copy(update={"name": "vit_huge"})}
    )


@pytest.mark.parametrize(("key", "field"), EVERY, ids=LEAVES)
def test_every_setting_has_a_class_a_help_words_for_its_type_and_a_valid_default(key, field):
    assert config.resume_class(field) in ("fatal", "warn", "free")
    assert field.description
    assert expectation(field)
    assert not field.is_required()
    head, _, leaf = key.rpartition(".")
    plain = YAML(typ="safe", pure=True).load(dump(Settings()))
    for part in key.split("."):
        plain = plain[int(part) if part.isdigit() else part]
    content = {"sets": [{leaf: plain}]} if head.startswith("mask.sets") else {leaf: plain}
    kind = SECTIONS.get(head.partition(".")[0], Settings)
    assert kind.model_validate(content)


def test_classes_are_those_of_the_design():
    classes = {key: config.resume_class(field) for key, field in config.fields()}
    for key in ("data.workers", "data.decoder", "data.batch_size", "data.max_bad_fraction", "resume"):
        assert classes[key] == "free"
    for key, kind in classes.items():
        head = key.split(".")[0]
        if head in ("runtime", "log", "checkpoint", "eval"):
            assert kind == "free", key
        if head in ("model", "mask", "loss", "optim", "init") and key != "optim.max_bad_steps":
            assert kind == "fatal", key
    assert classes["optim.max_bad_steps"] == "free"  # whether a run goes on, not what it computes


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().optim.lr = 1.0


def test_a_group_larger_than_the_batch_becomes_the_batch(read_settings):
    settings = read_settings("mask: {group: 24}\noptim: {global_batch: 16}")
    assert (settings.mask.group, settings.group) == (24, 16)
    assert read_settings("optim: {global_batch: 48}").group == 24
    assert read_settings("optim: {global_batch: 48}\ndata: {clips_per_video: 4}").group == 12  # videos


def test_stop_at_ends_a_run_early(read_settings):
    assert read_settings("optim: {steps: 50, warmup_steps: 0}").last_step == 50
    assert read_settings("optim: {steps: 50, warmup_steps: 0}\nruntime: {stop_at: 20}").last_step == 20


def test_help_lists_every_setting_with_its_default_and_its_words():
    text = help_text()
    defaults = Settings().model_dump(mode="json", by_alias=True)
    for key, field in config.fields():
        line = next(line for line in text.splitlines() if line.startswith(f"  {key} = "))
        shown = YAML(typ="safe", pure=True).load(line.partition(" = ")[2])
        head, _, leaf = key.rpartition(".")
        assert shown == (defaults[head] if head else defaults)[leaf], key
        assert f"      {field.description}; expects {expectation(field)}\n" in f"{text}\n"
    for key, field in MaskSet.model_fields.items():
        assert f"        {key} = " in text
        assert field.description in text


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_is_dumped_loads_as_the_same_settings(read_settings, path):
    settings = load(path)
    assert read_settings(dump(settings)) == settings
    assert read_settings(dump(Settings())) == Settings()


text_that_yaml_may_take_for_something_else = st.sampled_from(
    [
        "null",
        "~",
        "1e-4",
        "yes",
        "a: b",
        "# x",
        "a #b",
        "0o17",
        "2024-01-02",
        "<<",
        "=",
        "a\nb",
        "- a",
        "*a",
        "&a",
        "!x",
    ]
)


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    text_that_yaml_may_take_for_something_else | st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
    st.floats(min_value=0, allow_nan=False, allow_infinity=False),
)
def test_any_text_and_any_number_survive_dump_and_load(tmp_path_factory, text, number):
    path = tmp_path_factory.getbasetemp() / "survivor.yaml"
    settings = Settings(log=Log(folder=text), optim=Optim(lr=number))
    path.write_text(dump(settings), encoding="utf-8")
    assert load(path) == settings


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_is_all_defaults(read_settings, text):
    assert read_settings(text) == Settings()


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.lr=3", "optim.lr", 3.0),
        ("optim.global_batch=48", "optim.global_batch", 48),
        ("optim.clip_grad=null", "optim.clip_grad", None),
        ("data.scale=[0.5, 1]", "data.scale", [0.5, 1.0]),
        ("data.flip=false", "data.flip", False),
        ("data.batch_size=auto", "data.batch_size", "auto"),
        ("data.path=synthetic://moving-shapes?videos=16&size=48", "data.path", "synthetic://moving-shapes?videos=16&size=48"),
        ("data.path=/videos/a b=c.csv", "data.path", "/videos/a b=c.csv"),
        ("log.folder='8'", "log.folder", "8"),
        ("resume=never", "resume", "never"),
    ],
)  # fmt: skip
def test_a_command_line_value_wins_over_the_file(read_settings, override, key, value):
    file = "optim: {lr: 0.5, global_batch: 24}\ndata: {flip: true}\nresume: auto"
    before, after = config.flat(read_settings(file)), config.flat(read_settings(file, override))
    assert after[key] == value
    assert {k for k, v in before.items() if v != after[k]} <= {key}


def test_one_value_of_one_mask_set_can_be_overridden(read_settings):
    file = "mask: {sets: [{num_blocks: 3, max_keep: 5}, {num_blocks: 4}]}"
    assert read_settings(file, "mask.sets.1.num_blocks=9").mask.sets == (
        MaskSet(num_blocks=3, max_keep=5),
        MaskSet(num_blocks=9),
    )
    assert read_settings(file, "mask.sets.0.max_keep=null").mask.sets[0].max_keep is None
    defaults = Mask().sets
    changed = read_settings("", "mask.sets.1.spatial_scale=[0.5, 0.6]").mask.sets
    assert changed == (defaults[0], defaults[1].model_copy(update={"spatial_scale": (0.5, 0.6)}))


def test_a_file_overrides_single_settings_of_its_base_which_lies_beside_it(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "base.yaml").write_text("model: {name: vit_tiny, predictor_dim: 64}\nresume: never")
    (folder / "own.yaml").write_text("base: base.yaml\nmodel: {predictor_dim: 36}\nloss: {exponent: 2.0}")
    monkeypatch.chdir(tmp_path)
    settings = load("recipes/own.yaml", ["model.predictor_depth=3"])
    assert settings.model == Model(name="vit_tiny", predictor_dim=36, predictor_depth=3)
    assert (settings.loss.exponent, settings.resume) == (2.0, "never")


# -- what names a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "field"), FIELDS, ids=[key for key, _ in FIELDS])
def test_the_identity_changes_with_fatal_settings_only(key, field):
    before, after = config.identity(Settings(), "data"), config.identity(one_changed(key, field), "data")
    assert (before != after) is (config.resume_class(field) == "fatal")


def test_the_identity_is_six_digits_of_settings_and_data_and_ignores_written_defaults(read_settings):
    name = config.identity(Settings(), "data")
    assert len(name) == 6
    assert int(name, 16) >= 0
    assert config.identity(Settings(), "other data") != name
    assert config.identity(read_settings(dump(Settings())), "data") == name
    assert config.identity(read_settings("optim: {lr: 625e-6, clip_grad: 10}"), "data") == name


@pytest.mark.parametrize("option", ["full_complement", "pred_full_complement", "inv_block"])
def test_options_of_mask_sets_that_are_off_leave_no_trace_in_what_names_a_run(read_settings, option):
    """Sets are hashed whole: runs with sets of their own from before these options keep their names."""
    own, on, off = (
        read_settings(f"mask: {{sets: [{{num_blocks: 3{more}}}]}}")
        for more in ("", f", {option}: true", f", {option}: false")
    )
    assert list(config.flat(own)["mask.sets"][0]) == [
        "num_blocks", "spatial_scale", "temporal_scale", "aspect_ratio", "max_temporal_keep", "max_keep"
    ]  # fmt: skip
    assert config.identity(off, "data") == config.identity(own, "data") != config.identity(on, "data")
    assert read_settings(dump(on)) == on


@pytest.mark.parametrize(("key", "field"), FIELDS, ids=[key for key, _ in FIELDS])
def test_a_changed_setting_is_told_under_its_class_with_both_values(key, field):
    old, new = config.flat(Settings()), config.flat(one_changed(key, field))
    kind = config.resume_class(field)
    assert config.changed(old, new, kind) == [f"{key}: {old[key]} -> {new[key]}"]
    assert config.changed({k: v for k, v in old.items() if k != key}, new, kind) == [f"{key}: {old[key]} -> {new[key]}"]
    assert config.changed({}, old, kind) == []  # a setting that the old run did not know had its default
    for other in {"fatal", "warn", "free"} - {kind}:
        assert config.changed(old, new, other) == []


# -- the command line -------------------------------------------------------------------------------------------------


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_wrong_settings_end_the_program_with_code_2_and_sentences_only(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("optim: {lr: -1}\nmodle: {}")
    done = python("-m", "fastjepa.train", str(path), "data.frames=15")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"{path}: optim.lr: expected a number (at least 0), given -1",
        f"{path}: unknown key modle, nearest valid key: model",
        "command line: data.frames: expected a multiple of data.tubelet 2, given 15",
    ]
    done = python("-m", "fastjepa.train")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{configfile.USAGE}\n{configfile.HINT}\n")


def test_settings_are_read_and_help_is_given_without_importing_torch(tmp_path):
    (tmp_path / "bad.yaml").write_text("optim: {lr: -1}")
    lines = [
        "import sys, fastjepa.train, fastjepa.configfile as c",
        f"for arguments in (['configs/vith.yaml'], ['--help'], [{str(tmp_path / 'bad.yaml')!r}]):",
        "    try: settings, name = c.from_command_line(arguments)",
        "    except SystemExit as end: print('exit', end.code)",
        "print(name, 'torch' in sys.modules)",
    ]
    done = python("-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{help_text()}\nexit 0\nexit 2\nvith False\n"
