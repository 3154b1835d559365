"""python -m fastjepa_kernels info | explain | compile | tune: what is here and runs, what it needs, what is fastest."""

import argparse
import json
import sys
from pathlib import Path

import torch

import fastjepa_kernels
from fastjepa_kernels import config, dispatch, resources
from fastjepa_kernels import tune as tuner
from fastjepa_kernels.testing.compile_only import TARGETS

OPERATIONS = [name for name in fastjepa_kernels.__all__ if hasattr(torch.ops.fastjepa, name)]


def main(arguments: list[str], clock: tuner.Clock | None = None) -> int:
    """Run one verb; returns the exit code. `clock` stands for the GPU's in `tune`: for tests on a CPU."""
    parser = argparse.ArgumentParser(prog="python -m fastjepa_kernels", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("info", help="versions and devices")
    verbs.add_parser("explain", help="which implementation of every operation runs here, and why")
    compiling = verbs.add_parser("compile", help="registers, spills, shared memory of every kernel; needs no GPU")
    compiling.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    compiling.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains this")
    compiling.add_argument("--processes", type=int, default=2, help="compilers at a time (default: %(default)s)")
    compiling.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    compiling.add_argument("--table", type=Path, metavar="FILE", help="write the figures as a sorted TSV table")
    compiling.add_argument(
        "--check", type=Path, metavar="FILE", help="compare with such a table; exit code 1 if changed"
    )
    tuning = verbs.add_parser("tune", help="measure launch settings on this GPU and write them to a file")
    tuning.add_argument("--operation", required=True, choices=config.operations(), metavar="NAME", help="%(choices)s")
    tuning.add_argument("--shapes", nargs="+", default=[], metavar="rows=13440,width=1280", help="instead of the usual")
    tuning.add_argument("--dtypes", default="bf16", help="comma-separated: bf16, fp16, fp32 (default: %(default)s)")
    tuning.add_argument("--rounds", type=int, default=30, help="timings of each candidate (default: %(default)s)")
    tuning.add_argument("--out", type=Path, metavar="FILE", help="joins what is there (default: NAME.json)")
    options = parser.parse_args(arguments)
    if options.verb == "info":
        print("\n".join(_info()))
    elif options.verb == "explain":
        x = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
        print("\n".join(dispatch.explain(name, x) for name in OPERATIONS))
        # What `attention` takes depends on its inputs; this is a ViT's usual head.
        q = torch.empty(1, 2, 1, 64, dtype=torch.bfloat16, device=x.device)
        print(fastjepa_kernels.explain_attention(q, q, q))
    elif options.verb == "tune":
        return _tune(options, clock)
    else:
        targets = options.targets.split(",")
        unknown = [target for target in targets if target not in TARGETS]
        if unknown:
            parser.error(f"--targets: expected some of {', '.join(TARGETS)}, given {unknown[0]}")
        if not dispatch.has_triton() or dispatch.interpreted():
            parser.error("compile: Triton is not installed, or TRITON_INTERPRET=1 keeps it from compiling")
        return _compile(options, targets)
    return 0


def _info() -> list[str]:
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    lines = [f"fastjepa_kernels {fastjepa_kernels.__version__}", f"torch {torch.__version__}"]
    if dispatch.has_triton():
        import triton

        lines.append(f"triton {triton.__version__}" + (", interpreted" if dispatch.interpreted() else ""))
    else:
        lines.append("triton: not installed")
    return [*lines, f"CUDA devices: {', '.join(devices) or 'none'}"]


def _compile(options: argparse.Namespace, targets: list[str]) -> int:
    version, before = resources.read_table(options.check) if options.check else ("", [])
    print(f"{'kernel':<36}{'target':<8}" + "".join(f"{column:>13}" for column in resources.FIGURES))
    rows = []
    for row in resources.compiled(targets, options.processes, options.only):
        rows.append(row)
        figures = "".join(f"{row[column]:>13}" for column in resources.FIGURES)
        print(f"{row['kernel']:<36}{row['target']:<8}{figures}", flush=True)
    here = resources.triton_version()
    if options.table:
        resources.write_table(options.table, rows, here)
    if options.json:
        options.json.write_text(json.dumps({"triton": here, "rows": rows}, indent=1) + "\n")
    if not options.check:
        return 0
    if version != here:
        print(f"{options.check} was made with Triton {version}, this is {here}")
    before = [row for row in before if row["target"] in targets and options.only in row["kernel"]]
    changed = resources.differences(before, rows)
    print("\n".join(changed) or f"as in {options.check}")
    return 1 if changed else 0


def _tune(options: argparse.Namespace, clock: tuner.Clock | None) -> int:
    if clock is None and not (torch.cuda.is_available() and dispatch.has_triton()):
        print("tune: needs a CUDA device and Triton, and this machine has not both", file=sys.stderr)
        return 2
    names = {name: dtype for dtype, name in config.DTYPES.items() if dtype != torch.float64}
    out = options.out or Path(f"{options.operation}.json")
    try:
        if out.exists():  # a file that is not as it should be must not cost a measurement
            config.parse(out.read_text(), options.operation, str(out))
        dtypes = [names[name] for name in options.dtypes.split(",")]
        rows, timings = tuner.tune(
            options.operation,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            clock=clock or tuner.cuda_clock,
            shapes=[tuner.shape_from(text) for text in options.shapes],
            dtypes=dtypes,
            rounds=options.rounds,
            say=lambda line: print(line, flush=True),
        )
        beside = tuner.save(options.operation, out, rows, timings)
    except KeyError as error:
        print(f"tune: --dtypes: expected some of {', '.join(names)}, got {error.args[0]}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {len(rows)} rows; timings in {beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
