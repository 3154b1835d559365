"""Whole training steps on one device, from clips on it to the updated target encoder: the library's ways of taking one.

    python -m bench.steps --models vitl,vith --ways packed,reference
    python -m bench.steps --models vith --profile

Needs the published settings files alone: clips are random bytes on the device. All ways of a model take the same steps
in turns of a few, so that a device that slows down slows all of them; where they do not fit into its memory together,
one follows another and the first comes again at the end. The first steps (compilation, allocator, kernel choice) are
not timed, nor is the first of every turn. One result file a model, anew after every turn; a way that cannot run is a
row with its reason. Ends with 1 where losses of two ways differ by more than rounding explains.
"""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.machine import device_name, facts, slug
from bench.steps.profile import write_profile
from bench.steps.rounds import measure_model
from bench.steps.rows import Bench
from bench.steps.ways import CLIP_BATCHES, MODELS, WAYS, Runner, plan_of, prepare, settings_of
from fastjepa.gpus import peak_flops

LEAST_DRAWS = 50
LEAST_QUICK_DRAWS = 8


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; wrong input ends the program with one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.steps", description="Time whole training steps, in several ways."
    )
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--ways", default=None, help=f"comma-separated (default: {','.join(WAYS)}; packed to profile)")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of every way (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--budget", type=float, help="seconds, shared by the models: no way is begun late in its share")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="result folder (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="times nothing; the most expensive kernels of one way")
    parser.add_argument("--trace", action="store_true", help="with --profile: the Chrome trace too (large)")
    parser.add_argument("--quick", action="store_true", help="a tiny model in place of each: shows that it runs")
    options = parser.parse_args(arguments)
    options.models = list(dict.fromkeys(options.models.split(",")))
    options.ways = list(dict.fromkeys((options.ways or ("packed" if options.profile else ",".join(WAYS))).split(",")))
    for name, given, valid in (("--models", options.models, MODELS), ("--ways", options.ways, WAYS)):
        for one in given:
            if one not in valid:
                parser.exit(2, f"{name}: expected some of {','.join(valid)}, given {one!r}.\n")
    if options.steps < 1:
        parser.exit(2, f"--steps: expected at least 1, given {options.steps}.\n")
    if options.profile and len(options.ways) > 1:
        parser.exit(2, f"--ways: expected one way beside --profile, given {','.join(options.ways)}.\n")
    if options.trace and not options.profile:
        parser.exit(2, "--trace: expected beside --profile, given without it.\n")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "--device: expected a machine with CUDA for 'cuda', given none; 'cpu --quick' works anywhere.\n")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.exit(2, f"--out: expected a folder that can be written, given {str(options.out)!r}: {error.strerror}.\n")
    return options


def plain_command(options: argparse.Namespace) -> str:
    """The command line that repeats this run. Without the folder: it changes no figure and may be a private path."""
    words = ["python -m bench.steps", f"--models {','.join(options.models)}", f"--ways {','.join(options.ways)}"]
    if not options.profile:
        words.append(f"--steps {options.steps}")
    words += [f"--{name}" for name in ("profile", "trace", "quick") if getattr(options, name)]
    if options.device != "cuda":
        words.append(f"--device {options.device}")
    if options.budget is not None:
        words.append(f"--budget {options.budget:g}")
    return " ".join(words)


def file_of(options: argparse.Namespace, what: str, device: torch.device, suffix: str) -> Path:
    """A quick run has its own file name as well as its mark: it must not replace a figure of the same day."""
    name = "cpu" if device.type == "cpu" else slug(device_name(device))
    end = "-quick" if options.quick else ""
    return options.out / f"{what}-{name}-{datetime.now(UTC):%Y-%m-%d}{end}{suffix}"


def prepare_bench(options: argparse.Namespace, model: str, device: torch.device, seconds: float) -> Bench:
    """Settings, plans and batches of one model, and the header of its file."""
    settings = {way: settings_of(model, way, quick=options.quick) for way in options.ways}
    plans = {way: plan_of(s, device) for way, s in settings.items()}
    first = settings[options.ways[0]]
    draws = max(LEAST_QUICK_DRAWS if options.quick else LEAST_DRAWS, options.steps)
    plan = plans[options.ways[0]]
    header = {
        **facts(device, plain_command(options), quick=options.quick),
        "model": model if not options.quick else f"{first.model.name} in place of {model}",
        "batch": plan.batch_size,
        "tokens": {"clip": plan.tokens, "context": plan.context, "target": plan.target},
        "draws": draws,
        "clip_batches": CLIP_BATCHES,
        "flop_per_clip": plan.flop_per_clip,
        "peak_flops": peak_flops(device),
    }
    path = file_of(options, f"steps-{model}", device, ".json")
    batches = prepare(first, draws, device)
    return Bench(path, header, settings, plans, batches, device, options.steps, seconds)


def profile_model(options: argparse.Namespace, model: str, device: torch.device) -> None:
    """Write the profile of one way of one model, and print it."""
    (way,) = options.ways
    settings = settings_of(model, way, quick=options.quick)
    batches = prepare(settings, LEAST_QUICK_DRAWS if options.quick else LEAST_DRAWS, device)
    path = file_of(options, f"profile-{model}-{way}", device, ".txt")
    head = [f"{model}, {way}" + (f" ({settings.model.name} in place of it)" if options.quick else "")]
    head += [f"{key} {value}" for key, value in facts(device, plain_command(options), quick=options.quick).items()]
    print(write_profile(Runner(settings, device), batches, path, head, trace=options.trace))
    print(path.name)


def main(arguments: list[str]) -> int:
    """Measure or profile the chosen models one after another; the exit code."""
    options = parse_arguments(arguments)
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
        if not options.quick:
            print("On a CPU the full models take hours; --quick shows that everything runs.", file=sys.stderr)
    if options.profile:
        for model in options.models:
            profile_model(options, model, device)
        return 0
    began, tables, agree = time.perf_counter(), [], True
    for number, model in enumerate(options.models, 1):
        end = float("inf") if options.budget is None else began + options.budget * number / len(options.models)
        bench = prepare_bench(options, model, device, end - time.perf_counter())
        measure_model(bench)
        tables.append(bench.table())
        agree &= bench.agree()
        del bench  # its batches are on the device, where the next model needs the room
    print("\n\n".join(tables))
    if not agree:
        print("Losses of two ways differ by more than rounding explains: see `parity`.", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
