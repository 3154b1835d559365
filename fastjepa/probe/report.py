"""What a probe found, for a person and for a program."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy on one task, as a share of 1."""

    task: str
    trained: float
    untrained: float
    pixels: float
    chance: float
    videos: int


@dataclass(frozen=True)
class Choice:
    """The classifier of a grid that validation chose, and its accuracy there."""

    lr: float
    weight_decay: float
    validation: float


@dataclass(frozen=True)
class AttentiveAccuracy(Accuracy):
    """With the choices, so that one at the edge of the grid can be seen."""

    trained_choice: Choice
    untrained_choice: Choice


def table(results: Sequence[Accuracy], kind: str = "linear") -> list[str]:
    """The results in lines for a person."""
    head = f"{kind} probe"
    width = max(14, len(head) + 1)
    lines = [f"{head:<{width}}{'trained':>9}{'untrained':>11}{'pixels':>8}{'chance':>8}   test videos"]
    for r in results:
        shares = f"{r.trained:>9.1%}{r.untrained:>11.1%}{r.pixels:>8.1%}{r.chance:>8.1%}"
        lines.append(f"{r.task:<{width}}{shares}   {r.videos}")
    return lines


def write(results: Sequence[Accuracy], step: int, folder: Path, kind: str = "linear") -> None:
    """Keep the results as JSON: probe/step-0003000.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"step": step, "probe": kind, "results": [asdict(r) for r in results]}
    (folder / f"step-{step:07d}.json").write_text(json.dumps(content, indent=2))
