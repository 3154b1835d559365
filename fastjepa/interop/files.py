"""The files of a folder with weights: JSON and safetensors, nothing of which is executed."""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors import safe_open
from torch import Tensor

from fastjepa.interop.passport import one_paragraph, parsed
from fastjepa.interop.weights import UNREADABLE, WeightsRefused, one_line

CONFIG, MODEL, MORE = "config.json", "model.safetensors", "pretraining.safetensors"
PREPROCESSOR, CARD = "video_preprocessor_config.json", "README.md"
LONGEST_CONFIG = 4_000_000  # bytes
LONGEST_INDEX = 100_000_000
DTYPES = ("F32", "BF16", "F16", "F64")


def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json; of something else than a group of values nothing. Errors: WeightsRefused."""
    config = _json(folder / CONFIG, LONGEST_CONFIG)
    return config if isinstance(config, Mapping) else {}


def _json(file: Path, longest: int) -> Any:
    expect_file(file, longest)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsRefused(f"{file} cannot be read: {one_line(error)}") from None
    return parsed(file, "it", text)


def tensors_in_parts(file: Path) -> dict[str, Tensor]:
    """The tensors of `file`, or of the parts that an index in its place lists. Errors: WeightsRefused."""
    index = file.with_name(f"{file.name}.index.json")
    if not index.exists():
        return tensors(file)
    if file.exists():
        raise WeightsRefused(
            f"{file.parent} holds its weights in parts and whole: expected {file.name} or {index.name}, not both"
        )
    content = _json(index, LONGEST_INDEX)
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(places, Mapping) or not all(isinstance(part, str) for part in places.values()):
        raise WeightsRefused(f"{index}: weight_map: expected names of files")
    found: dict[str, Tensor] = {}
    for part in sorted(set(places.values())):
        if Path(part).name != part or not part.endswith(".safetensors"):
            raise WeightsRefused(
                f"{index}: expected names of safetensors in this folder, given {one_paragraph(part)[:100]!r}"
            )
        held = tensors(file.with_name(part))
        wanted = {key for key, place in places.items() if place == part}
        if held.keys() != wanted:
            key = min(held.keys() ^ wanted)
            raise WeightsRefused(
                f"{file.with_name(part)}: {one_paragraph(key)[:100]}: {index.name} "
                + ("lists it there, and it is not" if key in wanted else "does not list it there")
            )
        found |= held
    return found


def tensors(file: Path) -> dict[str, Tensor]:
    """All of a file of safetensors, whose header is checked against its size before anything is read.

    Errors: WeightsRefused.
    """
    expect_file(file)
    try:
        with safe_open(str(file), "pt") as opened:
            names = list(opened.keys())
            for name in names:
                kind = opened.get_slice(name).get_dtype()
                if kind not in DTYPES:
                    raise WeightsRefused(
                        f"{file}: {one_paragraph(name)[:100]}: expected floating-point numbers "
                        f"({', '.join(DTYPES)}), given {kind}"
                    )
            return {name: opened.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, *UNREADABLE) as error:
        if isinstance(error, WeightsRefused):
            raise
        raise WeightsRefused(f"{file} is no file of safetensors, or it is damaged: {one_line(error)}") from None


def expect_file(file: Path, most: int | None = None) -> None:
    """Errors: WeightsRefused where there is none, it is no regular file, or one of more than `most` bytes."""
    try:
        facts = file.stat()
    except OSError as error:
        raise WeightsRefused(f"{file} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(facts.st_mode):
        raise WeightsRefused(f"{file} is no regular file")
    if most is not None and facts.st_size > most:
        raise WeightsRefused(f"{file} has {facts.st_size} bytes: expected at most {most}")
