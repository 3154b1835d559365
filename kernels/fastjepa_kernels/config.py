"""Launch settings of the Triton kernels, pinned in files: nothing is tuned while a program runs.

`configs/NAME.json` holds those of one operation, a row for each combination of architecture ("sm_90", or "any"), dtype
("bf16", "fp16", "fp32", or "any"), width (channels, or the size of a head) and length (rows or tokens). Width and
length are buckets, "up to so many"; null is "however many". A row says where it comes from: `source` is "measured",
with the file of the timings in `result`, or "static": chosen by reasoning and by what compiles without spills.

The folder named by FASTJEPA_KERNELS_CONFIG_DIR may hold files of the same names and form. Their rows take the place of
those with the same combination and join the others. They are read once, at the first lookup;
`python -m fastjepa_kernels tune` writes them.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

VARIABLE = "FASTJEPA_KERNELS_CONFIG_DIR"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
# The same instructions and as much shared memory as the one that was measured or compiled for.
_ALIKE = {"sm_103": "sm_100"}
# How far the width of a row of one architecture may be from what is asked; beyond that "any" is the better guess.
NEAR = 2

_forced: dict[str, dict[str, int]] = {}


@dataclass(frozen=True)
class Row:
    """Settings of one combination. `measured` of a measured row: GPU, versions, date and milliseconds."""

    architecture: str
    dtype: str
    width: int | None
    length: int | None
    settings: dict[str, int]
    source: str = "static"
    result: str | None = None
    measured: dict[str, Any] | None = None

    @property
    def place(self) -> tuple[object, ...]:
        """What the row is for: two rows of a table differ in it."""
        return self.architecture, self.dtype, self.width, self.length


def lookup(
    operation: str,
    *,
    device: torch.device | None = None,
    architecture: str = "any",
    dtype: torch.dtype | str = "any",
    width: int = 1,
    length: int = 1,
) -> dict[str, int]:
    """The launch settings of an operation, e.g. {"BLOCK_M": 64, "num_warps": 4}; a new dict, to be changed freely.

    The architecture is that of `device` where one is given ("any" for a CPU). No device is waited for. The order:
    rows of the architecture before those of "any"; there rows of the dtype before those of "any"; there the smallest
    width not below the one asked for, else the largest below; there the length in the same way. A row of a given
    architecture whose width is more than twice, or less than half, the one asked for is passed over.

    Errors: ValueError where there is no such operation or no row, or where a file is not as it should be.
    """
    if device is not None:
        architecture = architecture_of(device)
    return {**_found(operation, architecture, name_of(dtype), width, length), **_forced.get(operation, {})}


def operations() -> list[str]:
    """The operations that have a file of settings in the package."""
    names = (entry.name for entry in (resources.files("fastjepa_kernels") / "configs").iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


@cache
def rows(operation: str) -> tuple[Row, ...]:
    """All rows of an operation, those of the user's folder among them. Errors: ValueError as for `lookup`."""
    if operation not in operations():
        raise ValueError(f"{operation}: no such file of launch settings; there are {', '.join(operations())}")
    shipped = resources.files("fastjepa_kernels") / "configs" / f"{operation}.json"
    found = {row.place: row for row in parse(shipped.read_text(), operation, f"configs/{operation}.json")}
    folder = _folder()
    if folder is not None and (folder / f"{operation}.json").is_file():
        path = folder / f"{operation}.json"
        names = set(next(iter(found.values())).settings)
        for row in parse(path.read_text(), operation, str(path)):
            if set(row.settings) != names:
                raise ValueError(f"{path}: expected settings {_listed(names)}, got {_listed(row.settings)}")
            found[row.place] = row
    return tuple(found.values())


