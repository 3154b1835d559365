"""What a collection holds: the videos of a folder, a list or shards, in a fixed order, and what of it is left out.

Images are data where there is no video at all: beside videos they are thumbnails far more often. Then single images and
folders of frames are left out of what was searched, and so are shards beside loose videos, which are mostly what these
were unpacked from; whoever wants both names them in a list.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastjepa.data.decode import VideoError
from fastjepa.data.images import is_image, sequence
from fastjepa.data.shards import COMPRESSED, is_shard
from fastjepa.data.tables import Table, table

EXTENSIONS = frozenset(
    f".{name}"
    for name in "3gp asf avi flv m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv ts vob webm wmv".split()  # noqa: SIM905
)
VIDEO, IMAGE, FRAMES, SHARD, PACKED = "video", "image", "folder of frames", "shard", "compressed archive"
PLURALS = {FRAMES: "folders of frames"}
READERS = 16  # of shards at a time: walking over one is waiting for the disk


class Named(NamedTuple):
    """A path, what it is, and the label that a list gives it."""

    path: str
    kind: str
    label: str | None = None


class Item(NamedTuple):
    """A video: its name, what it is, and its label; `shard` counts archives, and files outside of them, from 0.

    Of kind SHARD is a shard that cannot be read to its end: it stands behind its members, so that it is named and
    counted as unreadable wherever videos are read.
    """

    name: str
    kind: str
    label: str | None
    shard: int
    member: bool


@dataclass
class Found:
    """The items of a collection in order, (path, reason) of shards that are damaged, and sentences to be said."""

    items: list[Item]
    damaged: list[tuple[str, str]]
    notes: list[str]

    def phrase(self) -> str:
        """What there is, such as "40 videos, 1200 videos in 12 shards"."""
        parts = []
        for kind in (VIDEO, FRAMES, IMAGE):
            if loose := sum(item.kind == kind and not item.member for item in self.items):
                parts.append(_count(loose, kind))
            if shards := [item.shard for item in self.items if item.kind == kind and item.member]:
                parts.append(f"{_count(len(shards), kind)} in {_count(len(set(shards)), SHARD)}")
        return ", ".join(parts)


def kind_of(name: str) -> str | None:
    """What a file is, by its name alone; None for what is no data."""
    lower = name.lower()
    if Path(lower).suffix in EXTENSIONS:
        return VIDEO
    if is_image(name):
        return IMAGE
    if os.path.basename(name).startswith("."):
        return None
    return SHARD if is_shard(name) else PACKED if lower.endswith(COMPRESSED) else None


def walk(root: Path, closed: Callable[[OSError], None]) -> Iterator[Named]:
    """All that may be data under a folder, sorted; `closed` hears of folders that cannot be read."""
    entered: set[str] = set()
    # Linked folders are followed, each once, so that a circle of links ends.
    for folder, folders, files in os.walk(root, followlinks=True, onerror=closed):
        if (real := os.path.realpath(folder)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        frames = sequence(files) is not None
        if frames:
            yield Named(folder, FRAMES)
        for name in sorted(files):
            kind = kind_of(name)
            if kind is not None and not (frames and kind == IMAGE):
                yield Named(os.path.join(folder, name), kind)


def gather(named: Sequence[Named], *, listed: bool) -> Found:
    """Put the members of shards in their place and leave out what is no data; nothing that was `listed` is left out."""
    items: list[Item] = []
    damaged: list[tuple[str, str]] = []
    left: Counter[str] = Counter()
    unsaved: str | None = None
    with ThreadPoolExecutor(READERS) as pool:
        tables = pool.map(_table, [one.path for one in named if one.kind == SHARD])
        for number, (path, kind, label) in enumerate(named):
            if kind == PACKED:
                left[PACKED] += 1
                continue
            if kind != SHARD:
                items.append(Item(path, kind, label, number, False))
                continue
            content = next(tables)
            unsaved = unsaved or content.unsaved
            members = [
                Item(f"{path}::{name}", inside, content.label(name), number, True)
                for name in content.members
                if (inside := kind_of(name)) in (VIDEO, IMAGE) and not os.path.basename(name).startswith("._")
            ]
            items += members
            if content.reason is not None:
                items.append(Item(path, SHARD, None, number, False))
                damaged.append((path, content.reason))
            elif not members:
                left[f"{SHARD} without videos"] += 1
    shards = {item.shard for item in items if item.member or item.kind == SHARD}
    if shards and not listed and any(item.kind == VIDEO and not item.member for item in items):
        # The archives that loose videos came in, far more often than others.
        left[SHARD] += len(shards)
        items = [item for item in items if item.shard not in shards]
        damaged = []
    if any(item.kind == VIDEO for item in items):
        beside = [item for item in items if item.kind in (IMAGE, FRAMES) and (item.member or not listed)]
        left.update(item.kind for item in beside)
        gone = set(beside)
        items = [item for item in items if item not in gone]
    return Found(items, damaged, _notes(left, damaged, unsaved))


def _table(shard: str) -> Table:
    try:
        return table(shard)
    except VideoError as error:
        return Table(reason=str(error))


def _notes(left: Counter[str], damaged: list[tuple[str, str]], unsaved: str | None) -> list[str]:
    notes = []
    if beside := [_count(left[kind], kind) for kind in (SHARD, FRAMES, IMAGE) if left[kind]]:
        notes.append(f"left out beside videos: {', '.join(beside)}")
    if packed := left[PACKED]:
        notes.append(f"left out as only a plain .tar can be read at a place: {_count(packed, PACKED)}")
    if bare := left[f"{SHARD} without videos"]:
        notes.append(f"left out for want of videos: {_count(bare, SHARD)}")
    if damaged:
        notes.append(f"damaged: {_count(len(damaged), SHARD)}, {damaged[0][0]}: {damaged[0][1]}")
    if unsaved is not None:
        notes.append(f"what shards hold cannot be kept for the next start ({unsaved})")
    return notes


def _count(number: int, kind: str) -> str:
    return f"{number} {kind if number == 1 else PLURALS.get(kind, f'{kind}s')}"
