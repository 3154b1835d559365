"""What lies in the folder of a run, read as it is: half of it may be missing, and the run may be writing it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """`rows` of metrics.jsonl; `status`, `env`; `probes` in the order of their steps; `bad` files as (path, reason);
    `commands` a line each; `warnings` of train.log, the last ones; `confusions` the probes' pictures."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    confusions: list[Path] = field(default_factory=list)


MOST_WARNINGS = 20


def read_record(folder: Path) -> Record:
    """The record of a run folder. What is absent, damaged or half written is left out. Errors: OSError."""
    rows = [row for row in _json_lines(folder / "metrics.jsonl") if isinstance(row.get("step"), int | float)]
    bad = [
        (str(entry["path"]), str(entry.get("reason", "")))
        for name in ("bad_files", "crashed_videos")
        for file in sorted(folder.glob(f"{name}*.jsonl"))
        for entry in _json_lines(file)
        if "path" in entry
    ]
    warnings = [line for line in _lines(folder / "train.log") if "  warning: " in line]
    probes = [_probe(_json(file)) for file in sorted((folder / "probe").glob("step-*.json"))]
    return Record(
        folder.resolve().name,
        rows,
        _json(folder / "status.json"),
        _json(folder / "env.json"),
        sorted((probe for probe in probes if probe), key=lambda probe: probe["step"]),
        list(dict.fromkeys(bad)),
        _lines(folder / "command.txt"),
        warnings[-MOST_WARNINGS:],
        sorted((folder / "probe").glob("confusion*.png")),
    )


def _probe(content: dict[str, Any]) -> dict[str, Any]:
    """{step, probe, results}, or nothing where it is another thing."""
    results = content.get("results")
    if not isinstance(results, list) or not isinstance(content.get("step"), int):
        return {}
    named = [result for result in results if isinstance(result, dict) and isinstance(result.get("task"), str)]
    return {"step": content["step"], "probe": str(content.get("probe", "linear")), "results": named}


def _json(path: Path) -> dict[str, Any]:
    text = "\n".join(_lines(path))
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return list(_objects(_lines(path)))


def _objects(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue  # half written: by a run that goes on, or one that was killed
        if isinstance(content, dict):
            yield content


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
