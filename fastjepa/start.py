"""From settings to a running loop: everything that can be refused is refused here, before any work."""

import os
import sys
from collections.abc import Callable

from rich.console import Console

from fastjepa import parallel
from fastjepa.build import build_jepa, build_masks
from fastjepa.checkpoint import CheckpointError
from fastjepa.config import Settings
from fastjepa.data.badfiles import BadFiles, TooManyBadFiles
from fastjepa.data.source import open_videos
from fastjepa.evaluation import should_probe
from fastjepa.exits import Exit
from fastjepa.log import RunLog
from fastjepa.loop import Trainer
from fastjepa.plan import describe, make_plan
from fastjepa.runfolder import open_run
from fastjepa.signals import Interrupts


def start(settings: Settings, name: str) -> Exit:
    """Train, and turn every foreseen failure into one sentence and its exit code."""
    try:
        device, reason = parallel.set_up(settings.runtime)
        masks = build_masks(settings)
        videos = open_videos(settings.data.path, settings.optim.seed, _progress())
        should_probe(settings, videos)
        jepa = build_jepa(settings).to(device)
        run = open_run(settings, name, videos.fingerprint)
        log = RunLog(run.path, settings.log, run.path.name, settings.last_step)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return Exit.WRONG_INPUT
    with log, Interrupts() as interrupts:
        workers = _workers(settings)
        plan = make_plan(settings, jepa, masks, device)
        decoder = "pyav (asked for)" if settings.data.decoder == "pyav" else "pyav (the only one so far)"
        for line in (
            f"run        {run.path}",
            *run.notes,
            f"data       {videos.description}; {len(videos.train)} for pretraining",
            f"device     {device} ({reason}); {workers} loader workers; decoder {decoder}",
            *describe(settings, plan, jepa),
        ):
            log.say(line)
        bad_files = BadFiles(run.path / "bad_files.jsonl", len(videos.paths), settings.data.max_bad_fraction, log.say)
        try:
            trainer = Trainer(settings, run, log, device, jepa, masks, videos, plan, bad_files, interrupts, workers)
            return trainer.train()
        except TooManyBadFiles as error:
            log.say(f"stopped    {error}")
            log.status("failed", 0, reason=str(error))
            return Exit.TOO_MANY_BAD_FILES
        except CheckpointError as error:
            log.say(f"stopped    {error}")
            return Exit.WRONG_INPUT
        finally:
            run.close()


def _workers(settings: Settings) -> int:
    if settings.data.workers == "auto":
        return max(1, min(8, (os.cpu_count() or 1) - 1))
    return settings.data.workers


def _progress() -> Callable[[int, int], None]:
    """Says every tenth how far the drawing of synthetic videos is: it takes a while the first time only."""
    console = Console(highlight=False, soft_wrap=True)
    said = -1

    def progress(done: int, total: int) -> None:
        nonlocal said
        tenth = 10 * done // total
        if tenth > said:
            said = tenth
            console.print(f"drawing and encoding synthetic videos, once: {done} of {total}", markup=False)

    return progress
