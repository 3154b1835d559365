"""How a run ends."""

import os
import sys
from collections.abc import Callable
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the program."""

    DONE = 0
    FAILED = 1
    WRONG_INPUT = 2
    TOO_MANY_BAD_FILES = 3
    NON_FINITE = 4
    SAVED_AFTER_SIGNAL = 75
    SECOND_INTERRUPT = 130
    READER_LEFT = 141


def ended(main: Callable[[], int]) -> int:
    """Exit code of `main`, with all that it printed out; a quiet one where who reads it has left, as `head` does."""
    try:
        try:
            code = main()
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not reader_left():
            raise
        # What is left in the buffer goes nowhere: the interpreter would complain of it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.READER_LEFT


def reader_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more: other pipes break, too, and that is no quiet end."""
    try:
        print(flush=True)  # noqa: T201
    except BrokenPipeError:
        return True
    return False
