"""How a run ends."""

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
