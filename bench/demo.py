"""The demo over several seeds: what the README says of it comes from the file that this writes.

    python bench/demo.py --seeds 0,1,2
    python bench/demo.py --recipe configs/demo_noised.yaml --seeds 0,1,2

Runs `python -m fastjepa.train RECIPE` once a seed, from its first line to its last, and keeps the accuracies of the
probe and the seconds of the whole command, by the clock and of the processor. `--pictures` copies the pictures of the
first seed to docs/. Result file and pictures begin with the recipe's name.
"""

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # also runs as a script

from bench.files import Row, write_results
from bench.machine import facts, slug

ROOT = Path(__file__).parents[1]
RECIPE = "configs/demo.yaml"


def run_seed(recipe: str, seed: int, folder: Path, more: list[str]) -> tuple[float, float, Path]:
    """(seconds of the whole command, of the processor, its run folder). SystemExit with the code of a failed run."""
    command = [
        sys.executable,
        "-m",
        "fastjepa.train",
        recipe,
        f"optim.seed={seed}",
        f"log.folder={folder}",
    ]
    started, used = time.perf_counter(), _children_seconds()
    done = subprocess.run([*command, *more], cwd=ROOT, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.returncode)  # the run has said why
    run = max(folder.glob(f"{Path(recipe).stem}-*"), key=lambda path: path.stat().st_mtime)
    return seconds, _children_seconds() - used, run


def _children_seconds() -> float:
    """Processor seconds of all processes started so far: what a busy machine leaves comparable."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def rows_of(seed: int, seconds: float, cpu_seconds: float, run: Path) -> list[Row]:
    """Accuracies in percent, the last figures of the log, and the seconds of one run."""
    parameters: dict[str, Any] = {"seed": seed}
    probe = json.loads(max((run / "probe").glob("step-*.json")).read_text())
    rows: list[Row] = [
        {"name": f"{result['task']} {kind}", "value": 100 * result[kind], "unit": "%", "parameters": parameters}
        for result in probe["results"]
        for kind in ("trained", "untrained", "pixels", "chance")
    ]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    rows.append({"name": "loss ratio at the end", "value": last["loss_ratio"], "unit": "", "parameters": parameters})
    rows.append({"name": "clips_per_s", "value": last["clips_per_s"], "unit": "clips/s", "parameters": parameters})
    rows.append({"name": "whole command", "value": seconds, "unit": "s", "parameters": parameters})
    rows.append({"name": "processor time", "value": cpu_seconds, "unit": "s", "parameters": parameters})
    return rows


def main(arguments: list[str]) -> None:
    """Run every seed and write one result file."""
    parser = argparse.ArgumentParser(prog="demo.py", description="Run the demo over several seeds.")
    parser.add_argument("--recipe", default=RECIPE, help="from the repository's root (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="result folder")
    parser.add_argument("--pictures", action="store_true", help="copy the pictures of the first seed to docs/")
    parser.add_argument("settings", nargs="*", help="further key=value settings of the run")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = [] if options.recipe == RECIPE else ["--recipe", options.recipe]
    command = shlex.join(["python", "bench/demo.py", *recipe, "--seeds", options.seeds, *options.settings])
    header = facts(device, command, quick=bool(options.settings))
    stem = Path(options.recipe).stem
    path = options.out / f"{stem}-{slug(header['device'])}-{header['date'][:10]}.json"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        for seed in seeds:
            seconds, cpu_seconds, run = run_seed(options.recipe, seed, Path(scratch), options.settings)
            rows += rows_of(seed, seconds, cpu_seconds, run)
            write_results(path, header, rows, complete=seed == seeds[-1])
            if options.pictures and seed == seeds[0]:
                for name in ("loss.png", "masks.png", "pca.webp", "similarity.png"):
                    shutil.copy(run / "viz" / name, ROOT / "docs" / f"{stem}-{name}")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
