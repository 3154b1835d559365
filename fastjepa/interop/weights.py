"""What weights are, wherever they come from, and why they may be refused."""

import difflib
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from fastjepa.models.vision_transformer import SIZES

# What a damaged or a hostile file can raise in torch's reader.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    AttributeError,
    AssertionError,
    EOFError,
    MemoryError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


# Licences by the names that model cards use; "" is one that nobody has named yet.
META_LICENCE_ID = "cc-by-nc-4.0"
META_LICENCE = (
    "published weights of this layout are Meta's V-JEPA weights of the first generation: CC BY-NC 4.0, for "
    "non-commercial use only"
)
ROTARY_LICENCE_ID = "mit"
ROTARY_LICENCE = "published weights of this layout are Meta's V-JEPA 2 weights: MIT"
OWN_LICENCE = "yours"


class WeightsRefused(ValueError):
    """A file cannot be read or does not fit. The first line is a sentence; lines with differences may follow."""


@dataclass(frozen=True)
class Weights:
    """Bare state dicts, and what is known of them. `heads` (encoder, predictor) is None where nobody knows.

    `networks` holds all three, or fewer where no more was handed over: an encoder at least. `settings` are those of
    the run that made them, dotted key -> value as in `config.flat`; `step` is its step. Both are None for weights from
    elsewhere. `licence` is a sentence, `licence_id` its name on a model card; "" where none is named. `public`:
    epoch, loss, batch_size, world_size and lr of a checkpoint of the public code, as far as they are known.
    """

    path: Path
    description: str
    networks: dict[str, dict[str, Tensor]]
    ignored: list[str]
    licence: str
    heads: tuple[int, int] | None = None
    settings: dict[str, Any] | None = None
    step: int | None = None
    licence_id: str = ""
    public: dict[str, int | float] = field(default_factory=dict)

    def network(self, name: str | None) -> str:
        """The network of this name; for None the target encoder, or the only encoder. Errors: WeightsRefused."""
        held = [one for one in ("target_encoder", "encoder") if one in self.networks]
        if name is None:
            return held[0]
        if name not in held:
            given, words = held[0].replace("_", " "), name.replace("_", " ")
            raise WeightsRefused(f"{self.path} holds the {given} only, and the {words} was asked for")
        return name


def heads_of_settings(settings: dict[str, Any]) -> tuple[int, int] | None:
    """(encoder, predictor) heads of a run; None where its settings do not tell."""
    size = SIZES.get(str(settings.get("model.name")))
    if size is None or "model.predictor_heads" not in settings:
        return None
    return size["num_heads"], settings["model.predictor_heads"] or size["num_heads"]


def nearest(path: Path) -> str:
    """The name beside a missing path that is most like its own, for the end of a sentence; empty where none is."""
    siblings = [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f", nearest: {path.parent / near[0]}" if near else ""


def one_line(error: BaseException) -> str:
    """The cause in one line; of torch's refusals the part that says what was not allowed."""
    if isinstance(error, CheckpointException):
        inner = next(iter(error.failures.values()), None)
        error = inner[0] if isinstance(inner, tuple) else error
    refused = re.search(r"WeightsUnpickler error: (.+)", str(error))
    text = (refused.group(1) if refused else str(error)).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"
