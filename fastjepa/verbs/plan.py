"""`python -m fastjepa plan SETTINGS.yaml`: what a run comes to on one GPU, without starting it."""

from collections.abc import Sequence

import torch

from fastjepa import gpus
from fastjepa.build import build_jepa, build_masks
from fastjepa.configfile import from_command_line
from fastjepa.exits import Exit
from fastjepa.forecast import forecast, heading
from fastjepa.memory import usable_memory
from fastjepa.plan import describe, make_plan
from fastjepa.verbs.parsing import say

USAGE = "usage: python -m fastjepa plan SETTINGS.yaml [--gpu NAME] [key=value ...]"
HELP = f"""{USAGE}

What a run comes to on one GPU, without starting it: tokens, schedule, work and memory, expected clips/s and days.

  SETTINGS.yaml   a recipe, such as configs/vitl.yaml
  --gpu NAME      for this GPU: {", ".join(gpus.GPUS)}; this machine's where it has one
  key=value       other settings than those of the file; python -m fastjepa train --help lists all"""


def main(arguments: Sequence[str]) -> Exit:
    """Done also where the run would not fit: that is what was asked, and the last line answers it.

    Errors: ValueError.
    """
    if "-h" in arguments or "--help" in arguments:
        say(HELP)
        return Exit.DONE
    rest, name = _take_gpu(arguments)
    if not rest:
        raise ValueError(USAGE)
    settings, _ = from_command_line(rest)
    gpu, reason = (gpus.named(name), "named by --gpu") if name is not None else gpus.of_this_machine()
    masks = build_masks(settings)
    with torch.device("meta"):  # shapes only: a plan of the largest model costs no memory
        jepa = build_jepa(settings)
    # What a GPU would do: `auto` compiles there.
    compiled = settings.runtime.compile is not False
    plan = make_plan(settings, jepa, masks, usable_memory(gpu), compiled=compiled)
    for line in (heading(gpu, reason), *describe(settings, plan, jepa), *forecast(settings, plan, gpu)):
        say(line)
    return Exit.DONE


def _take_gpu(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without `--gpu NAME` (or `--gpu=NAME`), and the name. Errors: ValueError where it is missing."""
    rest, name = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--gpu":
            name = next(remaining, "")
        elif argument.startswith("--gpu="):
            name = argument.partition("=")[2]
        else:
            rest.append(argument)
    if name == "":
        raise ValueError("--gpu: expected the name of a GPU, given nothing, for example --gpu h200")
    return rest, name
