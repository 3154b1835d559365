"""The pictures of result files: the same bytes for the same files, with the same versions of matplotlib and Pillow.

Each function draws the files of one device, or answers None where they have nothing to draw. Colours are those of Okabe
and Ito, which the colour-blind tell apart.
"""

import io
from collections.abc import Callable, Collection, Sequence

import matplotlib
import PIL
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.files import Row
from bench.report import cells
from bench.report.stored import Stored
from bench.report.tables import MODELS, along, beside_first, pairs, seen

BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442",
)  # fmt: skip
GREY, INK = "#999999", "#222222"
DARK = (BLUE, GREEN, RED)  # white letters can be read on these, dark ones on the others
DPI = 160  # twice what a page shows: 8 inches wide
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "text.color": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "figure.constrained_layout.use": True,
}  # fmt: skip
PARTS = {
    "target": BLUE, "context": SKY, "predictor": GREEN, "loss": ORANGE, "optimizer": PURPLE, "patch embed": RED,
}  # fmt: skip
KINDS = {"linear": BLUE, "attention": GREEN, "elementwise": ORANGE, "casts": PURPLE}
TICKS = (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of ratios
SHORT = {"reference": "public code's way", "packed": "packed"}
Plot = Callable[[Sequence[Stored]], Figure | None]
WAYS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY)


def software() -> str:
    """What a picture was drawn with: another version may draw other pixels."""
    return f"matplotlib {matplotlib.__version__}, Pillow {PIL.__version__}"


def png(plot: Plot, files: Sequence[Stored]) -> bytes | None:
    """A picture as the bytes of a PNG, without a date, whatever the user's settings of matplotlib are."""
    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = plot(files)
        if figure is None:
            return None
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": software()})
    return buffer.getvalue()


def where(files: Sequence[Stored]) -> str:
    """Device and day, for a title."""
    return f"{files[0].place or 'counted, on any machine'}, {max(one.date for one in files)[:10]}"


def census(files: Sequence[Stored]) -> Figure | None:
    """GB of both executions of each model, by part of the step and by kind of work."""
    rows = [row for row in files[0].named("bytes") if "component" in row["parameters"]]
    if not rows:
        return None
    models = list(dict.fromkeys(row["parameters"]["model"] for row in rows))
    bars = [(model, execution) for model in models for execution in SHORT]
    longest = max(row["value"] for row in rows if row["parameters"]["component"] == "total")
    figure = Figure(figsize=(8, 0.75 + 0.66 * len(bars)))
    panels = figure.subplots(2, 1, sharex=True)
    for axes, title, colours, part in ((panels[0], "by part", PARTS, 0), (panels[1], "by kind of work", KINDS, 2)):
        for place, bar in enumerate(bars):
            sizes = dict.fromkeys(colours, 0.0)
            for row in rows:
                p = row["parameters"]
                if (p["model"], p["execution"]) == bar and p["component"] != "total":
                    sizes[p["component"].rpartition(" ")[part]] += row["value"]
            _stack(axes, place, sizes, colours, longest / 28)
        axes.set_yticks(range(len(bars)), [f"{MODELS.get(model, model)}, {SHORT[way]}" for model, way in bars])
        axes.set_title(title, loc="left")
        axes.invert_yaxis()
        axes.tick_params(left=False)
        axes.margins(x=0.08)
        _key(axes, colours)
    panels[1].set_xlabel("GB read and written by one step of 24 clips")
    figure.suptitle(f"Memory traffic of a training step ({where(files)})", fontsize=10.5)
    return figure


def _stack(axes: Axes, place: int, sizes: dict[str, float], colours: dict[str, str], narrow: float) -> None:
    """One bar; pieces of at most `narrow` GB are narrower than their number."""
    left = 0.0
    for name, size in sizes.items():
        axes.barh(place, size, left=left, color=colours[name], edgecolor="white", linewidth=0.6, height=0.72)
        if size > narrow:
            ink = "white" if colours[name] in DARK else INK
            axes.text(left + size / 2, place, f"{size:.0f}", ha="center", va="center", color=ink)
        left += size
    axes.text(left + 0.3 * narrow, place, f"{left:.0f} GB", va="center")


def _key(axes: Axes, colours: dict[str, str]) -> None:
    """The names of colours, in them, above the panel on the right."""
    handles = [axes.barh(0, 0, color=colour) for colour in colours.values()]
    axes.legend(
        handles, list(colours), loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(colours), frameon=False,
        borderpad=0, borderaxespad=0.2, handlelength=0.9, handletextpad=0.4, columnspacing=1.2,
    )  # fmt: skip


