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
from fastjepa.configchecks import needs_frames
from fastjepa.data.decoders.choose import choose_decoder
from fastjepa.data.index import update_index
from fastjepa.data.indexfile import Entry
from fastjepa.data.media import absolute
from fastjepa.data.mixture import open_collections
from fastjepa.data.processes import processors
from fastjepa.data.replaced import ReplacedFiles, TooManyBadFiles
from fastjepa.data.source import Videos
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

DRAWING = "drawing and encoding synthetic videos, once"
INDEXING = "opening videos that are new, to know what decodes them"
COME_AND_GONE = "it came or went while the run began"


def start(settings: Settings, name: str) -> Exit:
    """Train, and turn every foreseen failure into one sentence and its exit code."""
    try:
        device, reason = parallel.set_up(settings.runtime)
        masks = build_masks(settings)
        step = build_step(settings, device)
        jepa = step.jepa
        videos = open_collections(settings.data.path, settings.optim.seed, _progress(DRAWING))
        decoder = choose_decoder(
            settings.data.decoder, device, needs_frames(settings), lambda: _indexed(settings, videos)
        )
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
        for line in (
            f"run        {run.path}",
            *run.notes,
            *weights,
            f"data       {videos.description}; {len(videos.train)} for pretraining",
            f"decoder    {decoder.name} ({decoder.reason})",
            *decoder.lines,
            f"device     {device} ({reason}); {workers} loader workers",
            *step.lines,
            *describe(settings, plan, jepa),
        ):
            log.say(line)
        try:
            listed = run.path / "bad_files.jsonl"
            # Whatever decodes, it is PyAV that opens files and gets the last try.
            bad_files = ReplacedFiles(
                listed, len(videos.paths), settings.data.max_bad_fraction, log.say, decoder="pyav"
            )
            trainer = Trainer(
                settings, run, log, device, jepa, masks, videos, decoder, plan, bad_files, interrupts, workers
            )
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


def _indexed(settings: Settings, videos: Videos) -> list[Entry]:
    """What the indexes of the collections say of every video, after they were brought up to date."""
    path = settings.data.path
    say = Console(highlight=False, soft_wrap=True, emoji=False).print
    known: dict[str, Entry] = {}
    for one in [path] if isinstance(path, str) else path:
        index = update_index(
            one, None, processors(), progress=_progress(INDEXING), say=lambda text: say(text, markup=False)
        )
        known |= {entry.path: entry for entry in index.entries}
        if index.unsaved:
            say(f"warning: {index.unsaved}", markup=False)
    return [known.get(absolute(name)) or Entry(name, 0, 0, COME_AND_GONE) for name in videos.paths]


def _progress(what: str) -> Callable[[int, int], None]:
    """Says every tenth how far something is that takes a while the first time only."""
    console = Console(highlight=False, soft_wrap=True)
    said = -1

    def progress(done: int, total: int) -> None:
        nonlocal said
        tenth = 10 * done // total
        if tenth > said:
            said = tenth
            console.print(f"{what}: {done} of {total}", markup=False)

    return progress
