"""A healthy, a collapsing and a diverged run side by side: the picture of "is my run alive?" in the README.

    python bench/alive.py                     run the demo's recipe three times, keep its rows, draw docs/alive.png
    python bench/alive.py --draw FILE.json    draw a result file again

Each run is `python -m fastjepa.train configs/demo.yaml` with the settings of RUNS, and nothing else changed but how
often it logs and where it stops. The words are those that the run said itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # also runs as a script

from bench.files import Row, write_results
from bench.machine import facts, slug

ROOT = Path(__file__).parents[1]
RUNS = {
    "healthy": ["runtime.stop_at=700"],
    # Later on this one gets content back, and goes on to lose directions: another story.
    "without momentum": ["optim.momentum=0", "optim.final_momentum=0", "runtime.stop_at=300"],
    "learning rate x 1000": ["optim.lr=2", "runtime.stop_at=300"],
}
COLUMNS = ("step", "loss", "loss_ratio", "content", "feature_std", "rank", "verdict")
BLUE, RED, GREY = "#1f77b4", "#d62728", "#8c8c8c"
SHADES = {
    "early": "#f0f0f0", "position only": "#e3ecf7", "alive": "#dff2df", "stuck": "#efe6d5", "collapsing": "#fde5c8",
    "collapsed": "#f8d3d3", "diverged": "#e9daf3",
}  # fmt: skip


def run(name: str, folder: Path) -> Row:
    """One run: its last loss ratio as a figure, and its rows column by column. SystemExit where it fails to start."""
    settings = [*RUNS[name], "log.every=10", "eval.probe=none", "log.images=false"]
    own = folder / slug(name)
    command = [sys.executable, "-m", "fastjepa.train", "configs/demo.yaml", *settings, f"log.folder={own}"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    found = list(own.glob("demo-*"))
    if not found:
        raise SystemExit(code)
    rows = [json.loads(line) for line in (found[0] / "metrics.jsonl").read_text().splitlines()]
    verdict = json.loads((found[0] / "status.json").read_text())["verdict"]
    columns = {key: [row[key] for row in rows] for key in COLUMNS}
    ratio = rows[-1]["loss_ratio"] if rows else None
    where: dict[str, Any] = {"run": name, "settings": settings}
    return {"name": "loss ratio at the end", "value": ratio, "unit": "", "parameters": where, "verdict": verdict,
            "columns": columns}  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    """A column a run: loss, loss over the trivial one, content and deviation, effective rank; shaded by verdict."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.subplots(4, len(rows), sharex="col", sharey="row", squeeze=False)
    for row, axes in zip(rows, grid.T):
        columns = row["columns"]
        axes[0].set_title(f"{row['parameters']['run']}: {row['verdict']}", fontsize=12, weight="bold", pad=22)
        panels: list[list[tuple[str, str, str]]] = [
            [("loss", BLUE, "loss")],
            [("loss_ratio", RED, "loss / trivial loss")],
            [("content", RED, "content"), ("feature_std", BLUE, "feature std")],
            [("rank", BLUE, "effective rank")],
        ]
        for ax, lines in zip(axes, panels):
            for key, colour, label in lines:
                ax.plot(columns["step"], _numbers(columns[key]), color=colour, lw=1.6, label=label)
            _shade(ax, columns, words=ax is axes[0])
            ax.spines[["top", "right"]].set_visible(False)
            ax.margins(x=0)
        axes[1].axhline(1, color=GREY, lw=0.9, ls="--")
        axes[-1].set_xlabel("step")
    for ax, label in zip(grid[:, 0], ("loss", "loss / trivial loss", "content, feature std", "effective rank")):
        ax.set_ylabel(label)
    for ax in grid[2:, 0]:
        ax.set_ylim(0, None)
    for line, (key, most) in zip(grid, (("loss", 1.0), ("loss_ratio", 3.0))):
        line[0].set_ylim(0, most)
        for row, ax in zip(rows, line):
            highest = max(value for value in row["columns"][key] if value is not None)
            if highest > most:
                where = {"ha": "right", "va": "top", "fontsize": 9, "transform": ax.transAxes}
                ax.text(0.97, 0.93, f"up to {highest:.3g}", **where)
    grid[2, 0].legend(frameon=False, fontsize=9, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _shade(ax: Axes, columns: dict[str, list[Any]], *, words: bool) -> None:
    """The verdicts as bands behind the curves, each from the row that said it, and their words above."""
    last, start = columns["step"][-1], 0
    said = zip(columns["verdict"], columns["step"])
    begins = [next(rows) for _, rows in groupby(said, key=lambda pair: pair[0])]
    ends = [*(step for _, step in begins[1:]), last]
    for (word, _), end in zip(begins, ends):
        ax.axvspan(start, end, color=SHADES.get(word, "white"), lw=0)
        if words and end - start > 0.12 * last:
            middle, place = (start + end) / 2, ax.get_xaxis_transform()
            ax.text(middle, 1.02, word, ha="center", va="bottom", fontsize=9, color="#444444", transform=place)
        start = end


def _numbers(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def main(arguments: list[str]) -> None:
    """Run and draw, or draw alone."""
    parser = argparse.ArgumentParser(prog="alive.py", description="A healthy, a collapsing and a diverged run.")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw this result file, run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="result folder")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "alive.png", help="(default: docs/alive.png)")
    options = parser.parse_args(arguments)
    if options.draw:
        draw(json.loads(options.draw.read_text())["rows"], options.picture)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = facts(device, "python bench/alive.py", quick=False)
    path = options.out / f"alive-{slug(header['device'])}-{header['date'][:10]}.json"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in RUNS:
            rows.append(run(name, Path(scratch)))
            write_results(path, header, rows, complete=len(rows) == len(RUNS))
    draw(rows, options.picture)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
