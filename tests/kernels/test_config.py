"""Pinned launch settings: which row is taken, what a user's folder may say, and which mistakes are sentences."""

import json
from pathlib import Path

import pytest
import torch

from fastjepa_kernels import config
from fastjepa_kernels.config import VARIABLE, Row, dump, forced, lookup, operations, parse

HERE = Path(config.__file__).parent / "configs"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of the user's, and nothing remembered from before or left behind."""
    caches = (config.rows, config._found, config._folder)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for one in caches:
        one.cache_clear()
    yield tmp_path
    for one in caches:
        one.cache_clear()


def row(architecture="sm_90", dtype="any", width=None, length=None, rows=7, **more):
    return Row(architecture, dtype, width, length, {"ROWS": rows, "num_warps": 4}, **more)


def write(folder, *rows, name="layer_norm"):
    (folder / f"{name}.json").write_text(dump(name, list(rows)))


@pytest.mark.parametrize("operation", operations())
def test_shipped_files_are_complete_sorted_and_end_in_rows_for_any_architecture(operation):
    text = (HERE / f"{operation}.json").read_text()
    table = parse(text, operation, operation)
    assert text == dump(operation, table)
    assert len({row.place for row in table}) == len(table)
    assert len({tuple(row.settings) for row in table}) == 1
    for width in (1, 24, 384, 1280, 8192):
        assert lookup(operation, width=width, length=1 << 40, dtype=torch.float16)


@pytest.mark.parametrize(
    ("width", "rows", "warps"),
    [(1, 32, 4), (64, 32, 4), (65, 16, 4), (384, 4, 4), (1000, 2, 4), (1280, 1, 4), (4096, 1, 8), (8192, 1, 16)],
)
def test_a_tile_of_a_norm_holds_two_thousand_values(width, rows, warps):
    assert lookup("layer_norm", width=width) == {"ROWS": rows, "num_warps": warps}


@pytest.mark.parametrize(
    ("architecture", "dtype", "width", "length", "rows"),
    [
        ("sm_90", "bf16", 384, 100, 1),  # every part as it stands
        ("sm_90", "bf16", 300, 50, 1),  # the next bucket above
        ("sm_90", "bf16", 384, 101, 2),  # beyond a length: the one without a limit
        ("sm_90", torch.bfloat16, 700, 100, 1),  # beyond all widths: the largest below, up to twice
        ("sm_90", "bf16", 191, 100, 16 // 2),  # too far away: the row of any architecture
        ("sm_90", "bf16", 769, 100, 2),
        ("sm_90", "fp32", 384, 100, 3),  # any dtype
        ("sm_90", torch.float64, 384, 100, 3),
        ("sm_80", "bf16", 384, 100, 4),  # another architecture: as shipped
        ("any", "bf16", 384, 100, 4),
    ],
)
def test_the_nearest_row_of_the_architecture_is_taken(folder, architecture, dtype, width, length, rows):
    write(folder, row(dtype="bf16", width=384, length=100, rows=1), row(dtype="bf16", width=384, rows=2),
          row(width=384, rows=3))  # fmt: skip
    assert lookup("layer_norm", architecture=architecture, dtype=dtype, width=width, length=length)["ROWS"] == rows


def test_rows_of_the_user_take_the_place_of_those_with_the_same_combination(folder):
    write(folder, row("any", width=512, rows=5))
    assert lookup("layer_norm", width=384)["ROWS"] == 5
    assert lookup("layer_norm", width=1024)["ROWS"] == 2
    assert len(config.rows("layer_norm")) == 8


def test_the_folder_is_read_once(folder):
    write(folder, row("any", width=512, rows=5))
    assert lookup("layer_norm", width=384)["ROWS"] == 5
    write(folder, row("any", width=512, rows=6))
    assert lookup("layer_norm", width=384)["ROWS"] == 5
    assert lookup("layer_norm", width=400)["ROWS"] == 5


def test_a_result_may_be_changed():
    lookup("layer_norm", width=384).clear()
    assert lookup("layer_norm", width=384)


def test_the_architecture_is_that_of_the_device(monkeypatch):
    config._capability.cache_clear()
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (10, 3))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    try:
        names = [config.architecture_of(torch.device(device)) for device in ("cpu", "cuda:1", "cuda:1")]
    finally:
        config._capability.cache_clear()
    assert names == ["any", "sm_100", "sm_100"]
    assert asked == [1]


def test_settings_can_be_forced_for_a_while():
    with forced("layer_norm", ROWS=3):
        with forced("layer_norm", num_warps=1):
            assert lookup("layer_norm", width=384) == {"ROWS": 3, "num_warps": 1}
        assert lookup("layer_norm", width=384) == {"ROWS": 3, "num_warps": 4}
    assert lookup("layer_norm", width=384) == {"ROWS": 4, "num_warps": 4}
    with pytest.raises(ValueError, match="layer_norm: expected some of the settings ROWS, num_warps, got LANES"):
        with forced("layer_norm", LANES=3):
            pass


def changed(**changes):
    content = json.loads(dump("layer_norm", [row()]))
    content["rows"][0].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("layer_norm", "{", "layer_norm.json: not JSON: "),
        ("layer_norm", "[]", "expected {"),
        ("layer_norm", '{"operation": "layer_norm", "rows": [], "help": ""}', "and no other key"),
        ("layer_norm", '{"operation": "rope", "rows": []}', "expected the operation layer_norm, got rope"),
        ("layer_norm", '{"operation": "layer_norm", "rows": [3]}', "row 1: expected the keys architecture, .*, got 3"),
        ("layer_norm", changed(warps=4), "row 1: expected the keys .*, got .*warps"),
        ("layer_norm", changed(architecture="h100"), "row 1: architecture must be any or like sm_90, got 'h100'"),
        ("layer_norm", changed(dtype="float32"), "dtype must be one of any, bf16, .*, got 'float32'"),
        ("layer_norm", changed(width=0), "width must be a whole number above 0 or null, got 0"),
        ("layer_norm", changed(length=True), "length must be .*, got True"),
        ("layer_norm", changed(settings={"ROWS": 1.5, "num_warps": 4}), "settings must be names with whole numbers"),
        ("layer_norm", changed(settings={"ROW": 1, "num_warps": 4}), "expected settings ROWS, num_warps, got ROW, num"),
        ("layer_norm", changed(source="guess"), "source must be one of measured, static, got 'guess'"),
        ("layer_norm", changed(source="measured"), "a measured row names its result file"),
        ("layernorm", "{}", "layernorm.json: no operation has this name; there are adamw_ema_, "),
    ],
)
def test_mistakes_in_the_folder_are_sentences(folder, name, text, words):
    (folder / f"{name}.json").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        lookup("layer_norm", width=384)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_mistakes_of_a_call_are_sentences(folder, monkeypatch):
    with pytest.raises(ValueError, match="rope: no such file of launch settings; there are adamw_ema_, "):
        lookup("rope", width=3)
    monkeypatch.setattr(config, "rows", lambda operation: (row(width=384),))
    with pytest.raises(ValueError, match="no launch settings for sm_80, bf16, width 7 and length 1, and none for any"):
        lookup("layer_norm", architecture="sm_80", dtype="bf16", width=7)


def test_a_folder_that_is_not_there_is_refused(folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(folder / "none"))
    with pytest.raises(ValueError, match=f"{VARIABLE}: expected a folder"):
        lookup("layer_norm", width=384)
