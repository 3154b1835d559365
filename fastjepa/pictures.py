"""From a run, or from weights of elsewhere, to its pictures: of which clips they are, and what cannot be drawn.

What is missing (videos that have vanished, a run without a checkpoint) is a sentence; the rest is drawn all the same.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa import config, configfile, viz
from fastjepa.build import build_dataset, build_reader, length_of_slots, masks_by_length
from fastjepa.config import Settings
from fastjepa.data.crashes import LISTED, Crashes
from fastjepa.data.decode import VideoError
from fastjepa.data.mixture import open_collections
from fastjepa.data.replaced import TooManyBadFiles
from fastjepa.data.sampling import central_box
from fastjepa.data.source import Videos
from fastjepa.data.transforms import cut
from fastjepa.interop import WeightsRefused
from fastjepa.opened import Opened, open_encoder
from fastjepa.probe import Cut
from fastjepa.viz import Record, Section, Shown

CLIPS = 4
# Colours are fitted on as many clips as have about so many tokens, within these limits.
TOKENS_FITTED, MOST_FITTED = 25_000, 32
TOKENS_AT_ONCE = 8192
# For every clip that is wanted so many videos are tried.
TRIES = 3
LONGEST_TITLE = 18


@dataclass(frozen=True)
class Wanted:
    """What is asked for: how many clips are shown; which `videos` (numbers in the list, or paths), where that matters;
    and the patch (slot, row, column) of the first clip whose likes are sought, None for the least usual one."""

    clips: int = CLIPS
    videos: tuple[str, ...] = ()
    patch: tuple[int, int, int] | None = None


@dataclass
class Drawn:
    """The files that were made, the page last, and what could not be drawn, in sentences."""

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Clips:
    """Normalised float32 [B, C, T, H, W] with names; `seconds` of a token slot in the first, None where unknown."""

    clips: Tensor
    titles: list[str]
    seconds: float | None
    notes: list[str]


def draw(
    source: str | Path,
    *,
    out: str | Path | None = None,
    data: str | None = None,
    wanted: Wanted | None = None,
    network: str = "target_encoder",
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> Drawn:
    """Pictures and page of a run (its folder, or a checkpoint in it), or of weights that `open_encoder` reads.

    They go to `out`: by default viz/ in the run folder, viz/step-N/ for one of its checkpoints, NAME-viz/ beside other
    weights. `data` are other videos than those of the run. Errors: ValueError with one sentence for what was asked and
    cannot be; OSError where `out` cannot be written.
    """
    wanted, path = wanted or Wanted(), Path(source).expanduser()
    whole = (path / "config.yaml").is_file()
    drawn = Drawn()
    opened: Opened | None = None
    try:
        opened = open_encoder(path, network, device)  # type: ignore[arg-type]
    except WeightsRefused as error:
        if not whole:
            raise
        drawn.notes.append(f"no pictures of features: {error}")
    run = path if whole else None if opened is None else opened.run
    if run is not None:
        # Where the videos are now: a checkpoint knows where they were.
        settings = configfile.load(run / "config.yaml", stored=True)
    else:
        assert opened is not None, "without a run the weights were opened or refused"
        settings = opened.settings
    if run is None and data is None and not wanted.videos:
        raise ValueError(f"{path} is no run and names no videos: give a folder, a list or a video with --data PATH")
    _check_patch(settings, wanted)
    videos = _videos(settings.data.path if data is None and run is not None else data, settings.optim.seed, data, drawn)
    if data is not None:  # cut like clips of no data set of the run
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"path": data})})
    if videos is None and wanted.videos:
        videos = Videos([], np.arange(0), "", f"only {', '.join(wanted.videos)}")
    if videos is not None:
        wanted_paths(videos, wanted)  # refused before any work
    if opened is not None:
        say(f"weights    {opened.path}: {opened.description}, {opened.network}")
    if videos is not None:
        say(f"videos     {videos.description}")
    if run is None:
        record, place = Record(path.name), path.parent / f"{path.name.partition('.')[0]}-viz"
    else:
        record, place = viz.read_record(run), run / "viz" if whole or opened is None else run / "viz" / opened.path.name
    return draw_all(
        settings,
        record,
        videos,
        None if opened is None else opened.encoder,
        Path(out).expanduser() if out is not None else place,
        wanted,
        drawn,
        run=run,
        features="" if opened is None else _described(opened),
    )


def draw_all(
    settings: Settings,
    record: Record,
    videos: Videos | None,
    encoder: nn.Module | None,
    out: Path,
    wanted: Wanted,
    drawn: Drawn,
    *,
    run: Path | None,
    features: str,
    alive: Callable[[], None] = lambda: None,
) -> Drawn:
    """Everything that there is something to draw of, and the page. `features` names the encoder in a caption.

    `alive` is called now and then. Without a `run` masks and curves are nobody's. Errors: OSError where `out` cannot be
    written; ValueError for videos that were asked for by name and cannot be read.
    """
    sections: list[Section] = []
    out.mkdir(parents=True, exist_ok=True)
    if record.rows or any(probe["results"] for probe in record.probes):
        if record.rows:
            viz.loss_curve(record.rows, out / "loss.png")
            drawn.files.append(out / "loss.png")
        viz.curve_picture(record.rows, record.probes, out / "curves.png")
        drawn.files.append(out / "curves.png")
        shaded = any(isinstance(row.get("verdict"), str) for row in record.rows)
        panels = [Shown(svg, title) for title, svg in viz.curve_svgs(record.rows, record.probes)]
        sections.append(Section("How it went", f"{CURVES} {SHADED if shaded else ''}".strip(), panels, small=True))
        alive()
    if videos is not None and encoder is not None:
        sections += _draw_features(settings, videos, encoder, run, out, wanted, drawn, features, alive)
    if videos is not None and videos.paths and run is not None:
        sections += _draw_training_clips(settings, videos, run, out, wanted, drawn)
        alive()
    defaults = config.flat(Settings())
    changed = {key: value for key, value in config.flat(settings).items() if value != defaults[key]}
    viz.write_page(out / "index.html", record, sections, changed, drawn.notes)
    drawn.files.append(out / "index.html")
    return drawn


CURVES = "What tells is the first panel, and whether the targets keep content and directions."
SHADED = (
    "Shaded: blue while only the position is predicted, orange while it collapses or is stuck, red where it has "
    "collapsed or diverged."
)
PCA = (
    "The first three principal components of patch features as red, green and blue, without what is usual at each "
    "position; one fit for all clips, so the same colour means alike features."
)
SIMILAR = "How alike all patches are to the one in the yellow frame, {}; in the same clip, and in others."
MASKS = (
    "The encoder sees the patches of the blue rows; the predictor has to tell the target features of those of the red "
    "rows. The first clip of the run with the masks of the first step."
)
SAMPLES = "The first clips of the run as the network sees them: cropped, mirrored and resized."


def _draw_features(
    settings: Settings,
    videos: Videos,
    encoder: nn.Module,
    run: Path | None,
    out: Path,
    wanted: Wanted,
    drawn: Drawn,
    features: str,
    alive: Callable[[], None],
) -> list[Section]:
    d = settings.data
    try:
        found = clips_of(settings, videos, wanted, run)
    except VideoError as error:
        raise ValueError(f"{error.path}: {error}") from None
    except (ValueError, OSError) as error:
        drawn.notes.append(f"no pictures of features: {error}")
        return []
    drawn.notes += found.notes
    alive()
    tokens = viz.content(torch.cat(list(_tokens(encoder, found.clips, alive))))
    if not tokens.isfinite().all():
        drawn.notes.append("no pictures of features: they are not finite, the weights have diverged")
        return []
    shown = min(len(found.clips), len(wanted.videos) or wanted.clips)
    clips, titles = list(found.clips[:shown]), found.titles[:shown]
    grid = (d.frames // d.tubelet, d.crop // d.patch, d.crop // d.patch)
    colours = viz.fit(tokens).colours(tokens[:shown]).view(shown, *grid, 3).numpy()
    viz.pca_picture(clips, list(colours), titles, d.tubelet, out / "pca.png")
    slower = viz.animation(clips, list(colours), d.tubelet, found.seconds, out / "pca.webp")
    token = viz.most_salient(tokens[0]) if wanted.patch is None else int(np.ravel_multi_index(wanted.patch, grid))
    chosen = tuple(int(number) for number in np.unravel_index(token, grid))
    maps = viz.similarities(tokens, 0, token)[:shown].view(shown, *grid).numpy()
    viz.similarity_picture(clips, list(maps), chosen, titles, d.tubelet, d.patch, out / "similarity.png")  # type: ignore[arg-type]
    drawn.files += [out / "pca.png", out / "pca.webp", out / "similarity.png"]
    pace = "at the speed of the clip" if slower == 1 else f"{slower} times slower than the clip"
    choice = "chosen by hand" if wanted.patch is not None else "the least usual of the first clip for its place"
    pictures = [
        Shown(out / "pca.png", "clips and colours of their features", PCA),
        Shown(out / "similarity.png", "likeness to a chosen patch", SIMILAR.format(choice)),
        Shown(out / "pca.webp", "colours of features, moving", f"Clips and their colours, moving: {pace}."),
    ]
    return [Section("What the features tell apart", features, pictures)]


def _draw_training_clips(
    s: Settings, videos: Videos, run: Path, out: Path, wanted: Wanted, drawn: Drawn
) -> list[Section]:
    """masks.png and clips.png: the first clips of the run with the masks of its first step."""
    try:
        clips = training_clips(s, videos, run, wanted.clips, drawn.notes.append)
    except (TooManyBadFiles, VideoError, OSError) as error:
        drawn.notes.append(f"no pictures of masks and clips: {error}")
        return []
    length_of = length_of_slots(s)
    masks = masks_by_length(s)[length_of(0)]
    context, target = masks.draw(0, [0], lambda slot: length_of(slot) == length_of(0))
    viz.mask_picture(clips[0], context, target, s.data.tubelet, s.data.patch, out / "masks.png")
    viz.clip_picture(clips, [f"clip {slot}" for slot in range(len(clips))], s.data.tubelet, out / "clips.png")
    drawn.files += [out / "masks.png", out / "clips.png"]
    pictures = [Shown(out / "masks.png", "masks over a clip", MASKS), Shown(out / "clips.png", "clips", SAMPLES)]
    return [Section("What it is trained on", "", pictures)]


def training_clips(s: Settings, videos: Videos, run: Path, number: int, say: Callable[[str], None]) -> list[Tensor]:
    """The first clips of a run, as its first steps had them: uint8 or float32 [C, T, H, W]. Errors: TooManyBadFiles."""
    dataset = build_dataset(s, videos)
    Crashes(videos.paths, run / LISTED, say).keep_from(dataset.reader)
    shown = min(number, s.optim.global_batch)
    clips: list[Tensor] = []
    while len(clips) < shown:
        clips += dataset.decoded(len(clips) // s.data.clips_per_video).clips
    return clips[:shown]


def clips_of(s: Settings, videos: Videos, wanted: Wanted, run: Path | None = None) -> Clips:
    """The middle of each video, the centre of the frame: first those that are shown, then more for the fit.

    By default of videos that pretraining has not seen, where there are some; never of those that have ended a process
    of this `run`. Errors: VideoError for one that was asked
    for; ValueError where none can be read.
    """
    d = s.data
    tokens = (d.frames // d.tubelet) * (d.crop // d.patch) ** 2
    number = max(len(wanted.videos) or wanted.clips, min(MOST_FITTED, TOKENS_FITTED // tokens))
    paths = [*wanted_paths(videos, wanted), *videos.paths]
    asked = len(paths) - len(videos.paths)
    reader = build_reader(s, replace(videos, paths=paths))
    notes: list[str] = []
    if run is not None:
        Crashes(paths, run / LISTED, notes.append).keep_from(reader)
    shape = Cut(d.frames, d.stride, d.crop, d.duration, d.fps)
    clips: list[Tensor] = []
    titles: list[str] = []
    seconds: float | None = None
    lost: list[tuple[str, str]] = []
    order = [*range(asked), *(asked + video for video in _spread(videos, number, asked))]
    for video in order:
        try:
            info = reader.info(video)
            numbers = shape.numbers(info)
            frames = reader.read(video, numbers)
        except VideoError as error:
            if video < asked:
                raise
            lost.append((error.path, str(error)))
            continue
        if not clips:
            seconds = _slot_seconds(info.times, numbers, d.tubelet)
        clips.append(cut(frames, central_box(info.height, info.width), False, d.crop))
        titles.append(_title(paths[video]))
        if len(clips) == number:
            break
    if not clips:
        if not lost:
            raise ValueError("there are no videos")
        raise ValueError(
            f"none of {len(lost)} videos that were tried can be read, {lost[0][0]} among them ({lost[0][1]})"
        )
    if lost:
        others = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        notes.append(f"passed over, as it cannot be read: {lost[0][0]} ({lost[0][1]}){others}")
    if len(clips) == 1:
        notes.append("features of one clip alone: what is usual at each position cannot be taken away from them")
    return Clips(torch.stack(clips), titles, seconds, notes)


def wanted_paths(videos: Videos, wanted: Wanted) -> list[str]:
    """The names of the videos that were asked for. Errors: ValueError for a number or path that there is not."""
    found = []
    for name in wanted.videos:
        if name.isdecimal() and not Path(name).exists():
            if int(name) >= len(videos.paths):
                raise ValueError(f"--video: expected a number below {len(videos.paths)}, or a path, given {name}")
            found.append(videos.paths[int(name)])
        elif Path(name).expanduser().exists():
            found.append(str(Path(name).expanduser()))
        else:
            raise ValueError(f"--video: no such file, and no number of a video: {name}")
    return found


@torch.no_grad()
def _tokens(encoder: nn.Module, clips: Tensor, alive: Callable[[], None]) -> Iterator[Tensor]:
    """float32 [B, N, E] on the CPU, a few clips at a time."""
    device = next(encoder.parameters()).device
    first = encoder(clips[:1].to(device)).float().cpu()
    yield first
    for batch in clips[1:].split(max(1, TOKENS_AT_ONCE // first.shape[1])) if len(clips) > 1 else ():
        alive()
        yield encoder(batch.to(device)).float().cpu()


def _spread(videos: Videos, number: int, asked: int) -> Sequence[int]:
    """Numbers of videos to try: held-out ones in their random order, or such that lie evenly over the list."""
    tries = TRIES * number
    if "test" in videos.splits and len(videos.splits["test"]):
        held_out = [int(video) for video in videos.splits["test"]]
        labels = next(iter(videos.tasks.values())).labels
        seen: Counter[int] = Counter()
        turns = []
        for video in held_out:
            seen[labels[video]] += 1
            turns.append(seen[labels[video]])
        # One of each class before a second one of any.
        ordered = [video for _, video in sorted(zip(turns, held_out), key=lambda pair: pair[0])]
        return [*ordered, *(int(video) for video in videos.splits["train"])][:tries]
    total = len(videos.paths)
    first = np.unique(np.linspace(0, total - 1, min(number, total)).round().astype(int)).tolist() if total else []
    others = [video for video in range(min(total, tries)) if video not in set(first)]
    return [*first, *others][:tries]


def _slot_seconds(times: np.ndarray | None, numbers: np.ndarray, tubelet: int) -> float | None:
    if times is None or len(numbers) < 2:
        return None
    between = float(times[numbers[-1]] - times[numbers[0]]) / (len(numbers) - 1)
    return tubelet * between if between > 0 else None


def _videos(path: str | Mapping[str, object] | None, seed: int, asked: str | None, drawn: Drawn) -> Videos | None:
    """Errors: ValueError where they were `asked` for; those that a run names and that have vanished are a note."""
    if path is None:
        return None
    try:
        return open_collections(path, seed)
    except (ValueError, OSError) as error:
        if asked is not None:
            raise
        drawn.notes.append(f"no pictures of videos: {error}")
        return None


def _check_patch(s: Settings, wanted: Wanted) -> None:
    d = s.data
    grid = (d.frames // d.tubelet, d.crop // d.patch, d.crop // d.patch)
    if wanted.patch is not None and not all(0 <= place < most for place, most in zip(wanted.patch, grid)):
        most = ",".join(str(number - 1) for number in grid)
        given = ",".join(map(str, wanted.patch))
        raise ValueError(f"--patch: expected SLOT,ROW,COLUMN from 0,0,0 to {most}, given {given}")


def _described(opened: Opened) -> str:
    step = "" if opened.step is None else f" of step {opened.step:,}"
    return f"Features of the {opened.network.replace('_', ' ')}{step}."


def _title(name: str) -> str:
    """The end of a name, in a line that fits beside a frame."""
    short = Path(name).stem.encode(errors="backslashreplace").decode()
    return short if len(short) <= LONGEST_TITLE else f"{short[: LONGEST_TITLE // 2]}…{short[-LONGEST_TITLE // 2 + 1 :]}"
