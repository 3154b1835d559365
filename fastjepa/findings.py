"""What batches say of files: each is named once, counted against the quota, and listed in the run folder."""

from pathlib import Path

from fastjepa.data.batches import Batch, MixedBatch
from fastjepa.data.replaced import ReplacedFiles
from fastjepa.log import Log
from fastjepa.parallel import World

SHORT_FILES_NAMED = 10


class Findings:
    """Unreadable files and files that are too short, met by any of the processes.

    Of several processes the first one writes; the others keep what they meet until `share`.
    """

    def __init__(
        self, folder: Path, world: World, log: Log, *, files: int, trained: int, max_bad_fraction: float
    ) -> None:
        """`files` may be read, `trained` of them for pretraining. See `ReplacedFiles` for `max_bad_fraction`."""
        self.world, self.log = world, log
        # Whatever decodes, it is PyAV that opens files and gets the last try.
        self.bad = ReplacedFiles(
            folder / "bad_files.jsonl", files, max_bad_fraction, log.say, decoder="pyav", writes=world.first
        )
        # Listed like bad files, but any number of them is fine.
        self.short = ReplacedFiles(folder / "short_files.jsonl", trained, None, log.say, writes=world.first)
        self._bad: list[tuple[str, str]] = []
        self._short: list[tuple[str, str]] = []

    def note(self, batch: Batch | MixedBatch) -> None:
        """Take in what a batch says. Errors: TooManyBadFiles, here or in `share`."""
        self._bad += batch.bad
        self._short += batch.short
        if self.world.size == 1:
            self.share()

    def share(self) -> None:
        """Report what the processes have met since the last time. Errors: TooManyBadFiles, in all of them."""
        if self.world.size == 1 and not self._bad and not self._short:
            return
        own, self._bad, self._short = (self._bad, self._short), [], []
        found = self.world.gather(own)
        known = len(self.short.reasons)
        short = self.short.report([entry for _, part in found for entry in part])
        for path, reason in self.bad.report([entry for part, _ in found for entry in part]):
            self.log.say(f"bad file   {path}: {reason} (pyav); another video takes its place")
        for number, (path, reason) in enumerate(short, start=known + 1):
            # A collection may have thousands of them.
            if number <= SHORT_FILES_NAMED:
                more = f"; further ones are listed in {self.short.path}" if number == SHORT_FILES_NAMED else ""
                self.log.say(f"short file {path}: {reason}; another video takes its place{more}")

    def summary(self) -> list[str]:
        """Lines for the end of a run."""
        lines = []
        if self.bad.reasons:
            lines.append(f"bad files  {len(self.bad.reasons)} of {self.bad.total}, listed in {self.bad.path}")
        if self.short.reasons:
            lines.append(
                f"short      {len(self.short.reasons)} of {self.short.total} videos replaced, listed in "
                f"{self.short.path}"
            )
        return lines
