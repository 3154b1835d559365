"""What a setting expects, in words, from its type and limits."""

import types
import typing
from typing import Any, Literal

from pydantic.fields import FieldInfo

from fastjepa.settings.base import Section

_LIMITS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"), ("multiple_of", "a multiple of"))


def expectation(field: FieldInfo) -> str:
    """For example "a whole number (at least 1)", "one of group, random, none" or "two numbers [low, high]"."""
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: list[Any]) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        return _words(inner, [*metadata, *(m for part in more for m in (getattr(part, "metadata", None) or [part]))])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(part, metadata) for part in typing.get_args(annotation))
    if origin is Literal:
        values = [str(value) for value in typing.get_args(annotation)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is dict:
        key, value = typing.get_args(annotation)
        if typing.get_origin(key) is Literal:
            return f"a map from {', '.join(typing.get_args(key))} to {', '.join(typing.get_args(value))}"
        return f"a map from {_words(key, [])} to {_words(value, [])}, at least one"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"a group of {', '.join(annotation.model_fields)}"
    if origin is tuple:
        return (
            "two numbers [low, high]"
            if typing.get_args(annotation)[-1] is float
            else "a list of mask sets, at least one"
        )
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    text = names[annotation]
    pattern = next((m.pattern for m in metadata if getattr(m, "pattern", None)), None)
    if annotation is str and pattern:
        return "steps FROM..TO" if ".." in pattern.replace("\\", "") else "auto, cpu, cuda or cuda:N"
    if annotation is str and any(getattr(m, "min_length", None) for m in metadata):
        return "text that is not empty"
    if annotation in (int, float):
        limits = [
            f"{word} {getattr(m, name)}"
            for name, word in _LIMITS
            for m in metadata
            if getattr(m, name, None) is not None
        ]
        text += f" ({', '.join(limits)})" if limits else ""
    return text
