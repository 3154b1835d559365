"""How the figures of a run went: the rows of metrics.jsonl and the probes, as panels.

Columns that a run does not have are left out; None is a gap.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from fastjepa.viz.palette import CONTEXT, GREY, LINES, TARGET, VERDICTS, as_svg, save, style

Rows = Sequence[Mapping[str, Any]]

# More points than a panel has pixels: neighbours become one, with the range of their values behind it.
MOST_POINTS = 300
COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One pair of axes: which columns it shows under which names, and what a person should look for."""

    title: str
    lines: Mapping[str, str]
    line_at: float | None = None
    logarithmic: bool = False
    share: bool = False
    low: float | None = None
    probe: str = ""  # the kind of probe whose accuracy it shows: its lines are tasks


PANELS = (
    Panel("loss over the best constant: below 1 it learns", {"loss_ratio": "loss ratio"}, line_at=1.0),
    Panel("loss (alone it tells little)", {"loss": "loss"}),
    Panel("content left in the targets", {"content": "content", "feature_std": "feature std"}, low=0),
    Panel("directions used (effective rank)", {"rank": "of tokens", "pooled_rank": "of whole clips"}, low=0),
    Panel("likeness of whole clips: 1 is all the same", {"pooled_cosine": "mean cosine"}, line_at=1.0),
    Panel("length of predictions over targets", {"norm_ratio": "norm ratio"}, line_at=1.0, low=0),
    Panel("distance of the target from the encoder", {"ema_distance": "relative distance"}, low=0),
    Panel(
        "gradient norms before clipping",
        {"grad_norm": "all", "grad_norm_encoder": "encoder", "grad_norm_predictor": "predictor"},
        logarithmic=True,
        low=0,
    ),
    Panel("learning rate", {"lr": "learning rate"}, low=0),
    Panel("momentum of the target encoder", {"momentum": "momentum"}),
    Panel("weight decay", {"weight_decay": "weight decay"}, low=0),
    Panel("clips a second", {"clips_per_s": "clips/s"}, low=0),
    Panel("share of the time that waits for data", {"data_wait": "data wait"}, share=True, low=0),
    Panel("share of the peak arithmetic (MFU)", {"mfu": "MFU"}, share=True, low=0),
    Panel("steps that were skipped", {"skipped": "skipped"}, low=0),
)
WELL = {"alive", "early", "unknown"}  # verdicts that need no mark
QUIET = {"skipped"}  # shown where there was any


def loss_curve(rows: Rows, path: Path) -> None:
    """Loss, loss against the trivial predictor, and effective rank over the steps of metrics.jsonl, as a PNG."""
    steps = [row["step"] for row in rows]
    with style():
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(steps, values_of(rows, "loss"), color=CONTEXT, lw=1.2, label="loss")
        left.plot(steps, values_of(rows, "loss_ratio"), color=TARGET, lw=1.2, label="loss / trivial predictor")
        left.axhline(1.0, color=GREY, lw=0.8, ls="--")
        left.set(xlabel="step", title="below the dashed line: more than the position is predicted")
        left.legend()
        right.plot(steps, values_of(rows, "rank"), color=CONTEXT, lw=1.2)
        right.set(xlabel="step", title="effective rank of the target features", ylim=(0, None))
        save(figure, path)


