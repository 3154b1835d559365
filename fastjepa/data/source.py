"""Where videos come from: a folder, a list file, a shard, or the embedded moving shapes."""

import difflib
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from fastjepa.data.images import EXTENSIONS as IMAGE_EXTENSIONS
from fastjepa.data.order import Collection
from fastjepa.data.search import EXTENSIONS, PACKED, SHARD, VIDEO, Named, gather, kind_of, walk
from fastjepa.data.shards import SUFFIX, on_path
from fastjepa.data.synthetic import MOTIONS, SHAPES, MovingShapes, materialise, video_names
from fastjepa.streams import Purpose, stream

SYNTHETIC = "synthetic://"


@dataclass(frozen=True)
class Task:
    """Labels to predict: one class number a video, and the names of the classes."""

    labels: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Videos:
    """A list of videos. `train` are the numbers of those that pretraining sees; labels are for probes only.

    Names are as `media` reads them. `shards`: int64 [videos], ascending, the number of the shard of every video, where
    a file outside of shards counts as one of its own; None where there is no shard. `mixed`: the collections of a
    mixture, with their weights; empty for a single one.
    """

    paths: list[str]
    train: np.ndarray
    fingerprint: str
    description: str
    tasks: dict[str, Task] = field(default_factory=dict)
    splits: dict[str, np.ndarray] = field(default_factory=dict)
    shards: np.ndarray | None = None
    mixed: tuple[Collection, ...] = ()

    @property
    def collections(self) -> tuple[Collection, ...]:
        """What pretraining draws from."""
        shards = None if self.shards is None else self.shards[self.train]
        return self.mixed or (Collection(self.train, 1.0, shards),)


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
        kind = kind_of(place.name)
        if kind is None:
            return _list_file(place)
        videos = collected([Named(str(place), kind)], place.parent, f"in {place}", listed=True)
        return videos if kind == SHARD else replace(videos, description=f"the {kind} {place}")
    siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, siblings, n=1)
    hint = f", nearest: {place.parent / near[0]}" if near else ""
    raise ValueError(f"data.path: no such folder or file: {path}{hint}")


def _folder(root: Path, closed: Callable[[OSError], None]) -> Videos:
    named = list(walk(root, closed))
    if not named:
        looked_for = " ".join(sorted(EXTENSIONS | IMAGE_EXTENSIONS | {SUFFIX}))
        raise ValueError(f"data.path: no video file under {root} (looked for {looked_for})")
    return collected(named, root, f"under {root}", listed=False)


def _refuse(error: OSError) -> None:
    raise ValueError(f"data.path: {error.filename} cannot be read: {error.strerror}")


def _list_file(path: Path) -> Videos:
    named: list[Named] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets write a byte order mark
    except UnicodeDecodeError:
        videos = " ".join(sorted(EXTENSIONS))
        raise ValueError(
            f"data.path: {path} is neither a video ({videos}), an image, a {SUFFIX} nor a text list"
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, label = _split_line(line.strip())
        if number == 1 and name.lower() in ("path", "path label"):
            continue
        if not name:
            raise ValueError(f"data.path: {path} line {number}: expected a path and an optional label, given {line!r}")
        kind = kind_of(name) or VIDEO
        if kind == SHARD and label is not None:
            raise ValueError(
                f"data.path: {path} line {number}: expected a shard without a label (those are inside), given {line!r}"
            )
        named.append(Named(name if os.path.isabs(name) else str(path.parent / name), kind, label))
    if not named:
        raise ValueError(f"data.path: the list {path} names no video")
    return collected(named, path.parent, f"listed in {path}", listed=True)


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


def collected(named: list[Named], root: Path, where: str, *, listed: bool) -> Videos:
    """The videos among `named`, with their labels; names in the fingerprint are relative to `root`.

    Errors: ValueError where there is nothing to read, or a compressed archive was named.
    """
    if listed and (packed := [one.path for one in named if one.kind == PACKED]):
        raise ValueError(
            f"data.path: {packed[0]} is compressed and cannot be read at a place: unpack it to a plain .tar"
        )
    found = gather(named, listed=listed)
    readable = np.array([item.kind != SHARD for item in found.items], dtype=bool)
    if not readable.any():
        if found.damaged:
            raise ValueError(f"data.path: {found.damaged[0][0]}: {found.damaged[0][1]}")
        raise ValueError("; ".join((f"data.path: no video or image {where}", *found.notes)))
    description = "; ".join((f"{found.phrase()} {where}", *found.notes))
    relative = cache(lambda path: os.path.relpath(path, root))  # of a shard once, not for every member
    names = "\n".join(on_path(relative, item.name) for item in found.items)
    tasks = {}
    labels = [item.label for item in found.items]
    labelled = sum(label is not None for label in labels)
    if 0 < labelled < readable.sum():
        description += f" (only {labelled} have labels: they are not used)"
    elif len(set(labels) - {None}) > 1:
        classes = sorted({label for label in labels if label is not None}, key=lambda text: (len(text), text))
        numbers = {label: number for number, label in enumerate(classes)}
        # A damaged shard among its members has no label: it is in no split.
        tasks["label"] = Task(np.array([0 if label is None else numbers[label] for label in labels]), tuple(classes))
    # Pretraining never reads labels, so it may see every video; the probe splits them for itself.
    order = stream(0, Purpose.PROBE, len(labels)).permutation(len(labels))
    shards = np.unique([item.shard for item in found.items], return_inverse=True)[1].astype(np.int64)
    return Videos(
        [item.name for item in found.items],
        np.arange(len(labels)),
        hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
        description,
        tasks,
        _split(order[readable[order]]) if tasks else {},
        shards if any(item.member or item.kind == SHARD for item in found.items) else None,
    )


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
