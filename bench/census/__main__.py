"""Launches, bytes and FLOPs of one training step of published models at full size, in both executions, by component.

    python -m bench.census [--json] [--model vitl,vith] [--items 20] [--out bench/results]

Counted on tensors without numbers (`bench.census.steps`), so that any machine gives the same figures, exactly, in
seconds; what a launch and its bytes are stands in `bench.census.counting`. The step: 24 clips of 16 frames at 224 px,
the mean token counts of the published masks, bfloat16 autocast, clipping, AdamW, moving average of the target encoder;
of V-JEPA 2 at 256 px, with rotary positions and without clipping. "reference" runs the networks and the optimizer as
the public code does, without its statistics: that of V-JEPA 2 computes every block again in the backward pass, and
"reference-stored" is the same without that. "packed" is the library's own step with the Triton forms of
`fastjepa_kernels`, which computes nothing again. Attention counts as one forward and one backward kernel
in both, though ours launches two for a gradient.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.census.figures import census, result_rows, table
from bench.census.steps import MODELS
from bench.files import made, write_results
from bench.machine import facts


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.census", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON list instead of tables")
    parser.add_argument("--model", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for a result file too")
    parser.add_argument("--items", type=int, default=0, help="largest single items to list (default: %(default)s)")
    options = parser.parse_args(arguments)
    models = options.model.split(",")
    for model in models:
        if model not in MODELS:
            parser.error(f"--model: expected some of {', '.join(MODELS)}, given {model}")
    if options.items < 0:
        parser.error(f"--items: expected at least 0, given {options.items}")
    if options.out is not None:
        try:
            made(options.out, "--out")
        except ValueError as error:
            parser.error(str(error))
    rows = [census(model, options.items) for model in models]
    if options.out is not None:
        header = facts(torch.device("cpu"), f"python -m bench.census --model {options.model}", quick=False)
        path = options.out / f"census-{header['date'][:10]}.json"
        write_results(path, header, [one for row in rows for one in result_rows(row)], complete=True)
    print(json.dumps(rows, indent=1) if options.json else "\n\n".join(table(row) for row in rows))


if __name__ == "__main__":
    main()
