"""Several collections in one run: their videos behind one another, each with its weight."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fastjepa.data.source import Task, Videos, open_videos


def open_collections(
    path: str | Mapping[str, Any],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    closed: Callable[[OSError], None] | None = None,
) -> Videos:
    """The videos of `data.path`: of one collection, or of several with their weights. Errors: see `open_videos`.

    What a data set says of its clips is not read here, but makes another run.
    """
    if isinstance(path, str):
        return open_videos(path, seed, progress, closed)
    weights = [float(one) if isinstance(one, (int, float)) else one.weight for one in path.values()]
    mixed = mix([(open_videos(one, seed, progress, closed), weight) for one, weight in zip(path, weights)])
    own = [{} if isinstance(one, (int, float)) else one.model_dump(exclude={"weight"}) for one in path.values()]
    named = [{key: value for key, value in one.items() if value is not None} for one in own]
    if not any(named):
        return mixed
    fingerprint = hashlib.sha256(json.dumps([mixed.fingerprint, named], sort_keys=True).encode()).hexdigest()
    return replace(mixed, fingerprint=fingerprint)


def mix(parts: list[tuple[Videos, float]]) -> Videos:
    """One list of the videos of all parts. Weights are those of `Collection`; they change which run this is.

    Labels are kept where parts have the same tasks as the first labelled one. Classes are one by their names; where
    these are numbers, which mean something else in each list, those of the first labelled part are kept alone. Videos
    of other parts are in no split.
    """
    if len(parts) == 1:
        return parts[0][0]
    total = sum(weight for _, weight in parts)
    starts = np.cumsum([0, *(len(videos.paths) for videos, _ in parts)])
    names = [[videos.fingerprint, weight / total] for videos, weight in parts]
    described = "; ".join(f"{weight / total:.1%} {videos.description}" for videos, weight in parts)
    mixed = Videos(
        [path for videos, _ in parts for path in videos.paths],
        np.concatenate([videos.train + start for (videos, _), start in zip(parts, starts)]),
        hashlib.sha256(json.dumps(names).encode()).hexdigest(),
        f"{len(parts)} collections: {described}",
        mixed=tuple(
            replace(one, videos=one.videos + start, weight=one.weight * weight)
            for (videos, weight), start in zip(parts, starts)
            for one in videos.collections
        ),
    )
    labelled = next((videos for videos, _ in parts if videos.tasks), None)
    if labelled is None:
        return mixed
    named = not any(label.lstrip("-").isdecimal() for task in labelled.tasks.values() for label in task.classes)
    same = [videos is labelled or (named and videos.tasks.keys() == labelled.tasks.keys()) for videos, _ in parts]
    mixed = replace(mixed, description=f"{mixed.description} (labels of {sum(same)} of the {len(parts)} collections)")
    with_labels = [(videos, int(start)) for (videos, _), start, taken in zip(parts, starts, same) if taken]
    tasks = {name: _task(name, with_labels, len(mixed.paths)) for name in labelled.tasks}
    splits = {
        name: np.concatenate([videos.splits[name] + start for videos, start in with_labels]) for name in labelled.splits
    }
    # The splits of one part are in random order; of several in turns, so that a first part of them has some of each.
    turns = {name: np.argsort(_places(with_labels, name), kind="stable") for name in splits}
    return replace(mixed, tasks=tasks, splits={name: split[turns[name]] for name, split in splits.items()})


def _places(parts: list[tuple[Videos, int]], name: str) -> np.ndarray:
    """How far each video of a split is in the split of its part, 0 to 1."""
    return np.concatenate([np.arange(len(v.splits[name])) / max(1, len(v.splits[name])) for v, _ in parts])


def _task(name: str, parts: list[tuple[Videos, int]], total: int) -> Task:
    """One task of all parts: class numbers by the names of the classes, -1 for videos without."""
    every = {label for videos, _ in parts for label in videos.tasks[name].classes}
    classes = tuple(sorted(every, key=lambda text: (len(text), text)))
    labels = np.full(total, -1)
    for videos, start in parts:
        task = videos.tasks[name]
        own = np.array([classes.index(label) for label in task.classes])
        labels[start : start + len(videos.paths)] = own[task.labels]
    return Task(labels, classes)
