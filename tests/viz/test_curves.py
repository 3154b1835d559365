"""The curves show the columns that a run has, each value at its step."""

import matplotlib.axes
import numpy as np
import pytest
from PIL import Image

from fastjepa import viz
from fastjepa.viz.curves import thinned, verdict_spans

NULLS = {"loss": None, "loss_ratio": None, "rank": None}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("rows", [1, 5, 0], ids=["one row", "some nulls", "only nulls"])
def test_the_loss_curve_has_gaps_where_values_are_null(rows, tmp_path, monkeypatch):
    lines = []
    plot = matplotlib.axes.Axes.plot

    def watched(axes, x, y, **options):
        lines.append((list(x), list(y)))
        return plot(axes, x, y, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", watched)
    table = [{"step": 10 * n, "loss": n / 2, "loss_ratio": n / 3, "rank": n * 7.0} for n in range(1, rows + 1)]
    if rows != 1:
        table.insert(1, {"step": 15, **NULLS})
    path = tmp_path / "viz" / "loss.png"
    viz.loss_curve(table, path)
    assert [x for x, _ in lines] == [[row["step"] for row in table]] * 3
    for (_, y), key in zip(lines, NULLS):
        assert [None if np.isnan(value) else value for value in y] == [row[key] for row in table]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert 600 < picture.width < 2000
        assert 200 < picture.height < 1000
        assert np.asarray(picture.convert("L")).std() > 10


ROWS = [
    {"step": 10, "loss": 0.5, "loss_ratio": 1.0, "lr": 1e-3, "skipped": 0, "verdict": "early"},
    {"step": 20, "loss": 0.4, "loss_ratio": 0.9, "lr": 2e-3, "skipped": 0, "verdict": "collapsing", "content": 0.1},
    {"step": 30, "loss": 0.3, "loss_ratio": None, "lr": 1e-3, "skipped": 0, "verdict": "collapsing", "content": 0.2},
]
PROBES = [
    {"step": step, "probe": "knn", "results": [{"task": "motion", "trained": step / 50, "untrained": 0.1}]}
    for step in (15, 30)
]


def plotted(monkeypatch):
    lines = {}
    plot = matplotlib.axes.Axes.plot

    def watched(axes, x, y, **options):
        lines[options.get("label"), options.get("ls")] = list(x), list(y)
        return plot(axes, x, y, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", watched)
    return lines


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_columns_that_a_run_has_are_drawn_and_no_others(tmp_path, monkeypatch):
    lines = plotted(monkeypatch)
    viz.curve_picture(ROWS, PROBES, tmp_path / "viz" / "curves.png")
    assert {label for label, _ in lines} == {
        "motion",
        "_",
        "untrained",
        "loss",
        "loss ratio",
        "learning rate",
        "content",
    }
    assert lines["loss", None] == ([10, 20, 30], [0.5, 0.4, 0.3])
    steps, values = lines["content", None]
    assert (steps, values[1:], np.isnan(values[0])) == ([10, 20, 30], [0.1, 0.2], True)
    assert lines["motion", "-"] == ([15, 30], [0.3, 0.6])
    assert lines["_", ":"] == ([15, 30], [0.1, 0.1])
    with Image.open(tmp_path / "viz" / "curves.png") as picture:
        assert picture.width > 1000
    titles = [title for title, _ in viz.curve_svgs(ROWS, PROBES)]
    assert titles[2] == "accuracy of the knn probe"
    assert "accuracy of the knn probe" not in [title for title, _ in viz.curve_svgs(ROWS, PROBES[:1])]
    assert [title for title, _ in viz.curve_svgs([], PROBES[:1])] == ["accuracy of the knn probe"]
    assert len(titles) == 5
    assert "steps that were skipped" not in titles


def test_skipped_steps_are_drawn_where_there_were_any():
    rows = [{"step": 1, "skipped": 0}, {"step": 2, "skipped": 3}]
    assert [title for title, _ in viz.curve_svgs(rows, [])] == ["steps that were skipped"]


def test_nothing_to_draw_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no row has been logged"):
        viz.curve_picture([{"step": 1, "loss": None}], [], tmp_path / "curves.png")


def test_verdicts_span_the_steps_from_the_row_before():
    assert verdict_spans(ROWS) == [(0.0, 10, "early"), (10, 30, "collapsing")]
    assert verdict_spans([{"step": 1}]) == []


def test_long_runs_are_thinned_to_means_with_their_range():
    steps, values = np.arange(1000.0), np.tile([0.0, 2.0], 500)
    values[:10] = np.nan
    at, mean, low, high = thinned(steps, values, most=100)
    assert len(at) == 100
    assert np.isnan(mean[0])
    assert (set(mean[1:]), set(low[1:]), set(high[1:])) == ({1.0}, {0.0}, {2.0})
    assert np.allclose(at, np.arange(100) * 10 + 4.5)
    same = thinned(steps[:50], values[:50], most=100)
    assert np.array_equal(same[1], values[:50], equal_nan=True)
