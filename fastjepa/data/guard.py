"""Loader processes may die of a video: which one they had in hand is known, and it is replaced like any bad file."""

import faulthandler
import mmap
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from fastjepa.data.crashes import Crashes
from fastjepa.data.decode import VideoError

NOTHING = -1
TIMEOUT = b"Timeout ("  # what faulthandler writes before it ends a process
IN_FLIGHT = 2  # batches that torch's loader has under way for each process


class Guard:
    """What each loader process has in hand, in memory that outlives it, and a limit on how long.

    A decode of more than `seconds` ends its process, also where it holds the interpreter's lock. The first time that a
    process dies with a video in hand the video is tried once more; after the second it is one of `crashes`. Being
    killed counts only where the second try of the same clip ends so too: the system kills processes for want of memory,
    which over a long run hits a good video twice. `say` gets a sentence for every death, `note` the Python stack where
    there is one. The processes must be forks of this one.
    """

    def __init__(
        self,
        crashes: Crashes,
        seconds: float,
        say: Callable[[str], None],
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.crashes, self.seconds, self.say, self.note = crashes, seconds, say, note
        self.suspects: dict[int, int] = {}  # by video: how many batches were handed out then
        self.place: int | None = None  # of this process among the loader processes
        self._hands = np.empty((0, 2), np.int64)
        self._stacks: list[int] = []

    # -- in the training process --------------------------------------------------------------------------------------

    @contextmanager
    def watching(self, workers: int) -> Iterator[None]:
        """A context in which so many processes are started: (video, slot) of each, and a file for its stack."""
        # A fork of a process in which faulthandler counts down waits for ever when it sets a limit of its own.
        faulthandler.cancel_dump_traceback_later()
        self._hands = np.frombuffer(mmap.mmap(-1, workers * 2 * 8), np.int64).reshape(workers, 2)
        self._hands[:] = NOTHING
        self._stacks = [os.memfd_create("stack") for _ in range(workers)]
        try:
            yield
        finally:
            for file in self._stacks:
                os.close(file)
            self._hands, self._stacks = np.empty((0, 2), np.int64), []

    def blame(self, exit_codes: Mapping[int, int], handed_out: int) -> tuple[str, bool]:
        """Look at what dead processes had in hand; they are given by place, with their exit codes.

        `handed_out`: batches that came out of the loader before. Returns a sentence on one of them, and whether some
        video is not tried any more from now on.
        """
        found: dict[int, tuple[int, str]] = {}
        convicted, slow = set(), set()
        for place, code in exit_codes.items():
            video, slot = self._hands[place].tolist()
            stack = os.pread(self._stacks[place], 1 << 16, 0)
            if stack:
                self.note(stack.decode(errors="replace"))
            if stack.startswith(TIMEOUT):
                slow.add(video)
            # Two processes may have died of the same video: it is one that must be good for both slots.
            if video not in found or slot < found[video][0]:
                found[video] = slot, why(code, stack.startswith(TIMEOUT), self.seconds)
            if video in self.suspects:
                same_clip = handed_out - self.suspects[video] <= IN_FLIGHT * len(self._hands)
                if same_clip or code != -signal.SIGKILL:
                    convicted.add(video)
        # Several videos that take too long at once are not at fault: their disk is away.
        innocent = slow if len(slow) > 1 else set()
        convicted -= innocent
        for video, (slot, reason) in sorted(found.items()):
            held = "no video" if video == NOTHING else self.crashes.paths[video]
            sentence = f"a loader process ended with {held} in hand: {reason}"
            again = video != NOTHING and video not in convicted
            self.say(f"loader     {sentence}" + ("; it is tried once more" if again else ""))
            if video in convicted:
                self.crashes.add(video, slot, reason)
        self.suspects |= {video: handed_out for video in found.keys() - innocent if video != NOTHING}
        return sentence, bool(convicted)

    # -- in a loader process ------------------------------------------------------------------------------------------

    def enter(self, place: int) -> None:
        """Called in a loader process before it begins."""
        self.place = place
        faulthandler.disable()  # where it was on already, torch's handlers of a worker lie over it
        faulthandler.enable(file=self._stacks[place])

    @contextmanager
    def hold(self, video: int, slot: int) -> Iterator[None]:
        """A context in which a video is opened and decoded, in any process. Errors: VideoError for a crashed one."""
        reason = self.crashes.reason(video, slot)
        if reason is not None:
            raise VideoError(reason, self.crashes.paths[video])
        if self.place is None:
            yield
            return
        hand = self._hands[self.place]
        hand[1] = slot
        hand[0] = video
        # Not a timer of Python: that would wait for the lock which a decoder in C may hold.
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self._stacks[self.place])
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            hand[0] = NOTHING


def why(exit_code: int, timed_out: bool, seconds: float) -> str:
    """The sentence on a process that has ended: negative exit codes are signals."""
    if timed_out:
        return f"decoding took more than {seconds:g} s"
    if exit_code >= 0:
        return f"the decoder ended its process (exit code {exit_code})"
    number = -exit_code
    if number == signal.SIGKILL:
        return "the process that decoded it was killed, for want of memory perhaps"
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number == signal.SIGBUS:
        return f"the decoder crashed ({name}; a full /dev/shm does that too)"
    return f"the decoder crashed ({name})"
