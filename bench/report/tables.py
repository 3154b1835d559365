"""The tables of each region of the README, from the result files of one device."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from bench.files import Row
from bench.report import cells
from bench.report.stored import Stored, row_key

MODELS = {
    "vitl": "ViT-L/16", "vith": "ViT-H/16", "vith_384": "ViT-H/16 at 384 px", "vitg": "ViT-g/16",
    "vjepa2_vitl": "V-JEPA 2 ViT-L/16", "vjepa2_vitg": "V-JEPA 2 ViT-g/16",
}  # fmt: skip
DEMO = ("motion trained", "motion untrained", "shape trained", "shape untrained")
DEMO_HEADS = ("motion, trained", "untrained", "shape, trained", "untrained")
EXECUTIONS = {
    "step packed": "packed, ms",
    "step reference": "reference, ms",
    "speed of packed over reference": "times the reference",
    "speed of packed over reference, public optimizer path": "times the reference with the public optimizer path",
}
OWN_WAYS = ("ours", "eager", "compiled")
OVER_FIRST = ", over the first point"  # the end of a name of scaling: a ratio to the first point of its axis
VARIANTS = (
    "The public code's variants: shipped: as it is; nostats: without the statistics it logs, which wait for the "
    "device; compiled: nostats, compiled."
)


def by_seed(one: Stored) -> dict[int, dict[str, float]]:
    """Figures of a demo by seed and name."""
    figures: dict[int, dict[str, float]] = {}
    for row in one.figures():
        figures.setdefault(row["parameters"]["seed"], {})[row["name"]] = row["value"]
    return figures


def demo(files: Sequence[Stored]) -> str:
    """A line a seed."""
    lines = [
        [str(seed), *(f"{value[name]:.1f}" for name in DEMO), f"{value['processor time']:.0f} s"]
        for seed, value in by_seed(files[0]).items()
    ]
    return cells.markdown(["seed", *DEMO_HEADS, "processor time"], lines)


def demo_noised(files: Sequence[Stored]) -> str:
    """Both kinds of targets: mean, lowest and highest over the seeds."""
    lines = []
    for one in files:
        line = ["noised targets" if one.series.kind == "demo_noised" else "mask tokens"]
        for name in DEMO:
            values = [value[name] for value in by_seed(one).values()]
            line.append(f"{fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(line)
    return cells.markdown(["targets", *DEMO_HEADS], lines)


def census(files: Sequence[Stored]) -> str:
    """Totals of both executions; of those that recompute blocks, as published, also without that."""
    rows = [row for row in files[0].figures() if "without" not in row["parameters"]]
    found = {(row["name"], *row["parameters"].values()): row["value"] for row in rows}
    lines = []
    for model in dict.fromkeys(row["parameters"]["model"] for row in rows):
        for name, unit, form in (("bytes", "GB moved", ",.1f"), ("launches", "launches", ",")):
            packed = found[name, model, "packed", "total"]
            title, told = MODELS.get(model, model), format(packed, form)
            ours = format(found[name, model, "reference", "total"], form), told
            lines.append([f"{title}, {unit}", *ours, f"{found[f'times fewer {name}', model]:.2f}"])
            stored = found.get((name, model, "reference-stored", "total"))
            if stored is not None:
                lines.append([f"{title}, nothing recomputed, {unit}", format(stored, form), told,
                              f"{stored / packed:.2f}"])  # fmt: skip
    return cells.markdown(["one step", "public code's way", "packed", "times fewer"], lines)


def without(files: Sequence[Stored]) -> str:
    """What a step costs more without the kernels of one piece, a line a piece. Below zero: it costs less."""
    total = {
        (row["name"], row["parameters"]["model"]): row["value"]
        for row in files[0].figures()
        if row["parameters"].get("execution") == "packed" and row["parameters"].get("component") == "total"
    }
    more: dict[tuple[str, str], dict[str, float]] = {}
    for row in files[0].figures():
        model, piece = row["parameters"]["model"], row["parameters"].get("without")
        if piece is not None:
            more.setdefault((model, piece), {})[row["name"]] = row["value"] - total[row["name"], model]
    lines = [
        [MODELS.get(model, model), piece, f"{found['bytes']:+.2f}", f"{found['launches']:+,}"]
        for (model, piece), found in more.items()
    ]
    return cells.markdown(["step of", "without", "GB", "launches"], lines) if lines else ""


def executions(files: Sequence[Stored]) -> str:
    """Step times and ratios, a line a shape."""
    lines = []
    for shape in dict.fromkeys(row["parameters"]["shape"] for row in files[0].figures()):
        of_shape = {row["name"]: row for row in files[0].figures() if row["parameters"]["shape"] == shape}
        row = [shape]
        for name in EXECUTIONS:
            one = of_shape.get(name)
            row.append("-" if one is None else cells.with_spread(one) if one["unit"] == "x" else _plain(one))
        lines.append(row)
    between = cells.ends(row for row in files[0].figures() if row["unit"] == "x")
    heads = [head + between * head.startswith("times") for head in EXECUTIONS.values()]
    return cells.markdown(["model", *heads], lines)


def _plain(row: Row) -> str:
    return cells.figure(row["value"], row["unit"])


def data(files: Sequence[Stored]) -> str:
    """What a user sees of decoders and loader; the files have more, which is named."""
    shown = [row for one in files for row in seen(one.figures())]
    more = dict.fromkeys(row["name"] for one in files for row in one.figures() if row not in shown)
    rest = f"The file has also: {'; '.join(more)}." if more else ""
    return _joined([*cells.tables(shown), rest, cells.reasons(row for one in files for row in one.skipped())])


def seen(rows: Sequence[Row]) -> list[Row]:
    """Rates that a user sees, ratios and shares. Batches a second are a repetition where clips a second are known."""
    clips = {tuple(row["parameters"].items()) for row in rows if row["unit"] == "clips/s"}
    return [
        row
        for row in rows
        if row["unit"] in ("clips/s", "s", "x", "%")
        or (row["unit"] == "batches/s" and tuple(row["parameters"].items()) not in clips)
    ]


def plain(files: Sequence[Stored]) -> str:
    """All figures as they are, and what was skipped."""
    rows = [row for one in files for row in one.figures()]
    return _joined([*cells.tables(rows), cells.reasons(row for one in files for row in one.skipped())])


def scaling(files: Sequence[Stored]) -> str:
    """All axes in one table: what is measured, against what, at which point of it."""
    rows = [row for one in files for row in along(beside_first(one.figures()))]
    return _joined([*cells.tables(rows), cells.reasons(row for one in files for row in one.skipped())])


def beside_first(rows: Sequence[Row]) -> list[Row]:
    """Rows with their ratio to the first point of the axis as `over_first`; a ratio without its point stays a row."""
    ratios = {row_key(row): row for row in rows if row["name"].endswith(OVER_FIRST)}
    found = []
    for row in rows:
        if row["name"].endswith(OVER_FIRST):
            continue
        ratio = ratios.pop(row_key({**row, "name": row["name"] + OVER_FIRST}), None)
        found.append(row if ratio is None else {**row, "over_first": ratio})
    return [*found, *ratios.values()]


def along(rows: Sequence[Row]) -> list[Row]:
    """Rows with their axis as a parameter `against` and its point as `at`.

    The axis of a row is the parameter that its name says after "against", or else the one that differs among rows of
    its name; a row without one is left as it is.
    """
    found = []
    for row in rows:
        same = [one["parameters"] for one in rows if one["name"] == row["name"]]
        differ = [key for key in row["parameters"] if len({cells.word(one.get(key)) for one in same}) > 1]
        what, _, after = row["name"].partition(" against ")
        said, comma, rest_of_name = after.partition(",")
        axis = said if said in row["parameters"] else differ[0] if len(differ) == 1 else None
        if axis is None:
            found.append(row)
            continue
        rest = {key: value for key, value in row["parameters"].items() if key != axis}
        at = {"against": axis, "at": row["parameters"][axis], **rest}
        found.append({**row, "name": f"{what}{comma}{rest_of_name}", "parameters": at})
    return found


class Pair(NamedTuple):
    """Two ways of a step that took turns, and how many times the speed of the other ours has."""

    ours: Row
    other: Row
    ratio: Row


def pairs(rows: Sequence[Row]) -> dict[str, list[Pair]]:
    """The pairs of each model."""
    of_way = {
        (row["parameters"]["model"], row["parameters"]["way"], row["parameters"]["beside"]): row
        for row in rows
        if "beside" in row["parameters"]
    }
    ratios = {(row["parameters"].get("model"), row["name"]): row for row in rows if row["unit"] == "x"}
    found: dict[str, list[Pair]] = {}
    for (model, way, beside), row in of_way.items():
        ratio, other = ratios.get((model, f"step {way} over {beside}")), of_way.get((model, beside, way))
        if ratio is not None and other is not None:
            found.setdefault(model, []).append(Pair(row, other, ratio))
    order = [*MODELS, *found]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def steps(files: Sequence[Stored]) -> str:
    """Pairs of each model, then where the time of those ways goes whose components were timed."""
    return _joined([*_steps(files), cells.reasons(files[0].skipped())])


def public(files: Sequence[Stored]) -> str:
    """As steps, and what the variants of the public code are."""
    found = _steps(files)
    return _joined([*found, VARIANTS if found else "", cells.reasons(files[0].skipped())])


def _steps(files: Sequence[Stored]) -> list[str]:
    parts = []
    for model, found in pairs(files[0].figures()).items():
        parts += [f"{MODELS.get(model, model)}, {found[0].ours['batch']} clips a step:", _pairs(found)]
        parts.append(_components([row for pair in found for row in pair[:2]]))
    return parts


def _pairs(found: Sequence[Pair]) -> str:
    lines = []
    for ours, other, ratio in found:
        cell = cells.with_spread(ratio) + ("" if ratio.get("in_turns", True) else ", not in turns")
        lines.append([ours["parameters"]["way"], *_way(ours), other["parameters"]["way"], *_way(other), cell])
    way = ["clips/s (p20 to p80)", "MFU", "peak GB"]
    return cells.markdown(["way", *way, "beside", *way, "times as fast"], lines)


def _way(row: Row) -> list[str]:
    mfu, memory = row.get("mfu"), row.get("peak_memory_gb")
    shares = ["-" if mfu is None else f"{mfu:.1%}", "-" if memory is None else f"{memory:.1f}"]
    return [cells.with_spread(row), *shares]


def _components(rows: Sequence[Row]) -> str:
    """The components of each way, from the first pair that has them."""
    timed: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("components"):
            timed.setdefault(row["parameters"]["way"], row["components"])
    names = list(dict.fromkeys(name for parts in timed.values() for name in parts))
    lines = [[way, *(_ms(parts.get(name)) for name in names)] for way, parts in timed.items()]
    return cells.markdown(["ms of", *names], lines) if timed else ""


def _ms(value: float | None) -> str:
    return "-" if value is None else cells.number(value)


def kernels(files: Sequence[Stored]) -> str:
    """A line for each operation, pass and shape; the ceilings above. Folded: there are many."""
    rows = [row for one in files for row in one.figures()]
    timed = [row for row in rows if "way" in row["parameters"] and row["unit"] != "x"]
    ratios = {(row["name"], cells.word(row["parameters"].get("shape"))): row for row in rows if row["unit"] == "x"}
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in timed:
        groups.setdefault((row["name"], cells.word(row["parameters"]["shape"])), {})[row["parameters"]["way"]] = row
    lines = [_kernel(name, shape, ways, ratios) for (name, shape), ways in groups.items()]
    heads = ["operation", "shape", "unit", *OWN_WAYS, "library", "ours of the ceiling", "ours over the fastest other"]
    heads.append("peak MB, ours / smallest other")
    folded = f"<details><summary>All {len(lines)} passes</summary>\n\n{cells.markdown(heads, lines)}\n\n</details>"
    ceilings_ = cells.tables([row for row in rows if row["name"].startswith("ceiling")])
    skipped = cells.reasons(row for one in files for row in one.skipped())
    return _joined([*ceilings_, folded if lines else "", skipped])


def _kernel(name: str, shape: str, ways: dict[str, Row], ratios: dict[tuple[str, str], Row]) -> list[str]:
    fastest = max(ways, key=lambda way: ways[way]["value"])
    libraries = [way for way in ways if way not in OWN_WAYS]
    library = max(libraries, key=lambda way: ways[way]["value"], default=None)
    others = [way for way in ways if way != "ours"]
    other = max(others, key=lambda way: ways[way]["value"], default=None)
    ratio = ratios.get((f"{name}, ours over {other}", shape))

    def cell(way: str | None) -> str:
        if way not in ways:
            return "-"
        value = _plain(ways[way])
        return f"**{value}**" if way == fastest else value

    share = ways["ours"].get("share") if "ours" in ways else None
    named = "" if library in (None, "library") else f" {library}"
    return [
        name, shape, ways[fastest]["unit"], *(cell(way) for way in OWN_WAYS), cell(library) + named,
        "-" if share is None else f"{share:.0%}", "-" if ratio is None else f"{cells.with_spread(ratio)} {other}",
        _peaks(ways),
    ]  # fmt: skip


def _peaks(ways: dict[str, Row]) -> str:
    peaks = {way: size for way, row in ways.items() if (size := cells.megabytes(row)) is not None}
    ours = peaks.pop("ours", None)
    if ours is None and not peaks:
        return "-"
    return " / ".join("-" if one is None else cells.number(one) for one in (ours, min(peaks.values(), default=None)))


def ceilings(files: Sequence[Stored]) -> str:
    """A line a stage: how many figures, the lowest, the median and the highest."""
    lines = []
    for one in files:
        rows = sorted(one.figures(), key=lambda row: row["value"])
        if not rows:  # every case was refused: the file says why
            continue
        lowest, highest = (f"{_plain(row)} ({row['name']})" for row in (rows[0], rows[-1]))
        counts = [str(len(rows)), str(len(one.skipped()))]
        lines.append([one.series.part, *counts, rows[0]["unit"], lowest, _plain(rows[len(rows) // 2]), highest])
    return cells.markdown(["stage", "figures", "skipped", "unit", "lowest", "median", "highest"], lines)


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part)
