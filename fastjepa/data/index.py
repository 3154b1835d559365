"""The index of a collection of videos: what is known of every file, where only what changed is opened again."""

import os
import secrets
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from fastjepa.data.decode import NO_PERMISSION, NOT_OPENED, NOT_REACHED, VideoError, VideoInfo
from fastjepa.data.indexfile import Entry, NotAnIndex, default_file, read_index, write_index
from fastjepa.data.media import absolute, probe, status
from fastjepa.data.processes import Lost, each_apart
from fastjepa.data.source import Videos, open_videos

# A file has this long to be read, whatever its size, and its bytes at the pace of a slow network disk on top.
LEAST_SECONDS, LEAST_PACE = 60.0, 5e6
SAVE_SECONDS = 120.0  # what a killed scan loses at most

PYAV, DALI_GPU, DALI_CPU = "pyav", "dali_gpu", "dali_cpu"
# DALI's decoders. NVDEC takes 8 bits of 4:2:0 of all of these, AV1 not on every GPU (`decoders.choose.decodes_av1`);
# what more it takes differs by codec and GPU. MJPEG is left out, which one version of DALI refuses on GPUs. DALI's own
# CPU build has lost the patented codecs.
GPU_CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "av1", "mpeg4"))
CPU_CODECS = frozenset(("vp8", "vp9", "mjpeg"))
GPU_PIXELS = frozenset(("yuv420p", "yuvj420p"))
GPU_LEAST_SIDE = 160  # refused have been 32 and 128; each codec has a limit of its own below this
GPU_LARGEST_SIDE = {"h264": 4096, "vp8": 4096, "mpeg4": 2048}
GPU_LARGEST = 8192


@dataclass
class Index:
    """The entries of a collection in its order; `opened` of its files were opened for it, `file` keeps it.

    `unsaved`: why it could not be kept, else None. `folders`: those inside the collection that cannot be read, (path,
    reason) pairs; what is in them is not known.
    """

    file: Path
    videos: Videos
    entries: list[Entry]
    opened: int = 0
    unsaved: str | None = None
    folders: list[tuple[str, str]] = field(default_factory=list)


def update_index(
    path: str,
    file: Path | None = None,
    workers: int = 1,
    *,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None],
) -> Index:
    """Bring the index of `data.path` up to date: list, stat, open what is new or changed, write the file anew.

    `file` is `default_file(path)` where none is given; one that is no index is kept beside it, with `say` of that. The
    files are opened in `workers` processes, with `progress(done, total)`. What is known is written down every two
    minutes, and where an exception ends the scan (an interrupt), too. Errors: ValueError with one sentence for a path
    that does not exist, holds no video or is no valid list; OSError where the index can be neither read nor written.
    """
    folders: list[tuple[str, str]] = []

    def closed(error: OSError) -> None:
        folders.append((os.fspath(error.filename), f"the folder cannot be read: {error.strerror}"))

    try:
        videos = open_videos(path, 0, progress, closed)
    except ValueError as error:
        if not folders:
            raise
        raise ValueError(f"data.path: {folders[0][0]}: {folders[0][1]}") from error
    file = default_file(path) if file is None else file
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(f"the index cannot be written: no permission for {file.parent}")
    before, same_library = _known(file, say)

    names = list(dict.fromkeys(absolute(name) for name in videos.paths))  # a list may name a file twice
    entries: dict[str, Entry] = {}
    jobs: list[tuple[str, int, int]] = []
    for name in names:
        known = before.get(name)
        now = _status(name)
        if isinstance(now, Entry):
            entries[name] = now
        elif known is not None and (known.size, known.mtime_ns) == now and not _may_be_gone(known, same_library):
            entries[name] = known
        else:
            jobs.append((name, *now))

    index = Index(file, videos, [], len(jobs), folders=folders)

    def save() -> None:
        try:
            write_index(file, path, entries.values())
            index.unsaved = None
        except OSError as error:  # a full disk is no reason to lose what was found
            index.unsaved = f"the index {file} cannot be written: {error.strerror}"

    saved = time.monotonic()
    try:
        with closing(each_apart(examine, jobs, workers, _limit)) as answers:
            for done, (number, answer) in enumerate(answers, start=1):
                entry = Entry(*jobs[number], reason=answer.reason) if isinstance(answer, Lost) else answer
                entries[entry.path] = entry
                if progress is not None:
                    progress(done, len(jobs))
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
    finally:
        if before != entries or not same_library or not file.exists():
            save()
    index.entries = [entries[name] for name in names]
    return index


def examine(job: tuple[str, int, int]) -> Entry:
    """Open a file: (path, size, mtime_ns) -> its entry."""
    path, size, mtime_ns = job
    try:
        info = probe(path)
    except VideoError as error:
        return Entry(path, size, mtime_ns, str(error))
    return Entry(
        path,
        size,
        mtime_ns,
        None,
        info.frames,
        info.width,
        info.height,
        info.rate,
        info.duration,
        info.codec,
        info.pixel_format,
        info.rotation,
        round(info.frames / info.key_frames, 2),
        info.pts is not None,
        decoders(info),
        info.still,
    )


def decoders(info: VideoInfo) -> tuple[str, ...]:
    """Which decoders can take a readable video, by codec, pixel format, size and how its frames are told apart.

    Source of the first three: NVDEC application note.
    """
    if info.unshown:  # on a GPU they would be counted as frames
        return (PYAV,)
    sides = (info.width, info.height)
    largest = GPU_LARGEST_SIDE.get(info.codec, GPU_LARGEST)
    # Without times a decode from start to end is the only measure, and that of a GPU is another one.
    gpu = info.codec in GPU_CODECS and info.pixel_format in GPU_PIXELS and info.pts is not None
    names = [PYAV]
    if gpu and min(sides) >= GPU_LEAST_SIDE and max(sides) <= largest:
        names.append(DALI_GPU)
    if info.codec in CPU_CODECS:
        names.append(DALI_CPU)
    return tuple(names)


def _status(name: str) -> Entry | tuple[int, int]:
    """(size, mtime_ns), or the entry of what is no regular file, is empty or is not there; opens no video."""
    try:
        return status(name)
    except VideoError as error:
        return Entry(name, 0, 0, str(error))


def _may_be_gone(entry: Entry, same_library: bool) -> bool:
    """Is this a reason that may hold no longer though the file is the same: permissions, or what PyAV cannot do yet?"""
    if entry.reason is None:
        return False
    return not same_library or entry.reason.startswith((NO_PERMISSION, NOT_OPENED, NOT_REACHED))


def _limit(job: tuple[str, int, int]) -> float:
    return LEAST_SECONDS + job[1] / LEAST_PACE


def _known(file: Path, say: Callable[[str], None]) -> tuple[dict[str, Entry], bool]:
    """(entries of an earlier scan, whether PyAV is still the same); none where there is no index that can be used."""
    try:
        return read_index(file)
    except FileNotFoundError:
        return {}, False
    except NotAnIndex as error:
        aside = file.with_name(f"{file.name}.{secrets.token_hex(3)}.old")
        os.rename(file, aside)
        say(f"{error}; it is kept as {aside}, and the index made anew")
    except ValueError as error:
        say(f"{error}; it is made anew")
    return {}, False
