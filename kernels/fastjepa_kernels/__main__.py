"""python -m fastjepa_kernels info | explain | compile: what is here, what would run, what the kernels need."""

import argparse
import sys

import torch

import fastjepa_kernels
from fastjepa_kernels import dispatch
from fastjepa_kernels.testing.compile_only import TARGETS, compile_for

OPERATIONS = [name for name in fastjepa_kernels.__all__ if name not in ("explain", "use")]


def main(arguments: list[str]) -> int:
    """Run one verb; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastjepa_kernels", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("info", help="versions and devices")
    verbs.add_parser("explain", help="which implementation of every operation runs here, and why")
    compiling = verbs.add_parser("compile", help="registers, spills, shared memory of every kernel; needs no GPU")
    compiling.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.verb == "info":
        print("\n".join(_info()))
    elif options.verb == "explain":
        x = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
        print("\n".join(dispatch.explain(name, x) for name in OPERATIONS))
    else:
        targets = options.targets.split(",")
        unknown = [target for target in targets if target not in TARGETS]
        if unknown:
            parser.error(f"--targets: expected some of {', '.join(TARGETS)}, given {unknown[0]}")
        if not dispatch.has_triton() or dispatch.interpreted():
            parser.error("compile: Triton is not installed, or TRITON_INTERPRET=1 keeps it from compiling")
        _compile(targets)
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


def _compile(targets: list[str]) -> None:
    from fastjepa_kernels._triton.catalogue import shipped

    columns = ("registers", "spilled", "shared", "tensor_core", "float64")
    print(f"{'kernel':<28}{'target':<8}" + "".join(f"{column:>13}" for column in columns))
    for entry in shipped():
        for target in targets:
            needs = compile_for(target, entry.kernel, entry.signature, entry.constants, warps=entry.warps)
            figures = "".join(f"{getattr(needs, column):>13}" for column in columns)
            print(f"{entry.name:<28}{target:<8}{figures}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
