"""`python -m fastjepa export`: weights as a folder in the transformers layout, or as the public code's file."""

import argparse
from collections.abc import Sequence

from fastjepa.exits import Exit
from fastjepa.handover import DTYPES, hand_over
from fastjepa.verbs.parsing import Parser, say

ABOUT = (
    "Hand weights over. The default is a folder in the transformers layout: config.json, model.safetensors with the "
    "published key names, and a model card that carries the licence. --format meta writes a file that the public code "
    "evaluates: V-JEPA's .pth.tar, with model.positions=rope_v2 V-JEPA 2's .pt. Values stay the same to the bit."
)


def main(arguments: Sequence[str]) -> Exit:
    """Errors: ValueError for an argument, or for weights that cannot be read."""
    parser = Parser("export", ABOUT)
    parser.add_argument(
        "source", metavar="RUN", help="a run, a checkpoint in it, an exported folder, a .pth.tar or .pt"
    )
    parser.add_argument("out", metavar="OUT", help="the folder (or with --format meta the file) to make")
    parser.add_argument(
        "--format", choices=("transformers", "meta"), default="transformers", help="the layout (transformers)"
    )
    parser.add_argument(
        "--all", action="store_true", help="all three networks, so that a run can begin from the folder (init.from)"
    )
    _shared(parser)
    given = parser.read(arguments)
    report = hand_over(
        given.source,
        given.out,
        given.format,
        network=given.network,
        everything=given.all,
        dtype=given.dtype,
        licence=given.licence,
        trained_on=given.trained_on,
    )
    for line in report:
        say(line)
    return Exit.DONE


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--network",
        choices=("target_encoder", "encoder"),
        help="the encoder that the folder is for (target_encoder, as evaluations use it)",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="convert the values; without it they stay as stored")
    parser.add_argument("--licence", metavar="NAME", help="names the licence on the card, where none is carried along")
    parser.add_argument(
        "--trained-on", metavar="TEXT", help="for the card: what data; without it the last name in data.path"
    )
