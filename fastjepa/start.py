"""From settings to a running loop: everything that can be refused is refused here, before any work."""

import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from fastjepa import config, parallel
from fastjepa.build import build_masks, build_step
from fastjepa.checkpoint import CheckpointError
from fastjepa.config import Settings
from fastjepa.data.processes import processors
from fastjepa.data.replaced import ReplacedFiles, TooManyBadFiles
from fastjepa.data.source import open_videos
from fastjepa.evaluation import should_probe
from fastjepa.exits import Exit
from fastjepa.interop import WeightsRefused, load_weights, read_weights
from fastjepa.jepa import JEPA
from fastjepa.log import RunLog
from fastjepa.loop import Trainer
from fastjepa.memory import usable_memory
from fastjepa.plan import describe, make_plan
from fastjepa.runfolder import open_run
from fastjepa.signals import Interrupts


def start(settings: Settings, name: str) -> Exit:
    """Train, and turn every foreseen failure into one sentence and its exit code."""
    try:
        device, reason = parallel.set_up(settings.runtime)
        masks = build_masks(settings)
        step = build_step(settings, device)
        jepa = step.jepa
        videos = open_videos(settings.data.path, settings.optim.seed, _progress())
        should_probe(settings, videos)
        weights = _initial_weights(settings, name, videos.fingerprint, jepa)
        run = open_run(settings, name, videos.fingerprint)
        log = RunLog(run.path, settings.log, run.path.name, settings.last_step)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return Exit.WRONG_INPUT
    with log, Interrupts() as interrupts:
        workers = _workers(settings)
        usable = usable_memory(device)
        plan = make_plan(settings, jepa, masks, usable, run.batch_size(), compiled=step.compiled)
        run.remember_batch_size(plan.batch_size)
        decoder = "pyav (asked for)" if settings.data.decoder == "pyav" else "pyav (the only one so far)"
        for line in (
            f"run        {run.path}",
            *run.notes,
            *weights,
            f"data       {videos.description}; {len(videos.train)} for pretraining",
            f"device     {device} ({reason}); {workers} loader workers; decoder {decoder}",
            *step.lines,
            *describe(settings, plan, jepa),
        ):
            log.say(line)
        try:
            listed = run.path / "bad_files.jsonl"
            bad_files = ReplacedFiles(listed, len(videos.paths), settings.data.max_bad_fraction, log.say)
            trainer = Trainer(settings, run, log, device, jepa, masks, videos, plan, bad_files, interrupts, workers)
            return trainer.train()
        except TooManyBadFiles as error:
            log.say(f"stopped    {error}")
            log.status("failed", 0, reason=str(error))
            return Exit.TOO_MANY_BAD_FILES
        except CheckpointError as error:
            log.say(f"stopped    {error}")
            log.status("failed", 0, reason=str(error))
            return Exit.WRONG_INPUT
        except (OSError, RuntimeError, MemoryError) as error:
            # A loader process that died, memory that is used up, a disk that is gone: one sentence for the person at
            # the console, and where it came from in train.log.
            log.note(traceback.format_exc())
            first_line = str(error).strip().partition("\n")[0] or type(error).__name__
            log.say(f"failed     {first_line} (details in {run.path / 'train.log'}); the same command continues")
            log.status("failed", 0, reason=first_line)
            return Exit.FAILED
        finally:
            run.close()


def _initial_weights(settings: Settings, name: str, data: str, jepa: JEPA) -> list[str]:
    """Put the weights of `init.from` into a new run; lines that say what went where.

    A run that has checkpoints goes on from them: the file is not read again, and need not exist any more. Errors:
    ValueError where the weights cannot be read or do not fit.
    """
    source = settings.init.from_
    if source is None:
        return []
    if _has_checkpoints(settings, name, data):
        return [f"weights    began as those of {source} (init.from); this run goes on from its own"]
    try:
        return load_weights(jepa, read_weights(source))
    except WeightsRefused as error:
        raise ValueError(f"init.from: {error}") from None


def _has_checkpoints(settings: Settings, name: str, data: str) -> bool:
    """Whether the folder that this run will take has checkpoints, be they damaged: it never starts anew then."""
    if settings.resume == "never":
        return False
    own = Path(settings.log.folder) / f"{name}-{config.identity(settings, data)}"
    folder = (own if settings.resume == "auto" else Path(settings.resume)).expanduser() / "checkpoints"
    kept = re.compile(r"(corrupt-|\.tmp-replaced-)?step-[0-9]+")
    return folder.is_dir() and any(kept.fullmatch(path.name) for path in folder.iterdir())


def _workers(settings: Settings) -> int:
    return auto_workers() if settings.data.workers == "auto" else settings.data.workers


def auto_workers() -> int:
    """Loader processes of `data.workers=auto`: the training process keeps a processor for itself."""
    return max(1, min(8, processors() - 1))


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
