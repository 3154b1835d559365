"""`python -m fastjepa embed WEIGHTS PATH --out FILE`: features of videos, window by window."""

import argparse
import time
from collections.abc import Callable, Sequence

from fastjepa.data.replaced import TooManyBadFiles
from fastjepa.exits import Exit
from fastjepa.features import Hop, embed_to_file
from fastjepa.features.embedding import POOLS
from fastjepa.features.files import STORED
from fastjepa.verbs.parsing import Parser, complain, say, whole_number
from fastjepa.verbs.progress import duration, progress

ABOUT = (
    "Features of a video, a folder, a list, a shard or synthetic://. A clip of the length that the model was trained "
    "on is moved over every video, side by side unless --every says otherwise; the last one ends with the video. Files "
    "that cannot be read are named and left out."
)
MOST_NAMED = 10


def main(arguments: Sequence[str]) -> Exit:
    """Errors: ValueError for an argument, weights that cannot be read or a path without videos."""
    given = _parse(arguments)
    began = time.monotonic()
    named = 0

    def tell(text: str) -> None:
        nonlocal named
        named += 1
        if named <= MOST_NAMED:
            complain(text)

    try:
        with progress() as show:
            report = embed_to_file(
                given.weights,
                given.path,
                given.out,
                store=given.store,
                pool=given.pool,
                every=given.every,
                central=given.center,
                stride=given.stride,
                fps=given.fps,
                network=given.network,
                batch=given.batch,
                device=given.device,
                dtype=given.dtype,
                workers=given.workers,
                max_bad=given.max_bad,
                progress=show,
                say=tell,
            )
    except TooManyBadFiles as error:
        complain(str(error))
        return Exit.TOO_MANY_BAD_FILES
    seconds = time.monotonic() - began
    shape = ", ".join(str(size) for size in (report.windows, *report.shape))
    say(f"features   [{shape}] of {report.windows:,} windows of {report.videos:,} videos, {given.pool}, {given.store}")
    if report.bad:
        say(f"left out   {len(report.bad):,} files that cannot be read, {report.bad[0][0]} among them")
    say(f"time       {duration(seconds)}, {report.windows / seconds:.3g} windows/s")
    say(f"written    {given.out}")
    return Exit.DONE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("embed", ABOUT)
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="a run, a checkpoint in it, an exported folder or a .pth.tar or .pt"
    )
    parser.add_argument("path", metavar="PATH", help="a video, a folder, a list, a shard (.tar) or synthetic://...")
    parser.add_argument("--out", metavar="FILE", required=True, help="the file to make: .safetensors or .parquet")
    parser.add_argument(
        "--pool",
        choices=POOLS,
        default="mean",
        help="mean over all tokens, one vector a window (the default); slots: one for each time slot; tokens: all",
    )
    parser.add_argument(
        "--every", metavar="HOP", type=_hop, help="from window to window: source frames (32) or seconds (0.5s)"
    )
    parser.add_argument(
        "--center", action="store_true", help="one window, in the middle of the video, as probes have it"
    )
    parser.add_argument(
        "--stride", metavar="N", type=whole_number(1), help="source frames from frame to frame of a clip"
    )
    parser.add_argument("--fps", metavar="F", type=_positive, help="frames/s of a clip, in place of the stride")
    parser.add_argument(
        "--network", choices=("target_encoder", "encoder"), help="which encoder (target_encoder, as evaluations use it)"
    )
    parser.add_argument(
        "--batch", metavar="N", type=whole_number(1), help="windows of one forward pass (8; 32 on a GPU)"
    )
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of matrix products; bfloat16 suits GPUs",
    )
    parser.add_argument("--store", choices=tuple(STORED), default="float32", help="precision in the file")
    parser.add_argument(
        "--workers", metavar="N", type=whole_number(0), help="processes that decode (one a processor, at most 16)"
    )
    parser.add_argument(
        "--max-bad",
        metavar="SHARE",
        type=_share,
        default=0.01,
        help="share of unreadable files that ends it with exit code 3 (10 are always tolerated; 0.01)",
    )
    given = parser.read(arguments)
    if given.stride is not None and given.fps is not None:
        raise ValueError(f"--stride: expected without --fps, which takes its place, given {given.stride}")
    if given.center and given.every is not None:
        raise ValueError(f"--every: expected without --center, which is one window of a video, given {given.every}")
    return given


def _hop(text: str) -> str:
    try:
        Hop.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _positive(text: str) -> float:
    return _number(text, "a number above 0", lambda value: 0 < value < 1e6)


def _share(text: str) -> float:
    return _number(text, "a share from 0 to 1", lambda value: 0 <= value <= 1)


def _number(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
        if fits(value):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected {expected}, given {text!r}")
