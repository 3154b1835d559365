"""Videos that another took the place of: named once, counted against a quota, never silently left out."""

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

ALWAYS_TOLERATED = 10


class TooManyBadFiles(RuntimeError):
    """The quota of unreadable files is used up, or no file can be read at all. The text is one sentence."""

    def __str__(self) -> str:
        # The data loader of torch puts the traceback of its process in front of the sentence.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].rstrip()


class ReplacedFiles:
    """The unreadable files of a run, or those that are too short, listed in `path`: a line each with path and reason.

    `decoder`: what could not read them, listed too. `total` is the number of files that there are; `max_fraction` of
    them may be listed. None sets no quota: files that are only passed over may be many. Of several processes one
    `writes` the list, the others know what it says.
    """

    def __init__(
        self,
        path: Path,
        total: int,
        max_fraction: float | None,
        say: Callable[[str], None] = warnings.warn,
        *,
        decoder: str = "",
        writes: bool = True,
    ) -> None:
        self.path = path
        self.writes = writes
        self.total = total
        self.say = say
        self.more = {"decoder": decoder} if decoder else {}
        self.allowed = None if max_fraction is None else max(ALWAYS_TOLERATED, int(total * max_fraction))
        self.reasons: dict[str, str] = {}
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):  # half written where the process was killed
                lines.pop()
                if writes:
                    path.write_text("".join(lines), encoding="utf-8")
            for number, line in enumerate(lines, start=1):
                try:
                    entry = json.loads(line)
                    self.reasons[entry["path"]] = entry["reason"]
                except (ValueError, KeyError, TypeError) as error:
                    self.say(f"warning: {path} line {number} is not an entry of it and is skipped: {error}")

    def report(self, found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Write down (path, reason) pairs not seen before and return them. Errors: TooManyBadFiles beyond the quota."""
        new = list({path: (path, reason) for path, reason in found if path not in self.reasons}.values())
        self.reasons.update(new)
        if new and self.writes:
            lines = "".join(json.dumps({"path": path, "reason": reason} | self.more) + "\n" for path, reason in new)
            try:
                with self.path.open("a", encoding="utf-8") as out:
                    out.write(lines)
            except OSError as error:  # a full disk: they are still named on the console and counted
                self.say(f"warning: {self.path} cannot be written: {error}")
        if self.allowed is not None and len(self.reasons) > self.allowed:
            raise TooManyBadFiles(
                f"{len(self.reasons)} of {self.total} files cannot be read, more than the {self.allowed} that "
                f"data.max_bad_fraction allows; they are listed in {self.path}"
            )
        return new