def parse(text: str, operation: str, where: str) -> list[Row]:
    """The rows of a file. Errors: ValueError, one sentence that begins with `where`."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(content, dict) or set(content) != {"operation", "rows"} or not isinstance(content["rows"], list):
        raise ValueError(f'{where}: expected {{"operation": ..., "rows": [...]}} and no other key')
    if content["operation"] != operation:
        raise ValueError(f"{where}: expected the operation {operation}, got {content['operation']}")
    return [_row(given, f"{where}, row {n}") for n, given in enumerate(content["rows"], 1)]


def dump(operation: str, table: list[Row]) -> str:
    """A file's text, a row a line, sorted."""
    wide = [(row.architecture, row.dtype, row.width or math.inf, row.length or math.inf) for row in table]
    ordered = [table[n] for n in sorted(range(len(table)), key=wide.__getitem__)]
    lines = [json.dumps({k: v for k, v in asdict(row).items() if k != "measured" or v}) for row in ordered]
    return f'{{"operation": "{operation}", "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def architecture_of(device: torch.device) -> str:
    """Such as "sm_90" of a CUDA device; "any" of everything else."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "any"
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def name_of(dtype: torch.dtype | str) -> str:
    """Such as "bf16" for torch.bfloat16; a name stays as it is."""
    return dtype if isinstance(dtype, str) else DTYPES.get(dtype, "any")


@contextmanager
def forced(operation: str, **settings: int) -> Iterator[None]:
    """Inside, every lookup of this operation gives these settings, in every thread: for trying them out.

    Errors: ValueError for a setting that the operation does not have.
    """
    names = set(rows(operation)[0].settings)
    if not set(settings) <= names:
        raise ValueError(f"{operation}: expected some of the settings {_listed(names)}, got {_listed(settings)}")
    before = _forced.get(operation, {})
    _forced[operation] = {**before, **settings}
    try:
        yield
    finally:
        _forced[operation] = before


@cache
def _capability(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return _ALIKE.get(f"sm_{major}{minor}", f"sm_{major}{minor}")


@lru_cache(maxsize=4096)
def _found(operation: str, architecture: str, dtype: str, width: int, length: int) -> dict[str, int]:
    table = rows(operation)
    for arch in dict.fromkeys((architecture, "any")):
        fitting = [row for row in table if row.architecture == arch and row.dtype in (dtype, "any")]
        if arch != "any":
            fitting = [row for row in fitting if row.width is None or width / NEAR <= row.width <= width * NEAR]
        if fitting:
            best = min(fitting, key=lambda row: (row.dtype == "any", _far(row.width, width), _far(row.length, length)))
            return best.settings
    raise ValueError(
        f"{operation}: no launch settings for {architecture}, {dtype}, width {width} and length {length}, and none for "
        "any architecture"
    )


def _far(bucket: int | None, asked: int) -> tuple[bool, float]:
    """Buckets that are large enough first, nearest first."""
    limit = math.inf if bucket is None else bucket
    return limit < asked, abs(limit - asked)


@cache
def _folder() -> Path | None:
    """The user's folder, whose every file must be one of ours: a misspelt name would be passed over in silence."""
    if not os.environ.get(VARIABLE):
        return None
    folder = Path(os.environ[VARIABLE])
    if not folder.is_dir():
        raise ValueError(f"{VARIABLE}: expected a folder, got {folder}")
    for path in sorted(folder.glob("*.json")):
        if path.stem not in operations() and not path.name.endswith(".timings.json"):
            raise ValueError(f"{path}: no operation has this name; there are {', '.join(operations())}")
    return folder


def _row(given: Any, where: str) -> Row:
    required = {"architecture", "dtype", "width", "length", "settings", "source", "result"}
    if not isinstance(given, dict) or set(given) - {"measured"} != required:
        got = _listed(given) if isinstance(given, dict) else repr(given)
        raise ValueError(f"{where}: expected the keys {_listed(required)}, got {got}")
    if not re.fullmatch(r"any|sm_\d+", str(given["architecture"])):
        raise ValueError(f"{where}: architecture must be any or like sm_90, got {given['architecture']!r}")
    for key, allowed in (
        ("dtype", ("any", *DTYPES.values())),
        ("source", ("measured", "static")),
    ):
        if given[key] not in allowed:
            raise ValueError(f"{where}: {key} must be one of {', '.join(allowed)}, got {given[key]!r}")
    for key in ("width", "length"):
        if given[key] is not None and not _positive(given[key]):
            raise ValueError(f"{where}: {key} must be a whole number above 0 or null, got {given[key]!r}")
    settings = given["settings"]
    if not isinstance(settings, dict) or not settings or not all(_positive(value) for value in settings.values()):
        raise ValueError(f"{where}: settings must be names with whole numbers above 0, got {settings!r}")
    if (given["source"] == "measured") != isinstance(given["result"], str):
        raise ValueError(f"{where}: a measured row names its result file, a static one has null there")
    return Row(**given)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))
