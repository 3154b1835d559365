"""What a run folder tells of its run from outside: is it alive, how far is it, what has it learned so far."""

import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastjepa.log import duration

Line = tuple[str, str]

# States that status.json has while a process works.
AT_WORK = ("training", "evaluating")
# Heartbeats come with lines of the log: so many of their intervals without one are a reason to look.
MANY_INTERVALS = 5


def told(folder: Path, now: float | None = None) -> Iterator[Line]:
    """(label, text) lines about the run in this folder. Errors: ValueError where it is no run folder."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"info: expected a run folder (with a config.yaml) or a settings file, given {folder}{_runs_in(folder)}"
        )
    now = time.time() if now is None else now
    status, rows = _status(folder), _rows(folder)
    yield "run", str(folder)
    yield "state", _state(status)
    yield "alive", _alive(folder, status, now)
    if status.get("verdict_text"):
        yield "verdict", str(status["verdict_text"])
    if rows:
        yield "last line", _last(rows[-1])
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    if checkpoints:
        age = max(0.0, now - checkpoints[-1].stat().st_mtime)
        yield "checkpoint", f"{checkpoints[-1].name}, {duration(age)} ago; {len(checkpoints)} kept"
    else:
        yield "checkpoint", "none yet"
    probes = sorted((folder / "probe").glob("step-*.json"))
    if probes:
        yield "last probe", str(probes[-1])
    if command := _command(folder):
        yield "begun by" if status.get("state") == "done" else "goes on by", command


def _state(status: dict[str, Any]) -> str:
    if not status:
        return "it has said nothing yet"
    step, steps = status.get("step", 0), status.get("steps") or 1
    left = status.get("seconds_left")
    told = f"{status.get('state')}, step {step} of {steps} ({step / steps:.0%})"
    if status.get("reason"):
        told += f": {status['reason']}"
    return told + (f", {duration(left)} left" if left is not None else "")


def _alive(folder: Path, status: dict[str, Any], now: float) -> str:
    if not status:
        return "a process works in it" if _locked(folder) else "no process works in it"
    age = max(0.0, now - status.get("heartbeat", now))
    if status.get("state") not in AT_WORK:
        return f"no, it ended {duration(age)} ago"
    expected = status.get("log_seconds")
    silent = expected is not None and age > max(60.0, MANY_INTERVALS * expected)
    spoke = f"its last line is {duration(age)} old"
    usual = f", usual are {duration(expected)}" if expected is not None else ""
    if _locked(folder):
        doubt = f"; it probes, saves or hangs, the end of {folder / 'train.log'} may tell" if silent else ""
        return f"yes, {spoke}{usual}{doubt}"
    if silent or expected is None:
        return f"no process works in it on this machine, and {spoke}: it was killed, or runs elsewhere and hangs"
    return f"perhaps: no process works in it on this machine, and {spoke}{usual}; it was killed, or runs elsewhere"


def _last(row: dict[str, Any]) -> str:
    ratio, loss = row.get("loss_ratio"), row.get("loss")
    told = [f"step {row.get('step')}", "loss not finite" if loss is None else f"loss {loss:.4f}"]
    if ratio is not None:
        told[-1] += f" ({ratio:.3f} of trivial, below 1 more than the position is predicted)"
    if row.get("rank") is not None:
        told.append(f"rank {row['rank']:.1f}")
    if row.get("clips_per_s") is not None:
        told.append(f"{row['clips_per_s']:.4g} clips/s")
    if row.get("data_wait") is not None:
        told.append(f"data wait {row['data_wait']:.0%}")
    return ", ".join(told)


def _locked(folder: Path) -> bool:
    """Whether a process of this machine holds the run."""
    try:
        with (folder / ".lock").open("r") as handle:
            fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # there never was one, or this disk knows no locks
        return False
    return False


def _status(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Those of metrics.jsonl that can be read: the last one may be half written."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines[-3:]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _command(folder: Path) -> str:
    """The last command that worked here."""
    try:
        lines = (folder / "command.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return lines[-1].partition("  ")[2] if lines else ""


def _runs_in(folder: Path) -> str:
    if not folder.is_dir():
        return ", which does not exist"
    runs = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
    return f", which holds the runs {', '.join(runs[:3])}{more}" if runs else ""
