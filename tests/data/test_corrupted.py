"""Random damage to good videos: each gives every frame that is asked of it, or is reported; none is silently short."""

import random
from contextlib import suppress

import av
import numpy as np
import pytest

from fastjepa.data.crashes import Crashes
from fastjepa.data.dataset import ClipDataset, Reader
from fastjepa.data.decode import VideoError, probe, read_frames
from fastjepa.data.guard import Guard
from fastjepa.data.loader import make_loader, running
from fastjepa.data.replaced import ReplacedFiles
from fastjepa.data.sampling import ClipPlan
from fastjepa.masks import MaskCollator

# One of every way in which videos are read: by times or by turn, with and without an index, several codecs.
SOURCES = ("b_frames.mp4", "faststart.mov", "h264.mkv", "vp9.webm", "vp8.webm", "mpeg4.avi", "intra.mkv", "stream.ts")
DAMAGES = 25


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One of the things that disks, networks and people do to files."""
    data, size = bytearray(content), len(content)
    kind = rng.choice(("bits", "zeros", "noise", "cut", "hole", "repeat", "head", "tail"))
    start = rng.randrange(size)
    length = min(rng.choice((1, 16, 512, 4096, size // 4)), size - start)
    if kind == "bits":
        for place in rng.choices(range(size), k=rng.choice((1, 8, 64))):
            data[place] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[start : start + length] = bytes(length)
    elif kind == "noise":
        data[start : start + length] = rng.randbytes(length)
    elif kind == "cut":
        del data[start:]
    elif kind == "hole":
        del data[start : start + length]
    elif kind == "repeat":
        data[start:start] = data[start : start + length]
    elif kind == "head":
        for place in rng.choices(range(min(size, 256)), k=4):
            data[place] = rng.randrange(256)
    else:
        for place in rng.choices(range(max(0, size - 512), size), k=8):
            data[place] = rng.randrange(256)
    return bytes(data)


def outcome(path, most=1000):
    """(number of frames, the first ones of them), or the reason why not."""
    try:
        info = probe(path)
    except VideoError as error:
        return str(error)
    assert info.frames >= 1
    wanted = np.arange(min(info.frames, most))
    try:
        got = read_frames(info, wanted)
        clip = read_frames(info, wanted[-1:].repeat(3))
    except VideoError as error:
        return str(error)
    assert got.shape == (len(wanted), info.height, info.width, 3)
    assert clip.shape == (3, info.height, info.width, 3)
    return info.frames, got


@pytest.fixture(scope="module")
def spoiled(made, tmp_path_factory):
    """200 files: kind -> paths."""
    folder, paths = tmp_path_factory.mktemp("spoiled"), {}
    for kind in SOURCES:
        content, rng = made[kind].read_bytes(), random.Random(f"damage {kind}")
        paths[kind] = [folder / f"{number}-{kind}" for number in range(DAMAGES)]
        for path in paths[kind]:
            path.write_bytes(damaged(content, rng))
    return paths


@pytest.mark.parametrize("kind", SOURCES)
def test_damaged_videos_give_every_frame_or_a_reason(spoiled, kind, film, capfd):
    read = 0
    for path in spoiled[kind]:
        found = outcome(path)
        if isinstance(found, str):
            assert found
            assert "\n" not in found
            continue
        read += 1
        # Where damage is concealed or skipped a frame shows another picture; but of those that a player would show
        # none may be missing.
        lost = delivered(path, film) - {film.number_of(image) for image in found[1]}
        assert not lost, f"{path}: decoding it from the start shows the pictures {sorted(lost)} too"
    assert read >= 5, "damage that no file survives tells nothing"
    assert capfd.readouterr() == ("", "")


def delivered(path, film):
    """The numbers of the pictures that decoding from the start delivers until an error ends it."""
    numbers = set()
    with suppress(av.error.FFmpegError), av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            numbers.add(film.number_of(frame.to_ndarray(format="rgb24")))
    return numbers


def test_a_loader_reports_each_of_them_or_delivers_its_clips(spoiled, made, tmp_path):
    paths = [str(path) for kind in SOURCES for path in spoiled[kind]] + [str(made["h264.mkv"])] * 8
    results = [outcome(path) for path in paths]
    want = {path for path, found in zip(paths, results) if isinstance(found, str) or found[0] < 2}
    assert 20 < len(want) < 180
    plan = ClipPlan(0, np.arange(len(paths)), 4, 2, (0.3, 1.0), (0.75, 1.35), True)
    dataset, replaced = ClipDataset(Reader(paths, 2), plan, 16), ReplacedFiles(tmp_path / "bad.jsonl", 208, 1.0)
    sets = [{"num_blocks": 2, "spatial_scale": (0.3, 0.3), "temporal_scale": (0.5, 0.5)}]
    loader = make_loader(
        dataset, MaskCollator(sets, 16, 4, 4, 2, seed=0), first_step=0, last_step=26, global_batch=8, batch_size=8,
        workers=2, pin_memory=False, tokens=32, guard=Guard(Crashes(paths), 60.0, pytest.fail),
    )  # fmt: skip
    named, slots = [], []
    with running(loader) as batches:
        for batch in batches:
            named += [path for path, _ in replaced.report(batch.bad)]
            slots += batch.slots
            assert batch.clips.shape == (8, 3, 4, 16, 16)
    assert slots == list(range(208))
    assert sorted(named) == sorted(want)


def test_damaged_real_clips_give_every_frame_or_a_reason(shared, tmp_path, capfd):
    clips = ("tfio_small.mp4", "evadb_mnist_28x28.mp4", "moviepy_bbb_432_433.webm", "paddle_example_320x240.avi")
    rng, read = random.Random("damage"), 0
    for name in clips:
        content = (shared / "clips" / name).read_bytes()
        for number in range(6):
            path = tmp_path / f"{number}-{name}"
            path.write_bytes(damaged(content, rng))
            read += not isinstance(outcome(path, most=24), str)
    assert read >= 4
    assert capfd.readouterr() == ("", "")
