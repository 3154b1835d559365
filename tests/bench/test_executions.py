"""The bench of the two executions: its file, its check before timing, its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*arguments):
    command = [sys.executable, "bench/executions.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("shape", ["64x3", "64x3-noised"])
def test_it_writes_the_ratios_and_what_they_come_from(tmp_path, shape):
    done = bench("--shapes", shape, "--repeats", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(next(tmp_path.glob("executions-*.json")).read_text())
    assert result["complete"]
    assert result["quick"]  # fewer steps than a figure needs
    rows = {row["name"]: row for row in result["rows"]}
    for name in ("reference", "reference, public optimizer path"):
        ratio = rows[f"speed of packed over {name}"]
        assert ratio["value"] == pytest.approx(rows[f"step {name}"]["value"] / rows["step packed"]["value"])
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert 0 < rows["largest gradient difference"]["value"] < 1e-4
    assert f"{rows['step packed']['value']:.4g} ms" in done.stdout


def test_executions_that_differ_are_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import executions

    real = executions.build

    def tampered(shape, execution):
        jepa = real(shape, execution)
        if execution == "packed":
            jepa.predictor.predictor_proj.bias.data += 1e-3
        return jepa

    monkeypatch.setattr(executions, "build", tampered)
    with pytest.raises(SystemExit, match="64x3: the executions differ"):
        executions.largest_difference("64x3")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--shapes", "65x3"), "--shapes: expected some of 64x3, 64x3-noised, 192x12, given 65x3"),
        (("--repeats", 0), "--repeats: expected at least 1, given 0"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments, sentence, tmp_path):
    done = bench(*arguments, "--out", tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
