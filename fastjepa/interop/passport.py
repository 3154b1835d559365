"""What travels with weights: whose they are, which run made them, and the settings that build their networks."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fastjepa
from fastjepa.config import Settings, fields, flat, resume_class
from fastjepa.interop.weights import Weights, WeightsRefused, heads_of_settings

FORMAT = 1
LONGEST = 1_000_000  # characters; a real one has some thousand
PUBLIC = ("epoch", "loss", "batch_size", "world_size", "lr")


@dataclass(frozen=True)
class Passport:
    """`settings`: dotted keys, those that change results and name no place on somebody's disk.

    `shapes_only`: nobody knows the settings of the run, they were told from the shapes of the weights.
    """

    description: str
    licence: str
    licence_id: str
    step: int | None
    settings: dict[str, Any]
    shapes_only: bool
    public: dict[str, int | float]

    @classmethod
    def of(cls, weights: Weights, settings: Settings) -> "Passport":
        """Of weights that `settings` build the networks for."""
        shapes_only = weights.heads is None
        recipe = not shapes_only and "optim.steps" in (weights.settings or {})
        sections = ("",) if recipe else ("model.", "data.")
        values = flat(settings)
        told = {
            key: values[key]
            for key, field in fields()
            if resume_class(field) == "fatal" and not key.startswith("init.") and key.startswith(sections)
        }
        public = {key: value for key, value in weights.public.items() if math.isfinite(value)}
        return cls(
            weights.description, weights.licence, weights.licence_id, weights.step, told, shapes_only, public
        )  # fmt: skip

    @property
    def recipe(self) -> bool:
        """Whether the settings are those of a run, and not of networks alone."""
        return not self.shapes_only and "optim.steps" in self.settings

    @property
    def heads(self) -> tuple[int, int] | None:
        """(encoder, predictor) heads, None where nobody knows."""
        return None if self.shapes_only else heads_of_settings(self.settings)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": FORMAT, "version": fastjepa.__version__, **asdict(self)}

    def text(self) -> str:
        """As JSON."""
        return json.dumps(self.content())

    @classmethod
    def from_text(cls, path: Path, text: Any) -> "Passport":
        """Errors: WeightsRefused with one sentence, which names `path`, for anything that `text` has not written."""
        if not isinstance(text, str) or len(text) > LONGEST:
            raise WeightsRefused(f"{path}: its entry fastjepa is no text that this library wrote")
        return cls.from_content(path, parsed(path, "its entry fastjepa", text))

    @classmethod
    def from_content(cls, path: Path, content: Any) -> "Passport":
        """Errors: as `from_text`."""
        if not isinstance(content, Mapping):
            raise WeightsRefused(f"{path}: its entry fastjepa: expected a group of values, given {_given(content)}")
        if content.get("format") != FORMAT:
            raise WeightsRefused(
                f"{path}: its entry fastjepa has format {_given(content.get('format'))}, this program reads {FORMAT}"
            )
        kinds: dict[str, tuple[type, ...]] = {
            "description": (str,),
            "licence": (str,),
            "licence_id": (str,),
            "step": (int, type(None)),
            "settings": (dict,),
            "shapes_only": (bool,),
            "public": (dict,),
        }
        for key, kind in kinds.items():
            if key not in content or not isinstance(content[key], kind):
                raise WeightsRefused(
                    f"{path}: fastjepa.{key}: expected {_named(kind)}, given {_given(content.get(key))}"
                )
        public = content["public"]
        if not all(key in PUBLIC and type(value) in (int, float) for key, value in public.items()):
            raise WeightsRefused(f"{path}: fastjepa.public: expected numbers for {', '.join(PUBLIC)}")
        texts = {key: one_paragraph(content[key]) for key in ("description", "licence", "licence_id")}
        return cls(**{key: content[key] for key in kinds} | texts)


def parsed(path: Path, what: str, text: str) -> Any:
    """JSON. Errors: WeightsRefused with one sentence."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise WeightsRefused(f"{path}: {what} is no JSON") from None


def one_paragraph(text: str) -> str:
    """What a file says, safe to be printed: one line, no control characters, not endless."""
    return "".join(c if c.isprintable() else " " for c in text)[:2000]


def _named(kind: tuple[type, ...]) -> str:
    words = {str: "a text", int: "a whole number", dict: "a group of values", bool: "true or false"}
    return " or ".join(words.get(one, "null") for one in kind)


def _given(value: Any) -> str:
    return "nothing" if value is None else one_paragraph(repr(value))[:60]
