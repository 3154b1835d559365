"""A collection once more, re-encoded for fast training, in a folder of its own.

```
OUT/videos.csv          the list: data.path takes it, with the labels of the source
OUT/prepared.jsonl      the recipe, then a line for each file that is done, or failed and why
OUT/clips/a.mp4         one for each source, under its path relative to the collection
```

A file is there under its name only when it is whole. What is done is not done again unless the source changed, so an
interrupted preparation goes on, and a later one takes only what is new.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path

import av

from fastjepa.data import shards
from fastjepa.data.decode import VideoError
from fastjepa.data.indexfile import Entry
from fastjepa.data.media import absolute
from fastjepa.data.processes import Lost, each_apart
from fastjepa.data.reencode import UNFINISHED, Made, Recipe, reencode
from fastjepa.data.source import Videos

FORMAT, VERSION = "fastjepa prepared videos", 1
LEDGER, LIST, SCRATCH = "prepared.jsonl", "videos.csv", ".unfinished"
# Nothing that another file would not meet too: it is of no use to go on.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
OUTSIDE = "outside"  # what a list names that is not under its folder
# A process has this long for a file, and its pixels at a pace far below that of any processor on top.
LEAST_SECONDS, LEAST_PIXELS_A_SECOND = 120.0, 1e6

Job = tuple[Entry, str, Recipe, str]  # a video, its target, how, and the folder of unfinished files


@dataclass(frozen=True)
class Done:
    """A source that was re-encoded, or the `reason` why not. `size`, `mtime_ns`: of the source, which tell it apart."""

    source: str
    size: int
    mtime_ns: int
    target: str
    frames: int = 0
    made: int = 0  # bytes
    reason: str | None = None


@dataclass
class Prepared:
    """What a preparation came to: `done` by source, new ones of them, and sources that are there no longer."""

    done: dict[str, Done]
    new: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Done]:
        """Sources that could not be re-encoded."""
        return [one for one in self.done.values() if one.reason is not None]


class Ledger:
    """prepared.jsonl: one line a file, written when it is done. Half a line, of a killed process, counts as none.

    Errors: ValueError where the folder was prepared by another recipe, or holds something else.
    """

    def __init__(self, out: Path, recipe: Recipe) -> None:
        self.path, self.recipe = out / LEDGER, recipe
        self.done: dict[str, Done] = {}
        if self.path.exists():
            self._read()
        elif out.exists() and any(one.name != SCRATCH for one in out.iterdir()):
            raise ValueError(f"--prepare: expected a new folder or one prepared before, given {out}, which holds files")

    def _read(self) -> None:
        header, *lines = self.path.read_bytes().split(b"\n")[:-1] or [b""]
        try:
            found = json.loads(header)
            same = (found["format"], found["version"]) == (FORMAT, VERSION)
            recipe = Recipe(**found["recipe"]) if same else None
        except (ValueError, KeyError, TypeError):
            recipe = None
        if recipe is None:
            raise ValueError(f"--prepare: {self.path} is not what this program writes: give another folder")
        if recipe != self.recipe:
            before, now = (
                f"--short-side {r.short_side} --gop {r.gop} --quality {r.quality}" for r in (recipe, self.recipe)
            )
            raise ValueError(
                f"--prepare: {self.path.parent} was prepared with {before}, given {now}: the same "
                "or another folder is needed"
            )
        for line in lines:
            try:
                one = Done(**json.loads(line))
            except (ValueError, TypeError):  # torn by a full disk: the file is made again
                continue
            self.done[one.source] = one

    def begin(self) -> None:
        """Write what is known anew, by rename, without the lines that later ones replaced."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "version": VERSION, "recipe": asdict(self.recipe)}
        _replace(self.path, "".join(f"{json.dumps(line)}\n" for line in [header, *map(asdict, self.done.values())]))

    def add(self, one: Done) -> None:
        """Write down a file that is done or failed. Errors: OSError."""
        self.done[one.source] = one
        with self.path.open("a", encoding="ascii") as out:
            out.write(f"{json.dumps(asdict(one))}\n")


def check_place(out: Path, path: str, sources: Iterable[str] = ()) -> None:
    """Errors: ValueError where `out` and the collection lie in each other: it would become a part of itself."""
    place = os.path.realpath(out)
    own = [os.path.realpath(shards.split_name(source)[0]) for source in sources]
    if os.path.isdir(path):
        own.append(os.path.realpath(path))
        if _within(place, own[-1]):
            raise ValueError(f"--prepare: expected a folder outside of the collection {path}, given {out}")
    inside = next((one for one in own if _within(one, place)), None)
    if inside is not None:
        raise ValueError(
            f"--prepare: expected a folder without the collection in it, given {out}, which holds {inside}"
        )


@contextmanager
def alone(out: Path) -> Iterator[Path]:
    """A folder for unfinished files, of this process alone; it is cleared before and after. Errors: ValueError."""
    scratch = out / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--prepare: {out} is being prepared by another process") from None
        try:
            for left in scratch.glob(f"*.{UNFINISHED}"):
                left.unlink(missing_ok=True)
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # what stays is cleared the next time


