"""`python -m fastjepa viz RUN`: pictures of what a run has learned, and one page of them all."""

import argparse
import re
from collections.abc import Sequence

import torch

from fastjepa.exits import Exit
from fastjepa.pictures import CLIPS, Wanted, draw
from fastjepa.verbs.parsing import Parser, say, whole_number

DESCRIPTION = """Draw what a run has learned: masks over frames, feature maps as colours (a strip and an animation),
likeness to a chosen patch, curves of all figures, and index.html, one page of it all that needs nothing beside it.
A run may still be training: what it has saved last is drawn."""


def main(arguments: Sequence[str]) -> Exit:
    """Draw, and name the files. Errors: ValueError, OSError."""
    parser = Parser("viz", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="a run folder, a checkpoint in it, or other weights (with --data)")
    parser.add_argument(
        "--data", metavar="PATH", help="other videos than those of the run: a folder, a list, one video"
    )
    parser.add_argument(
        "--video",
        metavar="N|PATH",
        action="append",
        default=[],
        help="this video: its number in the list, or its path; may be given several times",
    )
    parser.add_argument(
        "--clips", metavar="N", type=whole_number(1, 16), default=CLIPS, help="clips to show (default: %(default)s)"
    )
    parser.add_argument(
        "--patch",
        metavar="SLOT,ROW,COLUMN",
        type=_patch,
        help="the patch of the first clip whose likes are sought (default: the least usual one)",
    )
    parser.add_argument(
        "--network",
        choices=("target_encoder", "encoder"),
        default="target_encoder",
        help="whose features (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FOLDER", help="where pictures go (default: viz/ in the run folder)")
    parser.add_argument(
        "--device", type=_device, default="cpu", help="cpu, cuda or cuda:N (default: cpu, which disturbs no training)"
    )
    given = parser.read(arguments)
    wanted = Wanted(given.clips, tuple(given.video), given.patch)
    drawn = draw(
        given.run,
        out=given.out,
        data=given.data,
        wanted=wanted,
        network=given.network,
        device=given.device,
        say=say,
    )
    for note in drawn.notes:
        say(f"note       {note}")
    for path in drawn.files:
        say(f"made       {path}")
    return Exit.DONE


def _patch(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+,\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"expected three whole numbers SLOT,ROW,COLUMN, given {text!r}")
    return tuple(int(number) for number in text.split(","))


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, given {text!r}")
    if text != "cpu" and int(text.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"this machine has {torch.cuda.device_count()} CUDA devices, given {text}")
    return text
