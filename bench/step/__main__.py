"""Where the time of a training step goes: its components, and its most expensive kernels, as a text file.

    python -m bench.step --models vith --way packed

Nothing is compared here: `pytest bench/test_step.py --benchmark-only` times ways of taking a step beside each other.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.files import made
from bench.machine import device_name, facts, slug
from bench.step.profile import write_profile
from bench.step.ways import MODELS, WAYS, Runner, prepare, settings_of

DRAWS = 50
QUICK_DRAWS = 8


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; wrong input ends the program with one sentence and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description="Profile whole training steps.")
    parser.add_argument("--models", default="vith", help="comma-separated (default: %(default)s)")
    parser.add_argument("--way", default="packed", help=f"one of {', '.join(WAYS)} (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="result folder (default: %(default)s)")
    parser.add_argument("--trace", action="store_true", help="the Chrome trace too (large)")
    parser.add_argument("--quick", action="store_true", help="a tiny model in place of each: shows that it runs")
    options = parser.parse_args(arguments)
    options.models = list(dict.fromkeys(options.models.split(",")))
    for name, given, valid in (("--models", options.models, MODELS), ("--way", [options.way], WAYS)):
        for one in given:
            if one not in valid:
                parser.exit(2, f"{name}: expected one of {','.join(valid)}, given {one!r}.\n")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "--device: expected a machine with CUDA for 'cuda', given none; 'cpu --quick' works anywhere.\n")
    try:
        made(options.out, "--out")
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    return options


def plain_command(options: argparse.Namespace) -> str:
    """The command line that repeats this run. Without the folder: it changes no figure and may be a private path."""
    words = ["python -m bench.step", f"--models {','.join(options.models)}", f"--way {options.way}"]
    words += [f"--{name}" for name in ("trace", "quick") if getattr(options, name)]
    if options.device != "cuda":
        words.append(f"--device {options.device}")
    return " ".join(words)


def profile_model(options: argparse.Namespace, model: str, device: torch.device) -> None:
    """Write the profile of one way of one model, and print it."""
    settings = settings_of(model, options.way, quick=options.quick)
    batches = prepare(settings, QUICK_DRAWS if options.quick else DRAWS, device)
    name = "cpu" if device.type == "cpu" else slug(device_name(device))
    # A quick run has its own file name: it must not replace a figure of the same day.
    end = "-quick" if options.quick else ""
    path = options.out / f"profile-{model}-{options.way}-{name}-{datetime.now(UTC):%Y-%m-%d}{end}.txt"
    head = [f"{model}, {options.way}" + (f" ({settings.model.name} in place of it)" if options.quick else "")]
    head += [f"{key} {value}" for key, value in facts(device, plain_command(options), quick=options.quick).items()]
    print(write_profile(Runner(settings, device), batches, path, head, trace=options.trace))
    print(path.name)


def main(arguments: list[str]) -> None:
    """Profile the chosen models one after another."""
    options = parse_arguments(arguments)
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
        if not options.quick:
            print("On a CPU the full models take minutes a step; --quick shows that everything runs.", file=sys.stderr)
    for model in options.models:
        profile_model(options, model, device)


if __name__ == "__main__":
    main(sys.argv[1:])
