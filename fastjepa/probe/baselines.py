"""What an untrained encoder and raw pixels score: measured once for a run, not at each of its probes."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Baseline:
    """Test accuracies as shares of 1, and the classifier that was chosen for the untrained encoder (None without)."""

    untrained: float | None
    choice: dict[str, float] | None
    pixels: float


class Baselines:
    """Kept in one file under a key that must name everything they depend on; without a path in memory alone.

    A file that cannot be read is as good as none.
    """

    def __init__(self, key: str, path: Path | None = None) -> None:
        self.key, self.path = key, path

    def get(self, kind: str, tasks: list[str], *, untrained: bool) -> dict[str, Baseline]:
        """Those of every task; empty where one is not known, or its figure for the `untrained` encoder is not."""
        try:
            found = {task: Baseline(**row) for task, row in self._content()[self.key][kind].items()}
        except (KeyError, TypeError, AttributeError):
            return {}
        known = all(task in found and not (untrained and found[task].untrained is None) for task in tasks)
        return found if known else {}

    def put(self, kind: str, found: dict[str, Baseline]) -> None:
        """Errors: OSError."""
        if self.path is None:
            return
        content = self._content()
        of_key = content.setdefault(self.key, {})
        of_key[kind] = {task: asdict(row) for task, row in found.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f".tmp-{os.getpid()}-{self.path.name}")
        scratch.write_text(json.dumps(content, indent=2), encoding="utf-8")
        os.replace(scratch, self.path)

    def _content(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}
