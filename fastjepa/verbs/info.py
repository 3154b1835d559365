"""`python -m fastjepa info`: what this machine offers and what a run takes of it; or how a run is doing."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fastjepa import machine, runstate
from fastjepa.config import Settings
from fastjepa.configfile import load
from fastjepa.exits import Exit
from fastjepa.verbs.parsing import Parser, say

WIDTH = 28


def main(arguments: Sequence[str]) -> Exit:
    """Print what there is. Errors: ValueError for an argument that is neither a run nor settings."""
    parser = Parser("info", "Versions, devices, decoders, and which implementation a run takes here and why.")
    parser.add_argument(
        "of",
        nargs="*",
        metavar="RUN | SETTINGS.yaml",
        help="run folders: are they alive, how far are they; or settings: what they take here, not the defaults",
    )
    given = parser.read(arguments)
    paths = [Path(text).expanduser() for text in given.of]
    if paths and not paths[0].is_file():
        for number, run in enumerate(paths):
            if number:
                say("")
            _show("", runstate.told(run))
        return Exit.DONE
    if len(paths) > 1:
        raise ValueError(f"info: expected one settings file, or run folders, given {len(paths)} files")
    path = paths[0] if paths else None
    settings = Settings() if path is None else load(path)
    wanted = settings.runtime.device
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"runtime.device: there is no CUDA device on this machine, given {wanted}")
    _show("versions", machine.versions())
    _show("machine", machine.devices())
    _show("decoders", machine.decoders())
    _show(f"a step of {'the default settings' if path is None else path} on {device}", machine.chosen(settings, device))
    return Exit.DONE


def _show(title: str, lines: Iterable[tuple[str, str]]) -> None:
    if title:
        say(f"{title}:")
    indent = "  " if title else ""
    for label, text in lines:
        say(f"{indent}{label:<{WIDTH - len(indent)}}{text}")
