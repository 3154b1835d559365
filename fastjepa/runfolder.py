"""The folder of one run: which one it is, what it holds, and that only one process works in it.

runs/vith-3f9a21/            name - hash of the settings that change results and of the file list
    config.yaml  command.txt  env.json  metrics.jsonl  train.log  status.json
    bad_files.jsonl  checkpoints/  probe/  viz/
"""

import fcntl
import json
import os
import platform
import re
import shlex
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fastjepa import __version__, config, configfile
from fastjepa.config import Settings


class RunRefused(ValueError):
    """The run cannot use this folder. The text is one sentence, or several lines of differences."""


@dataclass
class RunFolder:
    """An open run folder. `notes` are lines for the console: what was found beside it and what differs."""

    path: Path
    notes: list[str]
    lock: Any = None
    # What it is described by once its weights turn out to fit the settings.
    accepted: tuple[Settings, str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    def status(self) -> dict[str, Any]:
        """What status.json says, or nothing."""
        return _json(self.path / "status.json")

    def batch_size(self) -> int | None:
        """The clips of one forward pass that `auto` came to when the run began."""
        known = _json(self.path / "env.json").get("batch_size")
        return known if isinstance(known, int) and known > 0 else None

    def remember_batch_size(self, size: int) -> None:
        """Keep it for a resume."""
        path = self.path / "env.json"
        write_atomically(path, json.dumps({**_json(path), "batch_size": size}, indent=2))

    def describe(self) -> None:
        """Make the settings that `accept_changes` has brought those of this run: to be called when its weights fit."""
        if self.accepted is not None:
            _describe(self.path, *self.accepted)
            self.accepted = None

    def close(self) -> None:
        """Let another process work here."""
        if self.lock is not None:
            self.lock.close()


def open_run(settings: Settings, name: str, data: str) -> RunFolder:
    """The folder that `settings.resume` asks for, locked, with its description written.

    `data` is the fingerprint of the file list. Errors: RunRefused where a resume would change results, where the path
    is no run, or where another process works there; OSError where the folder cannot be written.
    """
    root = Path(settings.log.folder).expanduser()
    if settings.resume in ("auto", "never"):
        folder, notes = _own_folder(root, name, settings, data)
    else:
        folder, notes = _named_folder(Path(settings.resume).expanduser(), settings, data)
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder, notes, _lock(folder))
    if settings.resume == "auto" and (folder / "config.yaml").is_file():
        # Fatal settings are the same, or the name were another; unless a default has changed since.
        run.notes += _differences(folder, settings, data)
    if settings.accept_changes:
        run.accepted = settings, data
    else:
        _describe(folder, settings, data)
    return run


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old text or the new one."""
    scratch = path.with_name(f".tmp-{path.name}")
    with scratch.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(scratch, path)


def _own_folder(root: Path, name: str, settings: Settings, data: str) -> tuple[Path, list[str]]:
    folder = root / f"{name}-{config.identity(settings, data)}"
    notes = _siblings(root, name, folder, settings, data)
    if settings.resume == "auto":
        return folder, notes
    number = 2
    first = folder
    while folder.exists():
        folder = first.with_name(f"{first.name}-{number}")
        number += 1
    return folder, notes


def _named_folder(folder: Path, settings: Settings, data: str) -> tuple[Path, list[str]]:
    if not (folder / "config.yaml").is_file():
        raise RunRefused(f"resume: expected auto, never or a run folder (with a config.yaml), given {folder}")
    return folder, _differences(folder, settings, data)


def _differences(folder: Path, settings: Settings, data: str) -> list[str]:
    """What has changed since this run began, as warnings. Errors: RunRefused where it changes results."""
    old, new = _stored(folder), config.flat(settings)
    differences = config.changed(old, new, "fatal")
    if differences and not settings.accept_changes:
        lines = "\n".join(f"  {line}" for line in differences)
        raise RunRefused(
            f"resume: {folder} was made with other settings that change results:\n{lines}\n"
            f"resume={shlex.quote(str(folder))} accept_changes=true goes on with the new ones; "
            f"init.from={shlex.quote(str(folder))} without resume starts a new run from its weights"
        )
    if old.get("optim.global_batch", new["optim.global_batch"]) != new["optim.global_batch"]:
        raise RunRefused(
            f"optim.global_batch: expected {old['optim.global_batch']}, that of {folder}, whose place among the videos "
            f"is counted in it, given {new['optim.global_batch']}; accept_changes does not change it, a new run with "
            f"init.from={shlex.quote(str(folder))} may"
        )
    notes = [f"warning: accepted, and it changes results from here on: {line}" for line in differences]
    notes += [f"warning: changed since this run began: {line}" for line in config.changed(old, new, "warn")]
    if _fingerprint(folder) not in (None, data):
        notes.append("warning: the list of videos is not the one that this run began with")
    return notes


def _siblings(root: Path, name: str, own: Path, settings: Settings, data: str) -> list[str]:
    """What differs in other runs of the same name, and how to continue them."""
    notes = []
    same_name = re.compile(rf"{re.escape(name)}-[0-9a-f]{{6}}(-[0-9]+)?")
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if not same_name.fullmatch(folder.name) or not (folder / "config.yaml").is_file():
            continue
        if folder == own or folder.name.startswith(f"{own.name}-"):
            continue
        try:
            differences = config.changed(_stored(folder), config.flat(settings), "fatal")
        except RunRefused as error:  # of another version, say: no reason to refuse this run
            notes.append(f"another run: {error}")
            continue
        if not differences and _fingerprint(folder) != data:
            differences = ["other videos"]
        if differences:
            shown = "; ".join(differences[:3]) + (f" and {len(differences) - 3} more" if len(differences) > 3 else "")
            notes.append(f"another run, {folder}, differs ({shown}); resume={shlex.quote(str(folder))} continues it")
    return notes[-3:]


def _stored(folder: Path) -> dict[str, Any]:
    try:
        return config.flat(configfile.load(folder / "config.yaml", stored=True))
    except configfile.SettingsError as error:
        raise RunRefused(f"{folder / 'config.yaml'} cannot be read: {error.mistakes[0]}") from None


def _fingerprint(folder: Path) -> str | None:
    return _json(folder / "env.json").get("data")


def _json(path: Path) -> dict[str, Any]:
    """What a file of the run folder says; nothing where it is absent, or damaged by a crash of the machine."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _lock(folder: Path) -> Any:
    handle = (folder / ".lock").open("w")
    try:
        # A record lock: unlike flock's it is not inherited, so loader processes that outlive a killed run by some
        # seconds do not keep the next one out.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        handle.close()
        raise RunRefused(f"another process is working in {folder}") from None
    return handle


def _describe(folder: Path, settings: Settings, data: str) -> None:
    write_atomically(folder / "config.yaml", configfile.dump(settings))
    module = "fastjepa" if Path(sys.argv[0]).name == "__main__.py" else "fastjepa.train"
    with (folder / "command.txt").open("a", encoding="utf-8") as out:
        out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {shlex.join(['python', '-m', module, *sys.argv[1:]])}\n")
    versions = {name: _version(name) for name in ("torch", "numpy", "av", "triton")}
    env = {"fastjepa": __version__, "python": platform.python_version(), "system": platform.platform(), **versions}
    write_atomically(folder / "env.json", json.dumps({**_json(folder / "env.json"), **env, "data": data}, indent=2))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