def executions(files: Sequence[Stored]) -> Figure | None:
    """The ratio of both executions, a line a model and baseline, with its spread."""
    rows = [row for row in files[0].figures() if row["unit"] == "x"]
    if not rows:
        return None
    figure = Figure(figsize=(8, 0.9 + 0.3 * len(rows)))
    axes = figure.subplots()
    labels = [f"{row['parameters']['shape']}, over {row['name'].partition(' over ')[2]}" for row in rows]
    _dots(axes, rows, labels, [ORANGE if "public" in row["name"] else BLUE for row in rows])
    axes.axvline(1.0, color=GREY, lw=1, ls="--")
    axes.set_xlim(left=min(0.95, axes.get_xlim()[0]))
    axes.set_xlabel("times the speed of the baseline, whole step on one thread (1: as fast)")
    figure.suptitle(f"The packed execution of tiny models ({where(files)})", fontsize=10.5)
    return figure


def _dots(axes: Axes, rows: Sequence[Row], labels: Sequence[str], colours: Sequence[str]) -> None:
    """Values with their spread, a line each, the first at the top, its figure beside it."""
    for place, (row, colour) in enumerate(zip(rows, colours)):
        low, high = cells.spread(row) or (row["value"], row["value"])
        axes.plot([low, high], [place, place], color=colour, lw=2.2, solid_capstyle="butt", alpha=0.55)
        axes.plot(row["value"], place, "o", color=colour, ms=5)
        text = cells.figure(row["value"], row["unit"])
        axes.annotate(text, (high, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(left=False)
    axes.margins(x=0.12)


def data(files: Sequence[Stored]) -> Figure | None:
    """Rates that a user sees, a bar a row, a panel for what is measured at the same points."""
    rows = [row for row in seen(files[0].figures()) if row["unit"].endswith("/s")]
    groups = cells.by_parameters(rows)
    if not groups:
        return None
    heights = [len(group) + 1.5 for group in groups]
    figure = Figure(figsize=(8, 0.5 + 0.19 * sum(heights)))
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, group in zip(panels, groups):
        _bars(axes, group, _labels(group), group[0]["unit"], _by_name(group))
    figure.suptitle(f"Decoding and loading ({where(files)})", fontsize=10.5)
    return figure


def _labels(rows: Sequence[Row]) -> list[str]:
    """Name and the parameters that vary among rows of this name."""
    labels = []
    for row in rows:
        same = [one["parameters"] for one in rows if one["name"] == row["name"]]
        varying = [
            f"{key} {cells.word(value)}" if isinstance(value, int | float) else cells.word(value)
            for key, value in row["parameters"].items()
            if len({cells.word(one.get(key)) for one in same}) > 1
        ]
        labels.append(", ".join((row["name"], *varying)))
    return labels


def _bars(axes: Axes, rows: Sequence[Row], labels: Sequence[str], unit: str, colours: Sequence[str]) -> None:
    for place, (row, colour) in enumerate(zip(rows, colours)):
        axes.barh(place, row["value"], color=colour, height=0.7)
        low, high = cells.spread(row) or (row["value"], row["value"])
        axes.plot([low, high], [place, place], color=INK, lw=1)
        axes.annotate(_text(row), (high, place), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(left=False)
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit)


def _by_name(rows: Sequence[Row]) -> list[str]:
    """A colour for each name."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    return [WAYS[names.index(row["name"]) % len(WAYS)] for row in rows]


def _text(row: Row) -> str:
    times = row.get("times")
    return cells.figure(row["value"], row["unit"]) + (f"  ({times:.2f} times as fast)" if times else "")


def scaling(files: Sequence[Stored]) -> Figure | None:
    """A panel an axis: its figure at each point, with the spread, from zero; in brackets that over the first point."""
    rows = [row for row in along(beside_first(files[0].figures())) if _is_point(row)]
    axes_of: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        axes_of.setdefault((row["name"], row["parameters"]["against"], row["unit"]), []).append(row)
    shown = {key: found for key, found in axes_of.items() if len(found) > 1}
    if not shown:
        return None
    columns = 3
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(8, 0.5 + 2.1 * lines))
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, ((name, axis, unit), found) in zip(panels, shown.items()):
        _curve(axes, sorted(found, key=lambda row: row["parameters"]["at"]))
        axes.set(xlabel=axis, ylabel=unit)
        axes.set_title(f"{name} against {axis}", loc="left")
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.suptitle(f"What a step and the loader cost ({where(files)})", fontsize=10.5)
    return figure


def _is_point(row: Row) -> bool:
    return isinstance(row["parameters"].get("at"), int | float)


def _curve(axes: Axes, rows: Sequence[Row]) -> None:
    at = [row["parameters"]["at"] for row in rows]
    values = [row["value"] for row in rows]
    ends = [cells.spread(row) or (row["value"], row["value"]) for row in rows]
    axes.vlines(at, [low for low, _ in ends], [high for _, high in ends], color=BLUE, alpha=0.55, lw=2.2)
    axes.plot(at, values, "o-", color=BLUE, ms=4, lw=1.2)
    for row, x, (_, high) in zip(rows, at, ends):
        ratio = f" ({row['over_first']['value']:.2f}x)" if "over_first" in row else ""
        text = cells.figure(row["value"], row["unit"]) + ratio
        axes.annotate(text, (x, high), (0, 5), textcoords="offset points", ha="center", fontsize=7.5)
    axes.set_xticks(at, [cells.word(one) for one in at])
    axes.margins(x=0.12)
    axes.set_ylim(0, 1.25 * max(high for _, high in ends))


def steps(files: Sequence[Stored]) -> Figure | None:
    """Clips/s of ways that took turns, a panel a model; beside ours how many times as fast it is."""
    found = pairs(files[0].figures())
    if not found:
        return None
    heights = [2 * len(of_model) + 2 for of_model in found.values()]
    figure = Figure(figsize=(8, 0.5 + 0.19 * sum(heights)))
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (model, of_model) in zip(panels, found.items()):
        rows = [
            {**row, "times": times} for pair in of_model for row, times in zip(pair[:2], (pair.ratio["value"], None))
        ]
        _bars(axes, rows, [row["parameters"]["way"] for row in rows], "", [BLUE, ORANGE] * len(of_model))
        axes.set_title(MODELS.get(model, model), loc="left")
        axes.margins(x=0.25)
    panels[-1].set_xlabel("clips/s")
    small = "\na tiny model: shows that both run, no figure for a GPU" if files[0].on_a_cpu else ""
    figure.suptitle(f"Training steps, in pairs that took turns ({where(files)}){small}", fontsize=10.5)
    return figure


def kernels(files: Sequence[Stored]) -> Figure | None:
    """How many times as fast ours is as each other way: a line an operation and pass, a dot a shape."""
    rows = [row for one in files for row in one.figures() if row["unit"] == "x" and ", ours over " in row["name"]]
    if not rows:
        return None
    passes = list(dict.fromkeys(row["name"].partition(", ours over ")[0] for row in rows))
    ways = list(dict.fromkeys(row["name"].partition(", ours over ")[2] for row in rows))
    figure = Figure(figsize=(8, 1.1 + 0.25 * len(passes)))
    axes = figure.subplots()
    for number, way in enumerate(ways):
        found = [row for row in rows if row["name"].endswith(f", ours over {way}")]
        lift = 0.5 * (number - (len(ways) - 1) / 2) / max(len(ways), 1)
        places = [passes.index(row["name"].partition(", ours over ")[0]) + lift for row in found]
        colour = WAYS[number % len(WAYS)]
        axes.plot([row["value"] for row in found], places, "o", color=colour, ms=3.5, alpha=0.8, label=f"over {way}")
    axes.axvline(1.0, color=GREY, lw=1, ls="--")
    axes.set_xscale("log", base=2)
    lowest, highest = min(row["value"] for row in rows), max(row["value"] for row in rows)
    ticks = [tick for tick in TICKS if 0.8 * lowest < tick < 1.25 * highest]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(passes)), passes)
    axes.set_ylim(len(passes) - 0.4, -0.6)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=6, frameon=False, handletextpad=0.1, columnspacing=1.2
    )
    axes.set_xlabel("times as fast as the other way, a dot a shape (1: as fast)")
    figure.suptitle(f"Kernels ({where(files)})", fontsize=10.5)
    return figure


PLOTS: dict[str, Plot] = {
    "census": census, "executions": executions, "data": data, "scaling": scaling, "step": steps, "public": steps,
    "kernels": kernels,
}  # fmt: skip


def draw(chosen: Sequence[Stored], wanted: Collection[str]) -> dict[str, bytes]:
    """The wanted pictures by kind of figure. Where several devices have been measured, of the one that was last."""
    pictures: dict[str, bytes] = {}
    for kind, plot in PLOTS.items():
        files = [one for one in chosen if one.series.kind == kind and kind in wanted]
        if files:
            device = max(files, key=lambda one: one.date).series.device
            picture = png(plot, [one for one in files if one.series.device == device])
            pictures |= {} if picture is None else {kind: picture}
    return pictures
