"""Videos that ended the processes which decoded them: never opened again, also in a run that goes on later."""

import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from fastjepa.data.dataset import Reader

# In the folder of a run.
LISTED = "crashed_videos.jsonl"


class Crashes:
    """Of each such video the reason, and the slot from which on it counts as unreadable.

    Earlier slots had its clip: a run that goes on from there must find it again. `paths`: the list that videos are
    numbers of. `listed`: a line each with path, reason and slot, appended to; each of several training processes has
    one of its own (crashed_videos-3.jsonl), and knows at its start what all of them say. `say` is told what is wrong
    with those files. Those that are not a process's `own` it reads, and never writes.
    """

    def __init__(
        self,
        paths: Sequence[str],
        listed: Path | None = None,
        say: Callable[[str], None] = warnings.warn,
        *,
        own: bool = True,
    ) -> None:
        self.paths, self.listed, self.say = paths, listed if own else None, say
        self.known: dict[int, tuple[int, str]] = {}
        if listed is not None:
            name = re.sub(r"-[0-9]+$", "", listed.stem)
            for file in sorted(listed.parent.glob(f"{name}*{listed.suffix}")):
                self._read(file, own=own and file == listed)

    def _read(self, listed: Path, *, own: bool) -> None:
        lines = listed.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # half written where the process was killed
            lines.pop()
            if own:
                listed.write_bytes(b"".join(lines))
        numbers = {path: number for number, path in enumerate(self.paths)}
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                path, slot, reason = entry["path"], int(entry["slot"]), str(entry["reason"])
            except (ValueError, KeyError, TypeError) as error:
                self.say(f"warning: {listed} line {number} is not an entry of it and is skipped: {error}")
                continue
            if path in numbers:
                self._remember(numbers[path], slot, reason)

    def _remember(self, video: int, slot: int, reason: str) -> None:
        if video not in self.known or slot < self.known[video][0]:
            self.known[video] = slot, reason

    def reason(self, video: int, slot: int) -> str | None:
        """Why this video must not be opened for this slot; None where it may be."""
        first, reason = self.known.get(video, (0, None))
        return reason if slot >= first else None

    def add(self, video: int, slot: int, reason: str) -> None:
        """From this slot on the video is unreadable."""
        self._remember(video, slot, reason)
        if self.listed is None:
            return
        try:
            with self.listed.open("a", encoding="ascii") as out:
                out.write(json.dumps({"path": self.paths[video], "reason": reason, "slot": slot}) + "\n")
        except OSError as error:  # a full disk, say; this run knows it all the same
            self.say(f"warning: {self.listed} cannot be written: {error}")

    def keep_from(self, reader: Reader) -> None:
        """Have a reader of the same list refuse all of them: the process that it decodes in is one to keep."""
        for video, (_, reason) in self.known.items():
            reader.give_up(video, reason)
