"""What this machine can do at the shapes of V-JEPA pretraining: the ceilings that any implementation is held against.

    python -m bench.ceilings --stages gemm,attention

Needs torch alone; under five minutes on an H100 or H200. Each stage writes a result file of its own, anew after every
row, so that a run cut short keeps what it has. Figures come from back-to-back calls on the same inputs: what fits the
L2 cache stays there, which makes the small cases upper bounds.
"""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.ceilings.cases import STAGES
from bench.ceilings.shapes import FULL, QUICK, Shapes
from bench.files import Row, made, table, write_results
from bench.machine import device_name, facts, slug
from bench.measure import measure


def run_stage(stage: str, shapes: Shapes, device: torch.device, folder: Path, command: str) -> list[Row]:
    """Measure all cases of one stage into one result file."""
    quick = shapes is QUICK
    name = "cpu" if device.type == "cpu" else slug(device_name(device))
    # A quick run has its own file name as well as its mark: it must not replace a ceiling measured the same day.
    path = folder / f"ceilings-{stage}-{name}-{datetime.now(UTC):%Y-%m-%d}{'-quick' if quick else ''}.json"
    start = time.perf_counter()
    header, rows = facts(device, command, quick=quick), []
    for case in STAGES[stage](shapes):
        rows.append(measure(case, device, shapes.seconds))
        write_results(path, header, rows, complete=False)
    write_results(path, header, rows, complete=True)
    skipped = sum("skipped" in row for row in rows)
    seconds = time.perf_counter() - start
    print(f"{stage}: {len(rows)} rows, {skipped} skipped, {seconds:.1f} s, {path.name}", file=sys.stderr, flush=True)
    return rows


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; wrong input ends the program with one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ceilings",
        description="Measure GEMM, copy, attention and optimizer ceilings at V-JEPA's shapes.",
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="comma-separated, in the order to run them (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="result folder (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto is CUDA where there is one (default)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, seconds on a CPU: shows that it runs, measures nothing"
    )
    options = parser.parse_args(arguments)
    options.stages = list(dict.fromkeys(options.stages.split(",")))
    for stage in options.stages:
        if stage not in STAGES:
            parser.exit(2, f"--stages: expected some of {','.join(STAGES)}, got {stage!r}.\n")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(
            2, "--device: expected a machine with CUDA for 'cuda', but torch finds none; 'cpu' works anywhere.\n"
        )
    try:
        made(options.out, "--out")
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    return options


def plain_command(options: argparse.Namespace) -> str:
    """The command line that repeats this run. Without the folder: it changes no figure and may be a private path."""
    words = ["python -m bench.ceilings"]
    if options.stages != list(STAGES):
        words.append(f"--stages {','.join(options.stages)}")
    if options.device != "auto":
        words.append(f"--device {options.device}")
    if options.quick:
        words.append("--quick")
    return " ".join(words)


def main(arguments: list[str]) -> None:
    """Run the chosen stages one after another and print one table."""
    options = parse_arguments(arguments)
    use_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")
    if device.type == "cpu" and not options.quick:
        print("On a CPU the full shapes take hours; --quick shows that everything runs.", file=sys.stderr, flush=True)
    shapes, command = QUICK if options.quick else FULL, plain_command(options)
    rows = []
    for stage in options.stages:
        found = run_stage(stage, shapes, device, options.out, command)
        rows += [{**row, "name": f"{stage}.{row['name']}"} for row in found]
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
