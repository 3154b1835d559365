"""What the verbs share on the command line: options, their mistakes as sentences, and what they print."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Options of one verb. A mistake is one sentence (ValueError), which names the nearest valid option."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(f"python -m fastjepa {verb}", description=description, allow_abbrev=False)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options that were given. Errors: ValueError."""
        given, unknown = self.parse_known_args(arguments)
        if unknown:
            raise ValueError(f"{self.prog}: {self._not_known(unknown[0])}")
        return given

    def error(self, message: str) -> NoReturn:
        """Errors: ValueError instead of an exit."""
        raise ValueError(f"{self.prog}: {message}")

    def _not_known(self, word: str) -> str:
        if not word.startswith("-"):
            return f"expected no further argument, given {word!r}"
        options = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(word.partition("=")[0], options, n=1)
        return f"unknown option {word}" + (f", nearest valid option: {near[0]}" if near else "")


def whole_number(least: int, most: int | None = None) -> type[int]:
    """A `type=` for options that take a whole number in a range."""

    def read(text: str) -> int:
        if text.isdecimal() and least <= int(text) <= (int(text) if most is None else most):
            return int(text)
        limit = f"at least {least}" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"expected a whole number ({limit}), given {text!r}")

    return read  # type: ignore[return-value]


def say(text: str) -> None:
    """Print a line, whatever the encoding of the console can show."""
    _write(text, sys.stdout)


def complain(text: str) -> None:
    """Print a line on stderr."""
    _write(text, sys.stderr)


def _write(text: str, stream: object) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)  # type: ignore[call-overload]
