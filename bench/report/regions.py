"""The regions of README.md and bench/README.md that are made from result files.

    <!-- bench:census -->
    what `python -m bench.report` writes, and nobody else
    <!-- /bench:census -->

A region has its picture, a table for each device, and under each table where the figures come from. What has not been
measured says so, with the command that would.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench.report import tables
from bench.report.stored import Stored

MARK = re.compile(r"<!-- (?P<end>/?)bench:(?P<name>\S*) -->")
BENCHES = "`pytest bench --benchmark-only`"


@dataclass(frozen=True)
class Region:
    """A region's kinds of result files (all needed), its table of one device, how to measure, its picture's text.

    `folded`: the picture says enough, the table opens on demand. `on_a_cpu`: what is said first of figures of a CPU.
    """

    kinds: tuple[str, ...]
    table: Callable[[Sequence[Stored]], str]
    how: str
    alt: str = ""
    folded: bool = False
    on_a_cpu: str = ""


REGIONS = {
    "demo": Region(("demo",), tables.demo, "`python bench/demo.py`"),
    "demo-noised": Region(
        ("demo", "demo_noised"), tables.demo_noised, "`python bench/demo.py --recipe configs/demo_noised.yaml`"
    ),
    "census": Region(
        ("census",), tables.census, BENCHES, "Bytes moved by a step, by part and by kind of work, both executions"
    ),
    "executions": Region(
        ("executions",), tables.executions, BENCHES, "Speed of the packed execution over the reference one"
    ),
    "data": Region(("data",), tables.data, BENCHES, "Clips a second of decoders and loader", folded=True),
    "scaling": Region(
        ("scaling",),
        tables.scaling,
        BENCHES,
        "Cost against batch, tokens, frames, crop and workers",
        folded=True,
        on_a_cpu="The steps are of a tiny model on a CPU: the course of a curve, no figure for a GPU.",
    ),
    "saving": Region(
        ("saving",), tables.plain, BENCHES, on_a_cpu="The demo's step on a CPU: no figure for a large model or a GPU."
    ),
    "health": Region(
        ("health",), tables.plain, BENCHES, on_a_cpu="The demo's step on a CPU: no figure for a large model or a GPU."
    ),
    "step": Region(("step",), tables.steps, "`bench/gpu.sh step` on a machine with a GPU", "Clips a second of steps"),
    "public": Region(
        ("public",),
        tables.public,
        "`bench/gpu.sh public` on a machine with a GPU",
        "Clips a second, and the public code's",
    ),
    "without": Region(("census",), tables.without, BENCHES),
    "rejected": Region(("rejected",), tables.plain, BENCHES),
    "kernels": Region(
        ("kernels",), tables.kernels, "`bench/gpu.sh kernels` on a machine with a GPU", "Speed of kernels over others"
    ),
    "ceilings": Region(("ceilings",), tables.ceilings, "`bench/gpu.sh ceilings` on a machine with a GPU"),
}


class Links(NamedTuple):
    """How the README names the folder of result files, and that of pictures."""

    results: str
    docs: str


def split(text: str, what: str) -> list[tuple[str, str]]:
    """The text `what` as pairs (what stays, the region after it), "" after the last.

    Errors: ValueError with one sentence for a mark that is unknown, does not end, or ends nothing.
    """
    parts, after, begun = [], 0, ""
    for mark in MARK.finditer(text):
        name, where = mark["name"], f"{what}, line {text.count(chr(10), 0, mark.start()) + 1}"
        if name not in REGIONS:
            raise ValueError(f"{where}: expected a region among {', '.join(REGIONS)}, found {name!r}.")
        if mark["end"] and begun != name:
            raise ValueError(f"{where}: expected a region {name!r} that ends here, found none.")
        if not mark["end"] and begun:
            raise ValueError(f"{where}: expected the end of region {begun!r} first, found {mark[0]}.")
        if mark["end"]:
            after, begun = mark.start(), ""
        else:
            parts.append((text[after : mark.end()], name))
            begun = name
    if begun:
        raise ValueError(f"{what}: expected <!-- /bench:{begun} --> after its beginning, found none.")
    return [*parts, (text[after:], "")]


def rewrite(
    parts: Sequence[tuple[str, str]], chosen: Sequence[Stored], drawn: Collection[str], links: Links
) -> str:  # fmt: skip
    """The whole text, with all its regions made anew; `drawn`: regions that have a picture."""
    return "".join(stays + (f"\n{region(name, chosen, drawn, links)}\n" if name else "") for stays, name in parts)


def region(name: str, chosen: Sequence[Stored], drawn: Collection[str], links: Links) -> str:
    """What stands between the marks."""
    one = REGIONS[name]
    of_device: dict[str, list[Stored]] = {}
    for file in chosen:
        if file.series.kind in one.kinds:
            of_device.setdefault(file.series.device, []).append(file)
    measured = {device: files for device, files in of_device.items() if {f.series.kind for f in files} >= {*one.kinds}}
    tables_of = {device: table for device, files in measured.items() if (table := one.table(files))}
    if not tables_of:
        return f"Not measured yet: {one.how}."
    blocks = [f"![{one.alt}]({links.docs}/bench-{name}.png)"] if name in drawn else []
    for device, table in tables_of.items():
        if len(tables_of) > 1:
            blocks.append(f"**{device}**")
        if one.on_a_cpu and measured[device][0].on_a_cpu:
            blocks.append(one.on_a_cpu)
        shown = (
            f"<details><summary>The figures</summary>\n\n{table}\n\n</details>"
            if one.folded and name in drawn
            else table
        )
        blocks += [shown, provenance(measured[device], links)]
    return "\n\n".join(blocks)


def provenance(files: Sequence[Stored], links: Links) -> str:
    """Where figures come from: command, device, versions, commit, date and files; a line for each way they differ."""
    sources: dict[str, list[str]] = {}
    for one in files:
        device = f" on {one.place}" if one.place else ""
        commit = f"commit {one.commit[:7]}" if one.commit else "commit not known"
        changed = ", code not committed" if one.modified else ""
        cut = "" if one.whole else ", not all cases"
        source = (
            f"`{one.header['command']}`{device}, torch {one.header['torch']}, {commit}{changed}, {one.date[:10]}{cut}"
        )
        sources.setdefault(source, []).extend((one.name, *one.completed_by))
    lines = [
        f"{source}: {', '.join(f'[{n}]({links.results}/{n})' for n in names)}" for source, names in sources.items()
    ]
    return "\n".join(f"From {line}." for line in lines)
