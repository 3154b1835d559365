"""From settings to a running loop: everything that can be refused is refused here, before any work."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from fastjepa import config, parallel
from fastjepa.build import Step, build_step, masks_by_length
from fastjepa.checkpoint import CheckpointError, Found
from fastjepa.config import Settings
from fastjepa.configchecks import needs_frames
from fastjepa.data.decoders.choose import Decoder, choose_decoder
from fastjepa.data.index import update_index
from fastjepa.data.indexfile import Entry
from fastjepa.data.media import absolute
from fastjepa.data.mixture import open_collections
from fastjepa.data.processes import processors
from fastjepa.data.replaced import TooManyBadFiles
from fastjepa.data.source import Videos
from fastjepa.evaluation import should_probe
from fastjepa.exchange import Exchange
from fastjepa.exits import Exit
from fastjepa.interop import WeightsRefused, load_weights, read_weights, with_optimizer
from fastjepa.jepa import JEPA
from fastjepa.keeping import never_trained
from fastjepa.log import Log, RunLog
from fastjepa.loop import Trainer
from fastjepa.masks import GeneratorCollator
from fastjepa.memory import usable_memory
from fastjepa.parallel import World
from fastjepa.plan import describe, make_plan
from fastjepa.runfolder import RunFolder, open_run
from fastjepa.signals import Interrupted, Interrupts
from fastjepa.spreading import build_exchange, check_processes, choose_exchange
from fastjepa.watchdog import Watchdog

DRAWING = "drawing and encoding synthetic videos, once"
INDEXING = "opening videos that are new, to know what decodes them"
# Exchanges wait longer than the watchdog's longest stage: that names who keeps the others waiting.
EXCHANGE_PATIENCE = 10.0
MINUTES_WITHOUT_WATCHDOG = 24 * 60.0
LOST_ANOTHER = "another process of this run has ended; its own line says why"
COME_AND_GONE = "it came or went while the run began"


def start(settings: Settings, name: str) -> Exit:
    """Train, and turn every foreseen failure into one sentence and its exit code.

    Of several processes each calls this; all but the first leave speaking to that one.
    """
    world = parallel.ALONE
    with Interrupts() as interrupts:
        try:
            found = parallel.launch(os.environ)
            interrupts.loud = found.rank == 0
            device, reason = parallel.set_up(settings.runtime, found)
            watched = settings.runtime.watchdog_minutes
            limit = MINUTES_WITHOUT_WATCHDOG if watched is None else EXCHANGE_PATIENCE * watched
            world = parallel.join(found, device, limit)
            ready = _get_ready(settings, name, device, world)
            interrupts.begin()
        except Interrupted as signal:
            if interrupts.loud:
                _complain(f"{signal}: nothing had begun; the same command begins again")
            return world.leave(Exit.SAVED_AFTER_SIGNAL, wait=False)
        except (ValueError, OSError) as error:
            if world.first:
                _complain(_sentence(error))
            return world.leave(Exit.WRONG_INPUT)
        except (RuntimeError, MemoryError) as error:
            # In one of the processes: its launcher ends the others. What a run begins with is what the settings ask
            # for: more than this machine has.
            if parallel.lost_another(error):
                _complain(LOST_ANOTHER)
                return world.leave(Exit.FAILED)
            _complain(f"the run cannot begin on this machine: {_first_line(error)}")
            return world.leave(Exit.WRONG_INPUT, wait=False)
        with ready.log, Watchdog(watched, world.rank, ready.run.path, ready.log.tell) as watchdog:
            code = _train(settings, ready, world, device, reason, interrupts, watchdog)
    return world.leave(code)


def _complain(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201


def _sentence(error: BaseException) -> str:
    """What is said of an error: of one at a file without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclass
class _Ready:
    """What stands before the run begins; everything that could be refused was not."""

    step: Step
    masks: dict[int, GeneratorCollator]
    videos: Videos
    decoder: Decoder
    exchange: Exchange
    run: RunFolder
    log: Log
    lines: list[str]
    begins_with: Found | None


