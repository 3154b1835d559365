"""Videos that need no download: one of six shapes, repeated over the frame, in one of eight motions.

`synthetic://moving-shapes?videos=128&size=160&frames=64&seed=0&noise=0.2` names such a set. `materialise` draws and
encodes it once into the user's cache as ordinary H.264 files, which are then read like any other folder of videos.
With `frames=1` it is a set of still images (PNG), each the first frame of what would be a video.

Everything is drawn in reference units, a frame of 48 x 48, and scaled by size / 48, so a seed shows the same scenes at
every size. Colour, brightness, size and position say nothing about the label: a network finds such cues first and
then has no need to learn shape or motion. The noise keeps an untrained network from reading both off clean edges.

Time: translation and rotation have the recipe's per-frame rate up to 10 frames. A longer video spreads the motion of
10 recipe frames over its whole length (rate x 10 / frames): two lattice pitches or a third of a turn, however it is
sampled. Growth always takes the whole video.

Letters: F frames, S size in pixels, P width of the square patch drawn for one copy.
"""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import av
import numpy as np

from fastjepa.data.processes import end_with_parent

SHAPES = ("disc", "square", "triangle", "star", "ring", "plus")
MOTIONS = ("right", "left", "up", "down", "grow", "shrink", "rotate", "still")

RECIPE = 1  # part of the cache key: raise it whenever the same parameters give other pixels or other files

REFERENCE = 48.0  # side of the frame in the units of the constants below
PITCH, JITTER = 16.0, 2.4
RADIUS, RADIUS_SPREAD = (6.0, 6.7), 0.05
REACH = RADIUS[1] * (1 + RADIUS_SPREAD)  # no copy is ever wider than this
TILT, TILT_SPREAD = 0.25, 0.2  # rad, of the clip and of each copy
SPEED, HEADING = (2.4, 3.6), 0.25  # per frame; rad
TURN = (0.18, 0.26)  # rad per frame
GROWTH = (1.8, 2.3)
DARK, GREY, LIGHT = 0.05, 0.5, 0.95

SIDE = 4  # copies per side; they wrap round SIDE * PITCH = 64, which hides the jump as 48 + 2 * REACH < 64
STALE_SECONDS = 24 * 3600
PROCESS_PIXELS = 40_000_000  # a few seconds of work: with less, starting a process costs more than it saves

NAME = "moving-shapes"
SCHEME = "synthetic"
LIMITS = {
    "videos": (1, 1_000_000),
    "size": (32, 1024),
    "frames": (1, 1024),
    "seed": (0, 2**63 - 1),
    "noise": (0.0, 0.5),
}


