"""What a probe found, for a person and for a program."""

import json
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


def table(results: list[Accuracy]) -> list[str]:
    """The results in lines for a person."""
    lines = [f"{'linear probe':<14}{'trained':>9}{'untrained':>11}{'pixels':>8}{'chance':>8}   test videos"]
    for r in results:
        shares = f"{r.trained:>9.1%}{r.untrained:>11.1%}{r.pixels:>8.1%}{r.chance:>8.1%}"
        lines.append(f"{r.task:<14}{shares}   {r.videos}")
    return lines


def write(results: list[Accuracy], step: int, folder: Path) -> None:
    """Keep the results as JSON: probe/step-0003000.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"step": step, "probe": "linear", "results": [asdict(r) for r in results]}
    (folder / f"step-{step:07d}.json").write_text(json.dumps(content, indent=2))
