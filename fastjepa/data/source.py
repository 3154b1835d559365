"""Where videos come from: a folder, a list file, or the embedded moving shapes."""

import difflib
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastjepa.data.order import Collection
from fastjepa.data.synthetic import MOTIONS, SHAPES, MovingShapes, materialise, video_names
from fastjepa.streams import Purpose, stream

EXTENSIONS = frozenset(
    f".{name}"
    for name in "3gp asf avi flv m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv ts vob webm wmv".split()  # noqa: SIM905
)
SYNTHETIC = "synthetic://"


@dataclass(frozen=True)
class Task:
    """Labels to predict: one class number a video, and the names of the classes."""

    labels: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Videos:
    """A list of videos. `train` are the numbers of those that pretraining sees; labels are for probes only.

    `collections`: those of a mixture, with their weights; empty for a single one, which is `train`.
    """

    paths: list[str]
    train: np.ndarray
    fingerprint: str
    description: str
    tasks: dict[str, Task] = field(default_factory=dict)
    splits: dict[str, np.ndarray] = field(default_factory=dict)
    collections: tuple[Collection, ...] = ()


def open_videos(
    path: str,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    closed: Callable[[OSError], None] | None = None,
) -> Videos:
    """The videos of `data.path`. Synthetic ones are drawn and encoded on first use, with `progress(done, total)`.

    A folder inside it that cannot be read is an error, or goes to `closed`, which is called with what the system says.
    The fingerprint hashes relative names, so a folder that moved is the same data. Errors: ValueError with one sentence
    for a path that does not exist, holds no video or is no valid list; OSError where the cache cannot be written.
    """
    if path.startswith(SYNTHETIC):
        return _synthetic(MovingShapes.from_url(path), seed, progress)
    if "://" in path:
        raise ValueError(f"data.path: expected a folder, a list file or {SYNTHETIC}..., given {path!r}")
    place = Path(path).expanduser()
    if place.is_dir():
        return _folder(place, closed or _refuse)
    if place.is_file():
        if place.suffix.lower() in EXTENSIONS:
            return _listed([str(place)], [None], place.parent, f"the video {place}")
        return _list_file(place)
    siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, siblings, n=1)
    hint = f", nearest: {place.parent / near[0]}" if near else ""
    raise ValueError(f"data.path: no such folder or file: {path}{hint}")


def _folder(root: Path, closed: Callable[[OSError], None]) -> Videos:
    paths: list[str] = []
    entered: set[str] = set()
    # Linked folders are followed, each once, so that a circle of links ends.
    for folder, folders, files in os.walk(root, followlinks=True, onerror=closed):
        if (real := os.path.realpath(folder)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        paths += [os.path.join(folder, name) for name in sorted(files) if Path(name).suffix.lower() in EXTENSIONS]
    if not paths:
        raise ValueError(f"data.path: no video file under {root} (looked for {' '.join(sorted(EXTENSIONS))})")
    return _listed(paths, [None] * len(paths), root, f"{len(paths)} videos under {root}")


def _refuse(error: OSError) -> None:
    raise ValueError(f"data.path: {error.filename} cannot be read: {error.strerror}")


def _list_file(path: Path) -> Videos:
    paths, labels = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets write a byte order mark
    except UnicodeDecodeError:
        raise ValueError(
            f"data.path: {path} is neither a video ({' '.join(sorted(EXTENSIONS))}) nor a text list"
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, label = _split_line(line.strip())
        if number == 1 and name.lower() in ("path", "path label"):
            continue
        if not name:
            raise ValueError(f"data.path: {path} line {number}: expected a path and an optional label, given {line!r}")
        paths.append(name if os.path.isabs(name) else str(path.parent / name))
        labels.append(label)
    if not paths:
        raise ValueError(f"data.path: the list {path} names no video")
    return _listed(paths, labels, path.parent, f"{len(paths)} videos listed in {path}")


# A quoted or bare path, then optionally `::`, a comma, a tab or blanks and a label. A bare path may hold blanks, so
# after it and blanks only a number counts as a label.
_LINE = re.compile(
    r'^(?:"(?P<quoted>[^"]*)"|(?P<bare>.*?))'
    r"(?:\s*(?:::|,|\t)\s*(?P<word>[^,\t]*)|\s+(?P<after>(?(quoted)[^,\t]+|-?\d+)))?$"
)


def _split_line(line: str) -> tuple[str, str | None]:
    match = _LINE.match(line)
    assert match is not None, "the bare alternative matches any line"
    name = match["quoted"] if match["quoted"] is not None else match["bare"]
    return name.strip(), match["word"] or match["after"]


def _listed(paths: list[str], labels: list[str | None], root: Path, description: str) -> Videos:
    names = [os.path.relpath(p, root) for p in paths]
    fingerprint = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    every = np.arange(len(paths))
    tasks = {}
    labelled = sum(label is not None for label in labels)
    if 0 < labelled < len(labels):
        description += f" (only {labelled} have labels: they are not used)"
    elif labelled and len(set(labels)) > 1:
        classes = sorted({str(label) for label in labels}, key=lambda text: (len(text), text))
        tasks["label"] = Task(np.array([classes.index(str(label)) for label in labels]), tuple(classes))
    # Pretraining never reads labels, so it may see every video; the probe splits them for itself.
    order = stream(0, Purpose.PROBE, len(paths)).permutation(len(paths))
    return Videos(paths, every, fingerprint, description, tasks, _split(order) if tasks else {})


def _synthetic(spec: MovingShapes, seed: int, progress: Callable[[int, int], None] | None) -> Videos:
    folder = materialise(spec, progress=progress)
    paths = [str(folder / name) for name in video_names(spec)]
    labels = np.array([spec.label(index) for index in range(spec.videos)])
    splits = _split(stream(seed, Purpose.PROBE, spec.videos).permutation(spec.videos))
    return Videos(
        paths,
        np.sort(splits["train"]),
        spec.url(),
        f"{spec.videos} synthetic clips of moving shapes (no real videos: set data.path to train on yours), {folder}",
        {"motion": Task(labels[:, 1], MOTIONS), "shape": Task(labels[:, 0], SHAPES)},
        splits,
    )


def _split(order: np.ndarray) -> dict[str, np.ndarray]:
    """5/8 train, 1/8 validation, 1/4 test."""
    first, second = len(order) * 5 // 8, len(order) * 3 // 4
    return {"train": order[:first], "validation": order[first:second], "test": order[second:]}
