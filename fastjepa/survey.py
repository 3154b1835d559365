"""`python -m fastjepa data PATH`: what a collection of videos holds, and whether it is decoded fast enough here."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastjepa import gpus
from fastjepa.build import build_jepa, build_masks
from fastjepa.config import Settings
from fastjepa.data.index import Index, update_index
from fastjepa.data.pace import measure_pace
from fastjepa.data.processes import processors
from fastjepa.data.reencode import Recipe
from fastjepa.data.search import kind_of
from fastjepa.data.summary import shown, summarise
from fastjepa.exits import Exit
from fastjepa.forecast import expected_rate
from fastjepa.memory import usable_memory
from fastjepa.plan import make_plan
from fastjepa.preparing import Preparation, open_preparation, run_preparation
from fastjepa.verbs.parsing import Parser

MODELS = {"ViT-L": "vit_large", "ViT-H": "vit_huge"}
PACE_SECONDS = 2.0  # of decoding
# What it is, its default, least and most.
RECIPE = {
    "--short-side": ("pixels of the shorter side, never more than the source has", Recipe.short_side, 16, 4096),
    "--gop": ("frames from one key frame to the next", Recipe.gop, 1, 600),
    "--quality": ("x264's constant rate factor: less is better and larger", Recipe.quality, 1, 51),
}
SAY_SECONDS = 10.0  # between two lines where there is no terminal


def main(arguments: Sequence[str]) -> int:
    """Scan, print, return the exit code."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

    def complain(text: str) -> None:
        console.print(shown(text), markup=False)

    try:
        given = _parse(arguments)
        preparation = given.prepare and open_preparation(given.prepare, given.path, given.recipe, given.workers)
        gpu, reason = (gpus.named(given.gpu), "named by --gpu") if given.gpu is not None else gpus.of_this_machine()
        with _progress(console) as progress:
            index = update_index(given.path, given.out, given.workers, progress=progress, say=complain)
    except ValueError as error:
        complain(str(error))
        return Exit.WRONG_INPUT
    except RuntimeError as error:
        complain(str(error))
        return Exit.FAILED
    except OSError as error:
        complain(f"{error.strerror}: {error.filename}" if error.filename else error.strerror or str(error))
        return Exit.WRONG_INPUT
    except KeyboardInterrupt:
        complain("interrupted; what was found is kept, and the same command goes on")
        return Exit.SECOND_INTERRUPT
    settings = Settings()
    for line in summarise(index, settings.data.frames, settings.data.stride):
        _say(line)
    if index.unsaved:
        complain(f"warning: {index.unsaved}")
    if all(entry.reason is not None for entry in index.entries):
        complain(f"none of the {len(index.entries):,} files can be read")
        return Exit.TOO_MANY_BAD_FILES
    if preparation is not None:
        return _prepare(preparation, given.path, index, settings, console, complain)
    for line in _speed(index, settings, gpu, reason):
        _say(line)
    return Exit.FAILED if index.unsaved else Exit.DONE