def _get_ready(settings: Settings, name: str, device: torch.device, world: World) -> _Ready:
    """Errors: ValueError and OSError, in all processes alike, where the run cannot begin."""
    check_processes(settings, world.size)
    masks = world.together(lambda: masks_by_length(settings))
    longest = masks[settings.data.frames]
    step = world.together(lambda: build_step(settings, device, move=False))
    kind, line = world.first_does(lambda: choose_exchange(settings, device, world.size, longest, world.by))
    videos = world.one_by_one(
        lambda: open_collections(settings.data.path, settings.optim.seed, _progress(DRAWING, world.first))
    )
    _alike(world, videos.fingerprint, "data.path: the processes do not see the same videos")
    decoder = world.one_by_one(
        lambda: choose_decoder(
            settings.data.decoder, device, needs_frames(settings), lambda: _indexed(settings, videos, world.first)
        )
    )
    _alike(world, decoder.name, "data.decoder: the processes would not decode alike, name one of them")
    world.together(lambda: should_probe(settings, videos))
    weights, begins_with = world.together(lambda: _initial_weights(settings, name, videos.fingerprint, step.jepa))
    exchange = world.together(lambda: build_exchange(kind, step.jepa, device, settings.optim.dtype))
    opened: list[RunFolder] = []

    def open_first() -> tuple[Path, list[str]]:
        opened.append(open_run(settings, name, videos.fingerprint))
        return opened[0].path, opened[0].notes

    path, notes = world.first_does(open_first)
    run = opened[0] if opened else RunFolder(path, notes)
    log = world.together(
        lambda: (
            RunLog(path, settings.log, path.name, settings.last_step)
            if world.first
            else Log(path, f"process {world.rank} of {world.size}")
        )
    )
    lines = [*notes, *weights, *([line] if line else [])]
    return _Ready(step, masks, videos, decoder, exchange, run, log, lines, begins_with)


