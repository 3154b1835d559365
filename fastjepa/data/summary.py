"""An index in lines for a person: what there is, what is wrong with it, and what will be slow."""

import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from statistics import median

from fastjepa.data.index import DALI_CPU, DALI_GPU, PYAV, Index
from fastjepa.data.indexfile import Entry

MOST_KINDS, MOST_REASONS, MOST_NAMES = 6, 10, 3


def summarise(index: Index, frames: int, stride: int) -> list[str]:
    """Lines of `python -m fastjepa data`, for clips of `frames` at `stride`."""
    good = [entry for entry in index.entries if entry.reason is None]
    bad = [entry for entry in index.entries if entry.reason is not None]
    moving = [entry for entry in good if not entry.still]
    opened, total = index.opened, len(index.entries)
    lines = [
        f"videos     {shown(index.videos.description)}: {len(good):,} readable, {len(bad):,} not; "
        f"{byte_size(sum(entry.size for entry in index.entries))}",
        f"index      {shown(str(index.file))}; {opened:,} opened for it, {total - opened:,} known or not there to open",
    ]
    if moving:
        lines += [f"length     {_length(moving)}", *_short(moving, frames * stride)]
    if stills := len(good) - len(moving):
        lines.append(f"images     {stills:,} single images: a clip of one repeats it")
    if good:
        lines += [
            f"size       {_kinds(good, lambda e: f'{e.width} x {e.height}')}",
            f"codec      {_kinds(good, lambda e: f'{e.codec} {e.pixel_format}')}",
            *_rated(moving),
            *_rotated(good),
            *_seeking(moving, frames * stride),
            f"decoders   {_decoders(good)}",
        ]
    return lines + _wrong(bad, index)


def shown(name: str) -> str:
    """A name or sentence with whatever is no printable character written out: file names may hold line ends, too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _length(good: list[Entry]) -> str:
    counts = [entry.frames for entry in good]
    seconds = [entry.duration for entry in good if entry.duration is not None]
    unknown = len(good) - len(seconds)
    without = f" (without {unknown:,} of unknown rate)" if unknown else ""
    return (
        f"{_span(sum(seconds))} in all{without}; {median(counts):,.0f} frames in the median video, "
        f"{min(counts):,} to {max(counts):,} in all of them"
    )


def _short(good: list[Entry], span: int) -> list[str]:
    short = sum(entry.frames < span for entry in good)
    if not short:
        return []
    return [
        f"short      {short:,} ({_share(short, good)}) have fewer frames than a clip spans ({span}): their last frame "
        "is repeated, or data.filter_short=true passes them over"
    ]


def _rated(moving: list[Entry]) -> list[str]:
    rates = _kinds(moving, lambda e: "unknown" if e.rate is None else f"{float(e.rate):.4g} frames/s")
    return [f"rate       {rates}"] if moving else []


def _rotated(good: list[Entry]) -> list[str]:
    turned = [entry for entry in good if entry.rotation]
    return [f"rotation   {_kinds(turned, lambda e: f'{e.rotation} degrees')}"] if turned else []


def _seeking(good: list[Entry], span: int) -> list[str]:
    """Before a clip that begins anywhere, half a group of pictures is decoded for nothing: at most one that it has."""
    if not good:
        return []
    gops = [entry.gop for entry in good]
    lines = [f"key frames every {median(gops):.3g} frames in the median, every {max(gops):.3g} at most"]
    sparse = [entry for entry in good if entry.gop > span and entry.seekable]
    if sparse:
        wasted = sum(min(entry.gop, entry.frames) / 2 for entry in sparse) / len(sparse)
        lines.append(
            f"slow: in {len(sparse):,} ({_share(len(sparse), good)}) they are further apart than a clip spans, so that "
            f"some {wasted:.0f} frames are decoded before a clip of {span}"
        )
    sequential = sum(not entry.seekable for entry in good)
    if sequential:
        lines.append(
            f"slow: {sequential:,} ({_share(sequential, good)}) have no usable times (AVI, transport streams) and are "
            "decoded from their start"
        )
    return [f"seeking    {lines[0]}", *(f"           {line}" for line in lines[1:])]


def _decoders(good: list[Entry]) -> str:
    can = Counter(name for entry in good for name in entry.decoders)
    av1 = sum(entry.codec == "av1" and DALI_GPU in entry.decoders for entry in good)
    newer = f" ({av1:,} of them AV1: not on A100 and H100)" if av1 else ""
    return f"PyAV {can[PYAV]:,}, DALI on a GPU {can[DALI_GPU]:,}{newer}, DALI on a CPU {can[DALI_CPU]:,}"


def _wrong(bad: list[Entry], index: Index) -> list[str]:
    lines = [f"no entry   {shown(path)}: {shown(reason)}" for path, reason in index.folders[:MOST_REASONS]]
    if len(index.folders) > MOST_REASONS:
        lines.append(f"no entry   {len(index.folders) - MOST_REASONS:,} more folders")
    if not bad:
        return lines
    reasons = Counter(str(entry.reason) for entry in bad)
    lines.append(f"unreadable {len(bad):,} files")
    for reason, count in reasons.most_common(MOST_REASONS):
        names = [shown(entry.path) for entry in bad if entry.reason == reason][:MOST_NAMES]
        more = ", ..." if count > len(names) else ""
        lines.append(f"           {count:,} x {shown(reason)}: {', '.join(names)}{more}")
    if len(reasons) > MOST_REASONS:
        lines.append(f"           {len(reasons) - MOST_REASONS:,} more reasons")
    if not index.unsaved:
        lines.append(f"           all of them: grep '\"reason\"' {shown(shlex.quote(str(index.file)))}")
    return lines


def _kinds(entries: Iterable[Entry], kind: Callable[[Entry], str]) -> str:
    counted = Counter(kind(entry) for entry in entries)
    common = counted.most_common(MOST_KINDS)
    rest = len(counted) - len(common)
    more = f", {counted.total() - sum(n for _, n in common):,} in {rest:,} more" if rest else ""
    if len(counted) == 1:
        return f"{common[0][0]}, all"
    return ", ".join(f"{name} ({n:,})" for name, n in common) + more


def _share(count: int, good: list[Entry]) -> str:
    share = count / len(good)
    return f"{share:.0%}" if share >= 0.01 else "under 1 %"


def byte_size(number: float) -> str:
    """Bytes in a unit that fits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} minutes" if seconds < 7200 else f"{seconds / 3600:,.3g} hours"
