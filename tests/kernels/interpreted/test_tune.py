"""`tune` as a whole, with a clock that is made up: the fastest setting wins unless its result is wrong."""

import json

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from fastjepa_kernels import config
from fastjepa_kernels.__main__ import main
from fastjepa_kernels._triton import catalogue
from fastjepa_kernels._triton import norms as kernels
from fastjepa_kernels.testing.cases import CASES, case_of, fresh, results, yardstick

SETTINGS = [{"ROWS": 1, "num_warps": 4}, {"ROWS": 2, "num_warps": 4}, {"ROWS": 8, "num_warps": 4}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_exact(case, dtype):
    inputs = case.make(case.shapes["small"], torch.device("cpu"), dtype)
    yardstick(case, inputs, dtype)(results(case, case.ours(), fresh(case, inputs), dtype))


@pytest.mark.parametrize("operation", config.operations())
def test_every_pinned_setting_reaches_a_launch(operation, monkeypatch):
    case = case_of(operation)
    inputs = case.make(case.shapes["small"], torch.device("cpu"), torch.float32)
    launches = []

    def note(kernel, *arguments, grid, warmup, **constants):
        """Instead of running: what is launched, apart from the tensors."""
        numbers = [value for value in arguments if not isinstance(value, torch.Tensor)]
        launches.append((kernel.fn.__name__, grid, numbers, constants))

    def launched(**settings):
        launches.clear()
        with config.forced(operation, **settings):
            results(case, case.ours(), fresh(case, inputs), torch.float32)
        return list(launches)

    monkeypatch.setattr(InterpretedFunction, "run", note)
    for setting, value in config.lookup(operation, width=96, length=66).items():
        assert any(launched(**{setting: other}) != launched() for other in (1, 2, 2 * value)), setting


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's; few candidates, of which the one with 8 rows gives wrong results."""
    caches = (config.rows, config._found, config._folder)
    for one in caches:
        one.cache_clear()
    monkeypatch.setenv(config.VARIABLE, str(tmp_path))
    monkeypatch.setattr(catalogue, "candidates", lambda operation, width: SETTINGS)
    real = kernels.layer_norm

    def wrong_for_eight_rows(*arguments):
        out, *statistics = real(*arguments)
        return (out * (1.01 if config.lookup("layer_norm", width=96)["ROWS"] == 8 else 1.0), *statistics)

    monkeypatch.setattr(kernels, "layer_norm", wrong_for_eight_rows)
    yield tmp_path
    for one in caches:
        one.cache_clear()


def run(folder, *more):
    """With a clock by which more rows are faster; the first call of each setting is slow, as it is compiled there."""
    seen, out = set(), folder / "layer_norm.json"

    def clock(call):
        call()
        rows = config.lookup("layer_norm", width=96)["ROWS"]
        warm = rows in seen
        seen.add(rows)
        return 1.0 / rows if warm else 100.0

    return main(["tune", "--operation", "layer_norm", "--rounds", "2", "--out", str(out), "--dtypes", "fp32", *more],
                clock=clock), out  # fmt: skip


def test_the_fastest_right_setting_wins_and_is_looked_up(folder, capsys):
    with config.forced("layer_norm", ROWS=1):
        code, out = run(folder, "--shapes", "rows=33,width=96")
    said = capsys.readouterr().out
    assert code == 0
    assert "{'ROWS': 8, 'num_warps': 4} is refused: distance to float64" in said
    (row,) = config.parse(out.read_text(), "layer_norm", "here")
    assert (row.place, row.settings) == (("any", "fp32", 96, 33), {"ROWS": 2, "num_warps": 4})
    assert (row.source, row.result) == ("measured", "layer_norm.timings.json")
    assert set(row.measured) == {"gpu", "torch", "triton", "date", "shape", "median_ms", "p20_ms", "p80_ms", "rounds"}
    assert [row.measured[key] for key in ("median_ms", "p20_ms", "p80_ms", "rounds")] == [0.5, 0.5, 0.5, 2]
    assert row.measured["shape"] == {"rows": 33, "width": 96}
    (timing,) = json.loads((folder / "layer_norm.timings.json").read_text())
    assert [one["settings"]["ROWS"] for one in timing["candidates"]] == [1, 2]
    config.rows.cache_clear()
    config._found.cache_clear()
    assert config.lookup("layer_norm", dtype=torch.float32, width=96, length=33) == row.settings
    assert config.lookup("layer_norm", dtype=torch.float16, width=96, length=33) == {"ROWS": 16, "num_warps": 4}


def test_further_rows_join_those_that_are_there(folder):
    for shape in ("rows=33,width=96", "rows=7,width=24", "rows=33,width=96"):
        code, out = run(folder, "--shapes", shape)
        assert code == 0
    assert [row.width for row in config.parse(out.read_text(), "layer_norm", "here")] == [24, 96]
    assert len(json.loads((folder / "layer_norm.timings.json").read_text())) == 3


def test_nothing_is_written_where_no_setting_is_right(folder, capsys, monkeypatch):
    monkeypatch.setattr(catalogue, "candidates", lambda operation, width: SETTINGS[-1:])
    (folder / "layer_norm.json").write_text(
        config.dump("layer_norm", [config.Row("any", "any", 96, None, SETTINGS[-1])])
    )
    before = (folder / "layer_norm.json").read_text()
    code, out = run(folder, "--shapes", "rows=33,width=96")
    assert code == 2
    assert "layer_norm: none of the 1 candidates is exact enough for" in capsys.readouterr().err
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--shapes", "rows:33"), "--shapes: expected numbers such as rows=13440,width=1280, got rows:33"),
        (("--shapes", "rows=33"), "layer_norm: a shape has rows, width, got rows"),
        (("--dtypes", "float32"), "--dtypes: expected some of bf16, fp16, fp32, got float32"),
    ],
)
def test_mistakes_are_one_sentence(folder, capsys, more, words):
    assert run(folder, *more)[0] == 2
    assert capsys.readouterr().err == f"tune: {words}\n"
