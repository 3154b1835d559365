"""SIGINT, SIGTERM and SIGUSR1: the first asks the loop to save and leave, the second leaves at once."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from fastjepa.exits import Exit

# A progress bar hides it.
SHOW_CURSOR = b"\x1b[?25h"
WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(BaseException):
    """A signal that asks the process to leave came before there was anything to save; the text is its name."""


class Interrupts:
    """A context in which signals are noted instead of ending the process. `received` is the first one's name.

    Of several processes that get the same signal one is `loud`. Until `begin` there is nothing to save: a signal raises
    `Interrupted` then, and SIGINT KeyboardInterrupt as ever.
    """

    def __init__(self, *, loud: bool = True) -> None:
        self.loud = loud
        self.begun = False
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From here on there is something to save."""
        self.begun = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # No clean-up: whoever asks twice wants the process gone. The last checkpoint is committed and untouched.
            os.write(2, SHOW_CURSOR if os.isatty(2) else b"")
            os._exit(Exit.SECOND_INTERRUPT)
        if not self.begun and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if not self.begun:
            raise Interrupted(self.received)
        # Unbuffered: a handler may run in the middle of a print.
        if self.loud:
            os.write(2, f"{self.received}: saving and leaving; once more leaves at once\n".encode())