def curve_picture(rows: Rows, probes: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Every panel that has something to show, as one PNG. Errors: ValueError where none has."""
    drawn = _panels(rows, probes)
    if not drawn:
        raise ValueError("there is nothing to draw: no row has been logged, and nothing was probed")
    with style():
        height = math.ceil(len(drawn) / COLUMNS)
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
        figure = Figure(figsize=(3.9 * COLUMNS, 2.3 * height), layout=layout)
        axes = list(figure.subplots(height, COLUMNS, squeeze=False).flat)
        for ax, panel in zip(axes, drawn):
            _draw(ax, panel, rows, probes)
        for ax in axes[len(drawn) :]:
            ax.set_visible(False)
        save(figure, path)


def curve_svgs(rows: Rows, probes: Sequence[Mapping[str, Any]]) -> list[tuple[str, bytes]]:
    """(title, SVG) of every panel that has something to show."""
    found = []
    for panel in _panels(rows, probes):
        with style():
            figure = Figure(figsize=(3.5, 2.1), layout="constrained")
            _draw(figure.subplots(), panel, rows, probes)
            found.append((panel.title, as_svg(figure)))
    return found


def verdict_spans(rows: Rows) -> list[tuple[float, float, str]]:
    """(from step, to step, word) of the verdicts that the rows name, in order; empty for runs of before."""
    spans: list[tuple[float, float, str]] = []
    before = 0.0
    for row in rows:
        word = row.get("verdict")
        if isinstance(word, str):
            if spans and spans[-1][2] == word:
                spans[-1] = (spans[-1][0], row["step"], word)
            else:
                spans.append((before, row["step"], word))
        before = row["step"]
    return spans


def values_of(rows: Rows, key: str) -> list[float]:
    """A column as floats; NaN where it is absent or no number."""
    return [_number(row.get(key)) for row in rows]


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, ...]:
    """(steps, means, lowest, highest) of at most `most` neighbourhoods of a curve with NaN for gaps."""
    groups = [part for part in np.array_split(np.arange(len(steps)), min(most, len(steps))) if len(part)]
    found = []
    for group in groups:
        finite = values[group][np.isfinite(values[group])]
        figures = (finite.mean(), finite.min(), finite.max()) if len(finite) else (np.nan,) * 3
        found.append((steps[group].mean(), *figures))
    return tuple(np.array(found, dtype=float).reshape(-1, 4).T)


def _panels(rows: Rows, probes: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Those with something to show; accuracies, where features were probed more than once, behind the losses."""
    drawn = [panel for panel in PANELS if any(_has(rows, key) for key in panel.lines)]
    times = Counter(probe["probe"] for probe in probes if probe["results"])
    accuracies = [_probe_panel(kind, probes) for kind in sorted(times) if times[kind] > 1 or not drawn]
    losses = sum(panel in drawn for panel in PANELS[:2])
    return [*drawn[:losses], *accuracies, *drawn[losses:]]


def _probe_panel(kind: str, probes: Sequence[Mapping[str, Any]]) -> Panel:
    tasks = {result["task"] for probe in probes if probe["probe"] == kind for result in probe["results"]}
    return Panel(f"accuracy of the {kind} probe", {task: task for task in sorted(tasks)}, share=True, probe=kind)


def _has(rows: Rows, key: str) -> bool:
    found = [value for value in values_of(rows, key) if math.isfinite(value)]
    return any(found) if key in QUIET else bool(found)


def _draw(ax: Axes, panel: Panel, rows: Rows, probes: Sequence[Mapping[str, Any]]) -> None:
    if panel.probe:
        _accuracies(ax, panel, probes)
    else:
        steps = np.array([row["step"] for row in rows], dtype=float)
        for (key, name), colour in zip(panel.lines.items(), LINES):
            if not _has(rows, key):
                continue
            at, mean, low, high = thinned(steps, np.array(values_of(rows, key)))
            mark = "o" if np.isfinite(mean).sum() == 1 else None
            ax.plot(at, mean, color=colour, lw=1.3, marker=mark, ms=4, label=name)
            if len(at) < len(steps):
                ax.fill_between(at, low, high, color=colour, alpha=0.18, lw=0)
        for first, last, word in verdict_spans(rows):
            if word not in WELL:
                ax.axvspan(first, last, color=VERDICTS.get(word, GREY), alpha=0.1, lw=0)
        if len(panel.lines) > 1:
            ax.legend()
    if panel.line_at is not None:
        ax.axhline(panel.line_at, color=GREY, lw=0.8, ls="--", zorder=0)
    if panel.logarithmic and _decades([v for key in panel.lines for v in values_of(rows, key)]):
        ax.set_yscale("log")
    elif panel.low is not None:
        ax.set_ylim(panel.low, None)
    if panel.share:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set(xlabel="step", title=panel.title)
    ax.ticklabel_format(axis="x", style="plain")
    ax.margins(x=0.02)


def _decades(values: Sequence[float]) -> bool:
    """Whether values lie so far apart that their logarithms are easier to read."""
    finite = [value for value in values if math.isfinite(value)]
    return min(finite) > 0 and max(finite) > 20 * min(finite)


def _accuracies(ax: Axes, panel: Panel, probes: Sequence[Mapping[str, Any]]) -> None:
    """The trained encoder in full lines, the untrained one in dots."""
    of_kind = [probe for probe in probes if probe["probe"] == panel.probe]
    for task, colour in zip(panel.lines, cycle(LINES)):
        for key, dashes, label in (("trained", "-", task), ("untrained", ":", "_")):
            points = [
                (probe["step"], _number(result.get(key)))
                for probe in of_kind
                for result in probe["results"]
                if result["task"] == task
            ]
            ax.plot(*zip(*points), color=colour, lw=1.3, ls=dashes, marker="o", ms=3, label=label)
    ax.plot([], [], color=GREY, ls=":", label="untrained")
    ax.legend()
    ax.set_ylim(0, 1)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
