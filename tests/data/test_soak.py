"""Thousands of steps with bad videos among the good ones: nothing grows."""

import ctypes
import gc
import json
import logging
import os

import numpy as np
import pytest

from fastjepa.exits import Exit
from fastjepa.loop import Trainer

STEPS, EVERY = 3000, 50


def resident():
    """Memory of this process in MB, without what is freed already and only kept by the C library."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.long
def test_three_thousand_steps_take_no_more_memory_or_files_than_a_few(run, film, tmp_path, monkeypatch):
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(57):
        film.video(videos / f"good{number}.mp4", frames=6 + number % 5)
    for number in range(3):
        (videos / f"bad{number}.mp4").write_bytes(b"no video")
    memory, files = [], []
    train = Trainer._step

    def measured(self, step, batches, look):
        if step % EVERY == 0:
            memory.append(resident())
            files.append(len(os.listdir("/proc/self/fd")))
        return train(self, step, batches, look)

    monkeypatch.setattr(Trainer, "_step", measured)
    # pytest keeps every record that torch logs of a save, a megabyte of them.
    logging.disable()
    try:
        code, folder = run(
            f"data.path={videos}", "data.workers=2", f"optim.steps={STEPS}", "checkpoint.every=50", "log.every=100"
        )
    finally:
        logging.disable(logging.NOTSET)
    assert code == Exit.DONE
    assert len((folder / "bad_files.jsonl").read_text().splitlines()) == 3
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(100, STEPS + 1, 100))
    # Caches fill in the first third.
    steps, settled = np.arange(len(memory)) * EVERY, len(memory) // 3
    slope = np.polyfit(steps[settled:], memory[settled:], 1)[0] * 1000
    print(f"memory {memory[0]:.1f} -> {memory[-1]:.1f} MB, {slope:+.3f} MB in 1000 steps; files {set(files)}")
    assert slope < 1.0
    # Batches under way are open files too, some more or fewer of them at a time; what stays raises the least number.
    assert min(files[settled:]) <= min(files[1:settled])