def _prepare(
    preparation: Preparation,
    path: str,
    index: Index,
    settings: Settings,
    console: Console,
    complain: Callable[[str], None],
) -> Exit:
    try:
        with _progress(console) as progress:
            return run_preparation(preparation, path, index, settings.data, _say, progress)
    except ValueError as error:
        complain(str(error))
        return Exit.WRONG_INPUT
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        complain(f"{error.strerror or error}{where}; what was made is kept, and the same command goes on")
        return Exit.FAILED
    except RuntimeError as error:
        complain(f"{error}; what was made is kept, and the same command goes on")
        return Exit.FAILED
    except KeyboardInterrupt:
        complain("interrupted; what was made is kept, and the same command goes on")
        return Exit.SECOND_INTERRUPT


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        """Errors: ValueError instead of an exit."""
        raise ValueError(message)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Errors: ValueError."""
    parser = _Parser("data", "What a collection of videos holds, and whether it is decoded fast enough here.")
    parser.add_argument(
        "path", metavar="PATH", help="what data.path takes: a folder, a list file, a shard (.tar), one video"
    )
    parser.add_argument("--workers", metavar="N", default=str(processors()), help="processes that open files")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where the index is kept, instead of in the cache")
    parser.add_argument("--gpu", metavar="NAME", help="the GPU that will train: h200, a100, ...")
    parser.add_argument("--prepare", metavar="FOLDER", type=Path, help="encode the videos once more for fast training")
    for name, (kind, default, _, _) in RECIPE.items():
        parser.add_argument(name, metavar="N", help=f"with --prepare: {kind} ({default})")
    given = parser.read(arguments)
    if not given.workers.isdecimal() or int(given.workers) < 1:
        raise ValueError(f"--workers: expected a whole number (at least 1), given {given.workers!r}")
    given.workers = int(given.workers)
    given.recipe = _recipe(given)
    if given.gpu is not None and given.prepare is not None:
        raise ValueError(f"--gpu: expected without --prepare, which measures this machine, given {given.gpu!r}")
    if given.out is not None and not _may_hold_an_index(given.out, given.path):
        raise ValueError(f"--out: expected a file for the index, such as videos.jsonl, given {str(given.out)!r}")
    return given


def _recipe(given: argparse.Namespace) -> Recipe:
    """Errors: ValueError."""
    values = []
    for name, (_, default, least, most) in RECIPE.items():
        text = getattr(given, name.strip("-").replace("-", "_"))
        if text is not None and given.prepare is None:
            raise ValueError(f"{name}: expected beside --prepare FOLDER only, given {text!r} without it")
        if text is not None and not (text.isdecimal() and least <= int(text) <= most):
            raise ValueError(f"{name}: expected a whole number from {least} to {most}, given {text!r}")
        values.append(default if text is None else int(text))
    return Recipe(*values)


def _may_hold_an_index(out: Path, path: str) -> bool:
    """Whether it is no folder, nothing that holds videos or images, and not the list itself."""
    if not out.name or out.is_dir() or kind_of(out.name) is not None:
        return False
    return os.path.realpath(out) != os.path.realpath(os.path.expanduser(path))


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, elsewhere a line every ten seconds."""
    if console.is_terminal:
        columns = (TextColumn("files"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("files")
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            console.print(f"{done:,} of {total:,} files", markup=False)

    yield say


def _speed(index: Index, settings: Settings, gpu: gpus.GPU, reason: str) -> list[str]:
    """What PyAV decodes here in one process, an estimate for all processors, and what the models need."""
    data = settings.data
    needs = {label: _needed(name, gpu) for label, name in MODELS.items()}
    wanted = ", ".join(f"{label} {_rate(need)}" for label, need in needs.items())
    needed = f"needed     by one {gpu.name} ({reason}): {wanted} clips/s, a model's figures"
    paths = [
        entry.path for entry in index.entries if entry.reason is None and (entry.still or entry.frames >= data.tubelet)
    ]
    if not paths:
        return [f"speed      not measured: every video is shorter than a tubelet of {data.tubelet} frames", needed]
    pace = measure_pace(paths, data.frames, data.stride, data.crop, PACE_SECONDS)
    if isinstance(pace, str):
        return [f"speed      not measured: {shown(pace)}", needed]
    estimate = pace.rate * processors()
    shares = ", ".join(f"{estimate / need:.0%} of what {label} needs" for label, need in needs.items())
    return [
        f"speed      {_rate(pace.rate)} clips/s of {data.frames} frames at stride {data.stride} and {data.crop} px "
        f"with PyAV in one process here ({pace.clips} clips of {pace.videos} videos in {pace.seconds:.1f} s)",
        needed,
        f"estimate   {processors()} processors: {_rate(estimate)} clips/s, {shares}",
    ]


def _needed(name: str, gpu: gpus.GPU) -> float:
    """Clips/s that one GPU trains on in the published recipe, by the forecast."""
    settings = Settings.model_validate({"model": {"name": name}})
    with torch.device("meta"):
        jepa = build_jepa(settings)
    plan = make_plan(settings, jepa, build_masks(settings), usable_memory(gpu), compiled=True)
    return expected_rate(settings, plan, gpu)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _say(text: str) -> None:
    """Print what the console's encoding may not be able to show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))  # noqa: T201
