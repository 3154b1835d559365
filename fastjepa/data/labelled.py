"""Labelled collections for probes: what `source` labels, folders of class folders, and a test collection of its own."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fastjepa.data.images import is_image
from fastjepa.data.mixture import open_collections
from fastjepa.data.search import FRAMES, IMAGE, SHARD, Named, walk
from fastjepa.data.source import SYNTHETIC, Task, Videos, collected

# Of a collection that has a test collection of its own, this share is learned from and the rest chooses.
LEARNED = 5 / 6
_PARTS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))


def open_labelled(
    path: str | Mapping[str, object],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    folders: bool = True,
) -> Videos:
    """As `open_collections`; with `folders`, a folder whose videos have no labels takes the names of its subfolders.

    `tasks` is empty where there are no labels. Errors: as `open_videos`.
    """
    videos = open_collections(path, seed, progress)
    if videos.tasks or not folders or not isinstance(path, str) or path.startswith(SYNTHETIC):
        return videos
    root = Path(path).expanduser()
    return class_folders(root) if root.is_dir() else videos


def class_folders(root: Path) -> Videos:
    """What lies in the subfolders of `root`, at any depth: the name of the first one is the class.

    Numbered images that lie in a class folder itself are single images, not frames of a video. What lies beside the
    class folders is left out. Errors: ValueError where there are no two classes.
    """
    named: list[Named] = []
    for one in walk(root, _refuse):
        inside = Path(one.path).relative_to(root).parts
        if one.kind == FRAMES and len(inside) == 1:
            files = sorted(file for file in Path(one.path).iterdir() if is_image(file.name))
            named += [Named(str(file), IMAGE, inside[0]) for file in files]
        elif one.kind != SHARD and len(inside) > 1:
            named.append(one._replace(label=inside[0]))
    classes = {one.label for one in named}
    if len(classes) < 2:
        raise ValueError(
            f"{root}: expected labels, or a folder for each of two classes or more, found {len(classes)} such folders"
        )
    if {str(name).lower() for name in classes} <= _PARTS:
        raise ValueError(
            f"{root}: its folders are parts, not classes: give {root / min(map(str, classes), key=_learned_first)} as "
            "the collection, and the one to test on beside it"
        )
    return collected(named, root, f"in {len(classes)} class folders of {root}", listed=False)


def with_test(videos: Videos, test: Videos) -> Videos:
    """One collection for probes: learned from and chosen on `videos`, tested on `test`.

    Classes are one by their names. Errors: ValueError where the two have no task in common, or `test` a class that
    cannot be learned.
    """
    tasks: dict[str, Task] = {}
    for name in videos.tasks.keys() & test.tasks.keys():
        own, other = videos.tasks[name], test.tasks[name]
        number = {label: place for place, label in enumerate(own.classes)}
        unknown = [label for label in other.classes if label not in number]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ValueError(f"the test videos have classes that the others have not: {unknown[0]}{more}")
        mapped = np.array([number[label] for label in other.classes])[other.labels]
        tasks[name] = Task(np.concatenate([own.labels, mapped]), own.classes)
    if not tasks:
        raise ValueError("the test videos and the others have no labels for the same task")
    order = np.concatenate([videos.splits[name] for name in ("train", "validation", "test")])
    learned = int(len(order) * LEARNED)
    return Videos(
        videos.paths + test.paths,
        videos.train,
        hashlib.sha256(f"{videos.fingerprint} {test.fingerprint}".encode()).hexdigest(),
        f"{videos.description}; tested on {test.description}",
        {name: tasks[name] for name in videos.tasks if name in tasks},
        {
            "train": order[:learned],
            "validation": order[learned:],
            "test": np.concatenate(list(test.splits.values())) + len(videos.paths),
        },
    )


def _learned_first(name: str) -> tuple[bool, str]:
    return not name.lower().startswith("train"), name


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}")