def prepare(
    videos: Videos,
    entries: dict[str, Entry],
    root: str,
    out: Path,
    ledger: Ledger,
    workers: int,
    progress: Callable[[int, int], None],
) -> Prepared:
    """Re-encode all readable videos of a collection whose names begin at `root`, in so many processes.

    `entries`: those of the index, by absolute name. A file on which a process crashes or hangs costs only itself.
    Errors: ValueError where another process is at it; OSError where `out` cannot be written. What is done by then is
    kept, also where an interrupt ends it.
    """
    good = [one for one in entries.values() if one.reason is None and not one.still]
    with alone(out) as scratch:
        # A file that failed and is gone is nobody's concern any more.
        ledger.done = {name: one for name, one in ledger.done.items() if name in entries or one.reason is None}
        result = Prepared(ledger.done, gone=[source for source in ledger.done if source not in entries])
        ledger.begin()
        targets = _targets(good, ledger.done, root)
        todo = [entry for entry in good if not _is_done(entry, ledger, out)]
        jobs = [(entry, str(out / targets[entry.path]), ledger.recipe, str(scratch)) for entry in todo]
        with closing(each_apart(_one, jobs, workers, _limit)) as answers:
            for number_done, (number, answer) in enumerate(answers, start=1):
                entry = todo[number]
                where = (entry.path, entry.size, entry.mtime_ns, targets[entry.path])
                if isinstance(answer, OSError):
                    raise answer
                if isinstance(answer, Lost):
                    ledger.add(Done(*where, reason=answer.reason))
                else:
                    ledger.add(Done(*where, answer.frames, answer.size))
                result.new.append(entry.path)
                progress(number_done, len(jobs))
        _replace(out / LIST, _listed(videos, ledger.done))
    return result


def _one(job: Job) -> Made | Lost | OSError:
    entry, target, recipe, scratch = job
    try:
        return reencode(entry.path, target, recipe, scratch)
    except VideoError as error:
        return Lost(str(error))
    except (OSError, av.FFmpegError) as error:
        if error.errno in OF_THE_DISK:
            return OSError(error.errno, os.strerror(error.errno), target)
        return Lost(f"it cannot be encoded: {error.strerror}")


def _limit(job: Job) -> float:
    entry = job[0]
    return LEAST_SECONDS + entry.frames * entry.width * entry.height / LEAST_PIXELS_A_SECOND


def _is_done(entry: Entry, ledger: Ledger, out: Path) -> bool:
    one = ledger.done.get(entry.path)
    same = one is not None and one.reason is None and (one.size, one.mtime_ns) == (entry.size, entry.mtime_ns)
    return one is not None and same and (out / one.target).is_file()


def _targets(good: list[Entry], done: dict[str, Done], root: str) -> dict[str, str]:
    """The new file of each source, relative to the folder: as before where it had one, else a free name."""
    targets = {source: one.target for source, one in done.items()}
    files = {target.casefold() for target in targets.values()} | {LEDGER, LIST, SCRATCH}
    folders = {folder for file in files for folder in _folders(file)}
    for entry in good:
        if entry.path not in targets:
            name = _relative(entry.path, root)
            stem = os.path.splitext(name)[0]
            # Of a.mp4 and a.avi in one folder the second becomes a.avi.mp4.
            names = chain((f"{stem}.mp4", f"{name}.mp4"), (f"another-{number}/{name}.mp4" for number in count(2)))
            # A file cannot be a folder too.
            targets[entry.path] = target = next(one for one in names if _is_free(one, files, folders))
            files.add(target.casefold())
            folders |= _folders(target)
    return targets


def _is_free(target: str, files: set[str], folders: set[str]) -> bool:
    name = target.casefold()
    return name not in files and name not in folders and not _folders(target) & files


def _folders(target: str) -> set[str]:
    parts = target.casefold().split(os.sep)
    return {os.sep.join(parts[:n]) for n in range(1, len(parts))}


def _relative(source: str, root: str) -> str:
    """Where a source lies in its collection, in characters that a list file can hold."""
    shard, member = shards.split_name(source)
    relative = os.path.relpath(shard, root)
    if relative.startswith(os.pardir + os.sep) or os.path.isabs(relative):
        relative = os.path.join(OUTSIDE, os.path.relpath(shard, os.sep))
    if member:
        parts = [part for part in member.split("/") if part not in ("", ".", "..")]
        relative = os.path.join(os.path.splitext(relative)[0], *parts)
    readable = relative.encode("utf-8", "backslashreplace").decode()
    return "".join("_" if c == '"' or not c.isprintable() else c for c in readable)


def _listed(videos: Videos, done: dict[str, Done]) -> str:
    """Lines of the list file, in the order of the source; a video without a new file has none."""
    task = videos.tasks.get("label")
    labels = [] if task is None else _writable(task.classes)
    lines = []
    for number, name in enumerate(map(absolute, videos.paths)):
        one = done.get(name)
        if one is not None and one.reason is None:
            lines.append(f'"{one.target}"' + (f",{labels[task.labels[number]]}" if task else ""))
    return "".join(f"{line}\n" for line in lines)


def _writable(classes: Sequence[str]) -> list[str]:
    """The classes in characters that a list file can hold: commas, tabs and line ends part its columns and lines."""
    plain = ["".join(" " if c == "," or not c.isprintable() else c for c in name) for name in classes]
    plain = [" ".join(name.split()) for name in plain]
    if len(set(plain)) == len(plain) and all(plain):
        return plain
    return [f"{number} {name}".strip() for number, name in enumerate(plain)]


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f"{secrets.token_hex(6)}.{UNFINISHED}")
    try:
        with scratch.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
