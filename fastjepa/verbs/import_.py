"""`python -m fastjepa import`: weights from elsewhere as a folder that every verb and `init.from` read."""

from collections.abc import Sequence

from fastjepa.exits import Exit
from fastjepa.handover import hand_over
from fastjepa.verbs.parsing import Parser, say

ABOUT = (
    "Take weights in: a .pth.tar of the public V-JEPA code, a .pt of V-JEPA 2, or a folder in the transformers layout. "
    "OUT becomes a folder with all networks that FILE has, which init.from, embed, probe and export read. The licence "
    "is printed and goes along. Nothing in FILE is executed, and values stay the same to the bit."
)


def main(arguments: Sequence[str]) -> Exit:
    """Errors: ValueError for an argument, or for weights that cannot be read."""
    parser = Parser("import", ABOUT)
    parser.add_argument("source", metavar="FILE", help="a .pth.tar or .pt of the public code, or a folder")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--network",
        choices=("target_encoder", "encoder"),
        help="the encoder that lies in model.safetensors (target_encoder); the others lie beside it",
    )
    given = parser.read(arguments)
    for line in hand_over(given.source, given.out, network=given.network, everything=None):
        say(line)
    return Exit.DONE