@dataclass(frozen=True)
class MovingShapes:
    """A set of labelled videos. Every parameter changes the pixels or their number, so all are in the cache key.

    Args: `videos` how many, `size` side in pixels (even), `frames` per video, `seed`, and `noise`, the standard
    deviation of the pixel noise, fresh in each frame, where black to white is 1.
    Raises ValueError, in one sentence, for a value of the wrong type or out of range.
    """

    videos: int = 128
    size: int = 160
    frames: int = 64
    seed: int = 0
    noise: float = 0.2

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            allowed = (int, float) if name == "noise" else (int,)
            if isinstance(value, bool) or not isinstance(value, allowed):
                kind = "a number" if name == "noise" else "a whole number"
                raise ValueError(f"{SCHEME}://{NAME}: {name} must be {kind}, got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{SCHEME}://{NAME}: {name} must lie in {low}..{high}, got {value}")
        if self.size % 2:
            raise ValueError(f"{SCHEME}://{NAME}: size must be even (H.264 halves the chroma planes), got {self.size}")

    @classmethod
    def from_url(cls, url: str) -> "MovingShapes":
        """Read `synthetic://moving-shapes?videos=1920&size=48`; parameters left out keep their defaults.

        Raises ValueError, in one sentence, for any mistake.
        """
        parts = urlsplit(url)
        if parts.scheme != SCHEME:
            raise ValueError(f"expected {SCHEME}://{NAME}?..., got {url!r}")
        # A fragment would otherwise vanish, and with it every parameter behind a stray '#'.
        name = parts.netloc + parts.path + ("#" + parts.fragment if parts.fragment else "")
        if name != NAME:
            raise ValueError(f"{url!r}: unknown set {name!r}, the nearest is {NAME!r}")
        given: dict[str, int | float] = {}
        for key, text in parse_qsl(parts.query, keep_blank_values=True):
            if key not in LIMITS:
                nearest = get_close_matches(key, LIMITS, n=1, cutoff=0.0)[0]
                raise ValueError(f"{url!r}: unknown parameter {key!r}, the nearest is {nearest!r}")
            if key in given:
                raise ValueError(f"{url!r}: {key} is given twice")
            try:
                given[key] = float(text) if key == "noise" else int(text)
            except ValueError:
                kind = "a number" if key == "noise" else "a whole number"
                raise ValueError(f"{url!r}: {key} must be {kind}, got {text!r}") from None
        return cls(**given)  # type: ignore[arg-type]

    def url(self) -> str:
        """The normalised address: every parameter, in the order of the fields."""
        values = (f"{f.name}={float(self.noise) if f.name == 'noise' else getattr(self, f.name)}" for f in fields(self))
        return f"{SCHEME}://{NAME}?" + "&".join(values)

    def label(self, index: int) -> tuple[int, int]:
        """(number in SHAPES, number in MOTIONS) of video `index`, from (seed, index) alone.

        48 videos hold each pair once, each 8 of them each motion once. Raises IndexError outside 0..videos-1.
        """
        if not 0 <= index < self.videos:
            raise IndexError(f"video {index} of a set of {self.videos}")
        return _block_labels(self.seed, index // 48)[index % 48]

    def draw(self, index: int) -> np.ndarray:
        """uint8 `[F, S, S, 3]`, RGB: the pixels of video `index` before coding, from (parameters, index) alone.

        Raises IndexError outside 0..videos-1.
        """
        return np.concatenate(list(_drawn(self, index)))


def video_names(spec: MovingShapes) -> list[str]:
    """File names in order, such as `000042-disc-right.mp4`; images end in `.png`."""
    return [_name(spec, index) for index in range(spec.videos)]


def _name(spec: MovingShapes, index: int) -> str:
    shape, motion = spec.label(index)
    return f"{index:06d}-{SHAPES[shape]}-{MOTIONS[motion]}.{'png' if spec.frames == 1 else 'mp4'}"


def _generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Counter-based, so that no video depends on what was drawn before it, or where."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream << 32 | index], dtype=np.uint64)))


@lru_cache(maxsize=64)
def _block_labels(seed: int, block: int) -> list[tuple[int, int]]:
    """The 48 pairs of a block in an order whose multiples of 8 are balanced too.

    `i % 8` and `i % 6` would only meet in pairs of equal parity; the shift by `i // 24` gives the other half.
    """
    rng = _generator(seed, 1, block)
    shapes, motions = rng.permutation(len(SHAPES)), rng.permutation(len(MOTIONS))
    order = rng.permuted(np.arange(48).reshape(6, 8), axis=1).ravel()
    return [(int(shapes[(i + i // 24) % 6]), int(motions[i % 8])) for i in order]


def _drawn(spec: MovingShapes, index: int) -> Iterator[np.ndarray]:
    """The frames of video `index`, uint8 `[f, S, S, 3]`, few at a time: long videos need no more memory."""
    shape, motion = spec.label(index)
    rng = _generator(spec.seed, 0, index)
    phase = rng.uniform(0, PITCH, 2)
    lattice = np.stack(np.meshgrid(*[np.arange(SIDE) * PITCH] * 2), -1).reshape(-1, 2)
    start = lattice + phase + rng.uniform(-JITTER, JITTER, lattice.shape)  # [16, 2], x before y
    radius = rng.uniform(*RADIUS) * rng.uniform(1 - RADIUS_SPREAD, 1 + RADIUS_SPREAD, len(start))
    tilt = rng.uniform(-TILT, TILT) + rng.uniform(-TILT_SPREAD, TILT_SPREAD, len(start))
    speed, heading, turn, growth = (rng.uniform(*r) for r in (SPEED, (-HEADING, HEADING), TURN, GROWTH))
    turn *= rng.choice((-1, 1))

    elapsed = np.arange(spec.frames) * min(1.0, 10 / spec.frames)  # [F], in frames of the recipe
    fraction = np.linspace(0, 1, spec.frames)
    moved, angle, zoom = np.zeros((spec.frames, 2)), np.zeros(spec.frames), np.ones(spec.frames)
    match MOTIONS[motion]:
        case "right" | "left" | "up" | "down" as word:
            course = {"right": 0.0, "down": 0.5, "left": 1.0, "up": 1.5}[word] * math.pi + heading  # y points down
            moved = elapsed[:, None] * speed * np.array([math.cos(course), math.sin(course)])
        case "grow":
            zoom = growth ** (fraction - 1)
        case "shrink":
            zoom = growth**-fraction
        case "rotate":
            angle = elapsed * turn

    few = max(1, 2**20 // spec.size**2)
    for first in range(0, spec.frames, few):
        part = slice(first, first + few)
        centre = (start[:, None] + moved[part] + PITCH / 2) % (SIDE * PITCH) - PITCH / 2  # [16, f, 2]
        grey = _paint(SHAPES[shape], spec.size, centre, tilt[:, None] + angle[part], radius[:, None] * zoom[part])
        if spec.noise:
            grey += rng.standard_normal(grey.shape, dtype=np.float32) * np.float32(spec.noise)
        pixels = (grey.clip(0, 1) * 255 + 0.5).astype(np.uint8)
        yield np.repeat(pixels[..., None], 3, axis=-1)


def _paint(shape: str, size: int, centre: np.ndarray, angle: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """float32 `[f, S, S]` in 0..1 from each copy's centre `[16, f, 2]`, angle `[16, f]` and radius `[16, f]`."""
    scale = size / REFERENCE
    half = math.ceil(REACH * scale)
    margin = math.ceil(PITCH / 2 * scale) + half + 1  # copies outside are painted, then cut off
    canvas = np.full((centre.shape[1], size + 2 * margin, size + 2 * margin), GREY, np.float32)
    frame = np.arange(centre.shape[1])[:, None, None]
    for position, a, r in zip(centre * scale, angle.astype(np.float32), radius.astype(np.float32), strict=True):
        corner = np.floor(position).astype(np.int64) - half  # [f, 2]
        pixel = corner[:, :, None] + np.arange(2 * half + 1)  # [f, 2, P]
        offset = ((pixel + 0.5 - position[:, :, None]) / scale).astype(np.float32)
        x, y = offset[:, 0, None, :], offset[:, 1, :, None]
        cos, sin, r = np.cos(a)[:, None, None], np.sin(a)[:, None, None], r[:, None, None]
        u, v = cos * x + sin * y, cos * y - sin * x  # [f, P, P], turned back into the shape's own axes
        cover = np.clip(0.5 - _distance(shape, u, v, r) * scale, 0, 1)  # an edge blends over one pixel
        tone = DARK + (LIGHT - DARK) * np.clip(0.5 - v * scale, 0, 1)
        where = frame, pixel[:, 1, :, None] + margin, pixel[:, 0, None, :] + margin
        below = canvas[where]
        canvas[where] = below + cover * (tone - below)
    return canvas[:, margin : margin + size, margin : margin + size]


def _distance(shape: str, u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance of (u, v) to the outline of a shape that touches the circle of radius r; negative inside."""
    match shape:
        case "disc":
            return np.hypot(u, v) - r
        case "ring":
            return np.abs(np.hypot(u, v) - 0.75 * r) - 0.25 * r
        case "plus":
            u, v = np.abs(u), np.abs(v)
            long, wide = np.maximum(u, v), np.minimum(u, v)
            return np.maximum(long - 0.93 * r, wide - 0.36 * r)
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) - math.sqrt(0.5) * r
        case "triangle":
            return _pointed(u, v, r, 3, 0.5)
        case _:
            return _pointed(u, v, r, 5, 0.5)


def _pointed(u: np.ndarray, v: np.ndarray, r: np.ndarray, points: int, inner: float) -> np.ndarray:
    """Star or polygon, folded onto the half sector from a tip to the next inner corner: there the edge is one line."""
    half = math.pi / points
    rho, theta = np.hypot(u, v), np.arctan2(u, -v)
    theta = np.abs((theta + half) % (2 * half) - half)
    along, across = inner * math.sin(half), 1 - inner * math.cos(half)
    return (rho * (along * np.cos(theta) + across * np.sin(theta)) - along * r) / math.hypot(along, across)


def _encode(spec: MovingShapes, index: int) -> bytes:
    """Video `index` as an H.264 mp4, or an image as PNG: the same bytes each time.

    One thread is not enough for that: x264's AVX-512 code for macroblock trees reads memory that nobody wrote, and a
    part of the files differ from run to run. `cpu-independent` selects its portable code instead, at little cost.
    """
    options = {"preset": "veryfast", "crf": "18", "x264-params": "cpu-independent=1"}
    target = BytesIO()
    if spec.frames == 1:
        with av.open(target, "w", format="image2pipe") as container:
            image = container.add_stream("png", rate=1)
            image.width = image.height = spec.size
            image.pix_fmt = "rgb24"
            container.mux(image.encode(av.VideoFrame.from_ndarray(spec.draw(index)[0], format="rgb24")))
            container.mux(image.encode(None))
        return target.getvalue()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options=options)
        stream.width = stream.height = spec.size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = 12
        for part in _drawn(spec, index):
            for image in part:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return target.getvalue()


def materialise(
    spec: MovingShapes,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> Path:
    """The folder that holds the videos of `spec` and `labels.json`; made first if it is not there yet.

    ```
    <cache>/synthetic/moving-shapes-3f9a21c07be4/   000000-disc-right.mp4 ... labels.json
    <cache>/synthetic/.moving-shapes-3f9a21c07be4.* being made, or left by a killed process: never read
    ```

    `cache` is `$XDG_CACHE_HOME/fastjepa` or `~/.cache/fastjepa` by default. `progress(done, total)` is called in this
    process. At most `workers` processes share the work (default: one per CPU), fewer for a small set, where starting
    them would cost more than it saves; the files do not depend on their number.

    `labels.json` holds `url`, `recipe`, `shapes`, `motions`, the lists `files`, `shape`, `motion` (names and numbers,
    one per video), and `bytes`, the sum of all video sizes.

    Raises OSError, naming the folder, if the cache cannot be written; RuntimeError if a drawing process dies;
    ValueError for `workers` below 1.
    """
    if workers is None:
        workers = os.cpu_count() or 1
    elif workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    key = hashlib.sha256(f"{spec.url()} recipe={RECIPE}".encode()).hexdigest()[:12]
    folder = (default_cache() if cache is None else Path(cache)) / "synthetic" / f"{NAME}-{key}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        if _is_complete(folder, spec):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        temporary.mkdir()
        size = _make_videos(spec, temporary, progress, workers)
        _write_labels(spec, temporary / "labels.json", size)
        _commit(temporary, folder, spec)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot make synthetic videos in {folder.parent} ({error.strerror or error}); "
            "free space there or set XDG_CACHE_HOME to another folder",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a commit there is nothing of that name left
    return folder


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/fastjepa` or `~/.cache/fastjepa`. Errors: OSError where there is no home folder."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if root.is_absolute():  # the XDG specification: a relative path is to be ignored
        return root / "fastjepa"
    try:
        return Path.home() / ".cache" / "fastjepa"
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "no home folder for the cache; set XDG_CACHE_HOME") from error


def _is_complete(folder: Path, spec: MovingShapes) -> bool:
    """The sizes are compared because videos are not synced one by one, and because cache cleaners take single files."""
    try:
        expected = json.loads((folder / "labels.json").read_bytes())["bytes"]
        sizes = [entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith((".mp4", ".png"))]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False
    return len(sizes) == spec.videos and sum(sizes) == expected


def _remove_stale(folder: Path) -> None:
    """Delete what killed processes left of this set. A living one adds a file far more often than once a day."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        try:
            old = time.time() - left.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(left, ignore_errors=True)


def _make_videos(spec: MovingShapes, folder: Path, progress: Callable[[int, int], None] | None, workers: int) -> int:
    """Write every video into `folder`; the sum of their sizes in bytes."""
    worthwhile = 1 + spec.videos * spec.frames * spec.size**2 // PROCESS_PIXELS
    workers = min(workers, spec.videos, worthwhile)
    done = total = 0
    if workers == 1 or multiprocessing.current_process().daemon:  # a daemon may have no children
        for index in range(spec.videos):
            total += _write_videos(spec, folder, range(index, index + 1))
            if progress is not None:
                progress(index + 1, spec.videos)
        return total
    step = max(1, min(spec.videos // (8 * workers), 100))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=end_with_parent)
    try:
        parts = [range(i, min(i + step, spec.videos)) for i in range(0, spec.videos, step)]
        jobs = {pool.submit(_write_videos, spec, folder, part): len(part) for part in parts}
        for job in as_completed(jobs):
            total += job.result()
            done += jobs[job]
            if progress is not None:
                progress(done, spec.videos)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process drawing synthetic videos died: out of memory, or the calling script lacks "
            '`if __name__ == "__main__":`, without which only workers=1 works'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return total


def _write_videos(spec: MovingShapes, folder: Path, indices: range) -> int:
    return sum((folder / _name(spec, index)).write_bytes(_encode(spec, index)) for index in indices)


def _write_labels(spec: MovingShapes, path: Path, size: int) -> None:
    shape, motion = zip(*(spec.label(index) for index in range(spec.videos)), strict=True)
    content = {
        "url": spec.url(),
        "recipe": RECIPE,
        "shapes": SHAPES,
        "motions": MOTIONS,
        "bytes": size,
        "files": video_names(spec),
        "shape": shape,
        "motion": motion,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def _commit(temporary: Path, folder: Path, spec: MovingShapes) -> None:
    """Give the finished folder its name, unless another process was faster; its files are the same."""
    aside = temporary.with_name(temporary.name + "-damaged")
    while True:
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        if _is_complete(folder, spec):
            return
        # Damaged after it was made: away under a name that nobody reads. Another process may do the same just now.
        with suppress(FileNotFoundError):
            os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
