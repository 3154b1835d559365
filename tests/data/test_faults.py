"""Real damaged files beside good ones, and a long run: each named once, nothing hangs, nothing grows."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from fastjepa.build import build_dataset, build_decoding, build_masks
from fastjepa.config import Settings
from fastjepa.data.decoders import dali, torchcodec
from fastjepa.data.decoders.choose import choose_decoder
from fastjepa.data.index import update_index
from fastjepa.data.loader import make_loader, running
from fastjepa.data.replaced import ReplacedFiles
from fastjepa.data.source import open_videos

CPU = torch.device("cpu")
# Not videos, whatever way they are read; the others of that folder have frames that can be.
UNREADABLE = {
    "audio_only.mp4": "it has no video stream",
    "random_bytes.mp4": "it is not a video file, or its header is damaged",
    "single_frame.mp4": "it has 1 frame, fewer than one tubelet of 2",
    "text_renamed.mp4": "it is not a video file, or its header is damaged",
    "truncated_header.mp4": "it is not a video file, or its header is damaged",
    "zero_bytes.mp4": "the file is empty",
}
WHY_NOT = {"pyav": lambda: "", "torchcodec": torchcodec.why_not, "dali_cpu": lambda: dali.why_not(CPU)}


@pytest.fixture(params=WHY_NOT)
def name(request):
    if reason := WHY_NOT[request.param]():
        pytest.skip(reason)
    return request.param


def batches_of(path, name, steps, workers=0, crop=32, clips=4):
    """The batches of a run on these videos with this decoder, and what it says."""
    s = Settings.model_validate(
        {
            "data": {"path": str(path), "frames": 4, "stride": 2, "crop": crop, "patch": 8, "decoder": name},
            "optim": {"global_batch": clips},
            "mask": {"sets": [{"num_blocks": 1, "spatial_scale": (0.3, 0.3)}]},
        }
    )
    videos, said = open_videos(str(path), 0), []

    def entries():
        known = {entry.path: entry for entry in update_index(str(path), workers=1, say=said.append).entries}
        return [known[name] for name in videos.paths]

    decoder = choose_decoder(name, CPU, "", entries)
    dataset = build_dataset(s, videos, decoder)
    decoding = build_decoding(s, decoder, dataset, clips, CPU, said.append)
    loader = make_loader(
        dataset, build_masks(s), first_step=0, last_step=steps, global_batch=clips, batch_size=clips, workers=workers,
        pin_memory=False, tokens=2 * (crop // 8) ** 2,
    )  # fmt: skip
    with running(loader) as loaded:
        for batch in decoding(loaded):
            yield batch, said


@pytest.mark.parametrize("workers", [0, 2])
def test_every_bad_clip_is_named_once_and_the_run_goes_on(shared, name, workers, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "videos"
    folder.mkdir()
    good = [shared / "clips" / "tfio_small.mp4", shared / "clips" / "dali_cpu" / "tfio_small.vp9.webm"]
    for path in [*good, *(shared / "clips" / "bad").glob("*.mp4")]:
        (folder / path.name).symlink_to(path)
    replaced = ReplacedFiles(tmp_path / "bad.jsonl", 20, 1.0)
    named, count = [], 0
    for batch, _ in batches_of(folder, name, steps=12, workers=workers):
        named += replaced.report(batch.bad)
        count += len(batch.clips)
        assert batch.clips.dtype == torch.uint8
        assert batch.clips.shape[1:] == (3, 4, 32, 32)
    assert count == 48
    assert {Path(path).name: reason for path, reason in named} == UNREADABLE
    assert len(named) == len(UNREADABLE)


def test_two_thousand_clips_take_no_more_memory_than_two_hundred(film, name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(6):
        kind = {"codec": "mjpeg", "pixels": "yuvj420p"} if number % 2 else {}
        film.video(folder / f"{number}.mkv", frames=12 + number, **kind)
    (folder / "text.mkv").write_text("hello " * 99)
    film.spoil(folder / "5.mkv", [3, 4])
    used = []
    for number, (batch, _) in enumerate(batches_of(folder, name, steps=250, clips=8, crop=16)):
        assert torch.isfinite(batch.clips.float()).all()
        if number in (25, 249):
            used.append(_resident())
    assert number == 249
    assert used[1] - used[0] < 40e6, "a clip of these has 12 kB, a decoded video 0.2 MB"


def _resident() -> float:
    """Bytes of this process in memory, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_frames_of_a_batch_are_not_those_of_another(film, name, tmp_path, monkeypatch):
    """Each video has a brightness of its own: a clip that got the frames of another one shows it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(6):
        images = [np.full((48, 64, 3), 20 + 40 * number, np.uint8)] * 12
        film.write(tmp_path / f"{number}.mkv", images, codec="mjpeg", pixels="yuvj420p")
    s_paths = sorted(str(path) for path in tmp_path.glob("*.mkv"))
    seen = [(batch.slots, batch.clips) for batch, _ in batches_of(tmp_path, name, steps=9)]
    order = build_dataset(Settings(), open_videos(str(tmp_path), 0)).plan.order
    for slots, clips in seen:
        for slot, clip in zip(slots, clips):
            expected = 20 + 40 * s_paths.index(s_paths[order.video(slot)])
            assert abs(clip.float().mean().item() - expected) < 6