def _alike(world: World, value: str, problem: str) -> None:
    """Errors: ValueError where the processes do not have the same value."""
    values = world.gather(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ValueError(f"{problem}: {values[0]} in process 0, {other} in process {rank}")


def _train(
    settings: Settings,
    ready: _Ready,
    world: World,
    device: torch.device,
    reason: str,
    interrupts: Interrupts,
    watchdog: Watchdog,
) -> Exit:
    run, log, step, videos, decoder = ready.run, ready.log, ready.step, ready.videos, ready.decoder
    workers = _workers(settings, world.sharing)
    try:
        # Of what a machine has each of its processes gets its part, and all take the batch that fits everywhere.
        usable = min(world.gather(usable_memory(device) / (1 if device.type == "cuda" else world.sharing)))
        plan = make_plan(
            settings,
            step.jepa,
            ready.masks[settings.data.frames],
            usable,
            world.first_does(run.batch_size),
            compiled=step.compiled,
            processes=world.size,
            shards=world.size if ready.exchange.shards else 1,
        )
        if world.first:
            run.remember_batch_size(plan.batch_size)
        for line in (
            f"run        {run.path}",
            *ready.lines,
            f"data       {videos.description}; {len(videos.train)} for pretraining",
            f"decoder    {decoder.name} ({decoder.reason})",
            *decoder.lines,
            f"device     {device} ({reason}); {workers} loader workers",
            *step.lines,
            *describe(settings, plan, step.jepa),
        ):
            log.say(line)
        log.settings(config.flat(settings))
        trainer = Trainer(
            settings, run, log, device, world, step.jepa, ready.exchange, ready.masks, videos, decoder, plan,
            interrupts, watchdog, workers, ready.begins_with,
        )  # fmt: skip
        return trainer.train()
    except TooManyBadFiles as error:
        log.tell(f"stopped    {error}")
        log.status("failed", None, reason=str(error))
        return Exit.TOO_MANY_BAD_FILES
    except CheckpointError as error:
        log.tell(f"stopped    {error}")
        log.status("failed", None, reason=str(error))
        return Exit.WRONG_INPUT
    except (OSError, RuntimeError, MemoryError) as error:
        # A loader process that died, memory that is used up, a disk that is gone, another process that is: one
        # sentence for the person at the console, and where it came from in train.log.
        first_line = _first_line(error)
        if parallel.lost_another(error):
            first_line = LOST_ANOTHER
        log.note(traceback.format_exc())
        log.tell(f"failed     {first_line} (details in {run.path / 'train.log'}); the same command continues")
        log.status("failed", None, reason=first_line)
        return Exit.FAILED
    finally:
        run.close()


def _initial_weights(settings: Settings, name: str, data: str, jepa: JEPA) -> tuple[list[str], Found | None]:
    """Put the weights of `init.from` into a new run; lines that say what went where.

    And with `init.optimizer` the checkpoint whose optimizer state comes after them.

    A run that has checkpoints goes on from them: the file is not read again, and need not exist any more. Errors:
    ValueError where the weights cannot be read or do not fit.
    """
    source = settings.init.from_
    if source is None:
        return [], None
    if _has_checkpoints(settings, name, data):
        return [f"weights    began as those of {source} (init.from); this run goes on from its own"], None
    try:
        weights = read_weights(source)
        if not settings.init.optimizer:
            return load_weights(jepa, weights), None
        own = with_optimizer(weights)
        lines = load_weights(jepa, own)
        shapes = {key: parameter.shape for key, parameter in jepa.named_parameters() if parameter.requires_grad}
        fresh = [key.removeprefix("predictor.") for key in never_trained(own.found, shapes)]
        if fresh:
            lines.append(f"optimizer  that run did not train {', '.join(fresh)}: moments of zero")
        return lines, own.found
    except (WeightsRefused, CheckpointError) as error:
        raise ValueError(f"init.from: {error}") from None


def _has_checkpoints(settings: Settings, name: str, data: str) -> bool:
    """Whether the folder that this run will take has checkpoints, be they damaged: it never starts anew then."""
    if settings.resume == "never":
        return False
    own = Path(settings.log.folder) / f"{name}-{config.identity(settings, data)}"
    folder = (own if settings.resume == "auto" else Path(settings.resume)).expanduser() / "checkpoints"
    kept = re.compile(r"(corrupt-|\.tmp-replaced-)?step-[0-9]+")
    return folder.is_dir() and any(kept.fullmatch(path.name) for path in folder.iterdir())


def _workers(settings: Settings, sharing: int) -> int:
    return auto_workers(sharing) if settings.data.workers == "auto" else settings.data.workers


def auto_workers(sharing: int = 1) -> int:
    """Loader processes of `data.workers=auto`: the training process keeps a processor for itself.

    `sharing` training processes have the same processors.
    """
    return max(1, min(8, processors() // sharing - 1))


def _indexed(settings: Settings, videos: Videos, speaks: bool) -> list[Entry]:
    """What the indexes of the collections say of every video, after they were brought up to date."""
    path = settings.data.path
    say = Console(highlight=False, soft_wrap=True, emoji=False, quiet=not speaks).print
    known: dict[str, Entry] = {}
    for one in [path] if isinstance(path, str) else path:
        index = update_index(
            one, None, processors(), progress=_progress(INDEXING, speaks), say=lambda text: say(text, markup=False)
        )
        known |= {entry.path: entry for entry in index.entries}
        if index.unsaved:
            say(f"warning: {index.unsaved}", markup=False)
    return [known.get(absolute(name)) or Entry(name, 0, 0, COME_AND_GONE) for name in videos.paths]


def _progress(what: str, speaks: bool) -> Callable[[int, int], None]:
    """Says every tenth how far something is that takes a while the first time only."""
    console = Console(highlight=False, soft_wrap=True, quiet=not speaks)
    said = -1

    def progress(done: int, total: int) -> None:
        nonlocal said
        tenth = 10 * done // total
        if tenth > said:
            said = tenth
            console.print(f"{what}: {done} of {total}", markup=False)

    return progress
