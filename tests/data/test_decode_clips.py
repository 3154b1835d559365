import csv
import random
from pathlib import Path

import numpy as np
import pytest

from fastjepa.data.decode import VideoError, probe, read_frames

CLIPS = Path(__file__).resolve().parents[3] / "shared" / "clips"
GOOD = sorted(p for folder in (CLIPS, CLIPS / "dali_cpu") for p in folder.glob("*.*") if p.suffix != ".csv")
GOOD = [p for p in GOOD if "audio_only" not in p.name] or [CLIPS / "none"]
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="the shared clips are absent")
NOT_VIDEO = "it is not a video file, or its header is damaged"


@needs_clips
@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.name)
def test_random_reads_of_a_real_clip_equal_its_sequential_decode(path, capfd, film):
    info, rng = probe(path), random.Random(path.name)
    heavy = info.width * info.height > 500_000
    reads = [rng.choices(range(info.frames), k=4) for _ in range(2 if heavy else 5)]
    reads.append([0, info.frames - 1, info.frames // 2, info.frames - 1])
    truth, count = film.in_order(path, {i for read in reads for i in read})
    assert info.frames == count
    for read in reads:
        images = read_frames(info, read)
        assert images.shape == (4, info.height, info.width, 3)
        for image, number in zip(images, read):
            assert np.array_equal(image, truth[number]), (read, number)
    assert capfd.readouterr() == ("", "")


@needs_clips
def test_counts_of_the_real_clips_agree_with_an_independent_count():
    with open(CLIPS / "manifest.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    for path in GOOD:
        row = rows.get(path.name)
        if row and row["frames"] and row["video_streams"] == "1":
            assert probe(path).frames == int(row["frames"]), path.name
    nasa = probe(CLIPS / "torchcodec_nasa_13013.mp4")
    assert (nasa.frames, nasa.width, nasa.height) == (390, 480, 270)  # the second stream is the better one


@needs_clips
@pytest.mark.parametrize(("degrees", "size"), [(0, (568, 320)), (90, (320, 568)), (270, (320, 568))])
def test_phone_clips_are_turned_upright(degrees, size):
    info = probe(CLIPS / f"decord_rot{degrees}.mov")
    assert (info.rotation, info.width, info.height) == (degrees, *size)
    assert read_frames(info, [1]).shape == (1, info.height, info.width, 3)


@needs_clips
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("audio_only.mp4", "it has no video stream"),
        ("random_bytes.mp4", NOT_VIDEO),
        ("text_renamed.mp4", NOT_VIDEO),
        ("truncated_header.mp4", NOT_VIDEO),
        ("zero_bytes.mp4", "the file is empty"),
    ],
)
def test_bad_clips_are_refused(name, sentence):
    with pytest.raises(VideoError) as caught:
        probe(CLIPS / "bad" / name)
    assert str(caught.value) == sentence


@needs_clips
@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("flipped_bits_middle.mp4", 280),
        ("single_frame.mp4", 1),
        ("truncated_faststart_half.mp4", 139),
        ("wrong_ext_mkv_as.mp4", 125),
    ],
)
def test_damaged_clips_stay_usable(name, frames, capfd):
    info = probe(CLIPS / "bad" / name)
    assert info.frames == frames
    start = max(0, frames // 2 - 32)
    images = read_frames(info, [min(start + 4 * k, frames - 1) for k in range(16)])
    assert images.shape == (16, info.height, info.width, 3)
    assert images.std() > 10
    assert capfd.readouterr() == ("", "")
