"""What a probe found, for a person and for a program."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# The rows and columns of a confusion matrix, and the names of its classes.
Confusion = tuple[np.ndarray, tuple[str, ...]]


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy on one task, as a share of 1; every video counts once.

    `untrained` is None where no untrained encoder was probed. `top5` (None where there are no more than five classes)
    and `class_mean` (the mean over the classes of the accuracy on each) are of the trained encoder. A choice is which
    classifier validation chose, and its accuracy there.
    """

    task: str
    trained: float
    untrained: float | None
    pixels: float
    chance: float
    videos: int
    top5: float | None = None
    class_mean: float | None = None
    trained_choice: dict[str, float] | None = None
    untrained_choice: dict[str, float] | None = None
    confusion: Confusion | None = field(default=None, repr=False, compare=False)


def table(results: Sequence[Accuracy], kind: str = "linear", *, more: bool = False) -> list[str]:
    """The results in lines for a person; with `more` also top-5 and the mean over classes."""
    head = f"{kind} probe"
    width = max(14, len(head) + 1, *(len(r.task) + 1 for r in results))
    extra = f"{'top-5':>8}{'class mean':>12}" if more else ""
    lines = [f"{head:<{width}}{'trained':>9}{'untrained':>11}{'pixels':>8}{'chance':>8}{extra}   test videos"]
    for r in results:
        shares = f"{r.trained:>9.1%}{_share(r.untrained):>11}{r.pixels:>8.1%}{r.chance:>8.1%}"
        if more:
            shares += f"{_share(r.top5):>8}{_share(r.class_mean):>12}"
        lines.append(f"{r.task:<{width}}{shares}   {r.videos}")
    return lines


def file_name(step: int | None, kind: str = "linear", variant: str = "") -> str:
    """The name of the file of these results: step-0003000.json of the linear probe, step-0003000-knn.json of another.

    `variant` tells apart what is no probe of a run on its own videos. Weights without a step: weights.json.
    """
    parts = ["weights" if step is None else f"step-{step:07d}", "" if kind == "linear" else kind, variant]
    return "-".join(part for part in parts if part) + ".json"


def write(
    results: Sequence[Accuracy],
    step: int | None,
    folder: Path,
    kind: str = "linear",
    *,
    variant: str = "",
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Keep the results as JSON, and what `about` says of them: probe/step-0003000.json; a file a kind of probe."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for result in results:
        row = asdict(result)
        del row["confusion"]
        rows.append(row)
    content = {"step": step, "probe": kind, **(about or {}), "results": rows}
    path = folder / file_name(step, kind, variant)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return path


def numbers(results: Mapping[str, Sequence[Accuracy]]) -> dict[str, float]:
    """Figures for curves over the steps: probe/linear/motion, and what the same classifier gets of no training."""
    found = {}
    for kind, rows in results.items():
        for r in rows:
            found[f"probe/{kind}/{r.task}"] = r.trained
            if r.untrained is not None:
                found[f"probe/{kind}/{r.task}/untrained"] = r.untrained
    return found


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
