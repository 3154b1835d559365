"""Loader processes that crash, hang or are killed: the run goes on, and the video that did it is named."""

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fastjepa.data.crashes import Crashes
from fastjepa.data.dataset import ClipDataset, Reader
from fastjepa.data.decode import VideoError, read_frames
from fastjepa.data.guard import Guard, why
from fastjepa.data.loader import SlotBatches, make_loader, running
from fastjepa.data.replaced import TooManyBadFiles
from fastjepa.data.sampling import ClipPlan
from fastjepa.masks import MaskCollator

CROP, FRAMES, SECONDS = 16, 4, 1.0
CULPRIT = 2


def hang():
    ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the interpreter's lock


def crash():
    ctypes.string_at(0)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def abort():
    os.abort()


def leave():
    os._exit(3)


FAULTS = {
    hang: "decoding took more than 1 s",
    crash: "the decoder crashed (SIGSEGV)",
    abort: "the decoder crashed (SIGABRT)",
    be_killed: "the process that decoded it was killed, for want of memory perhaps",
    leave: "the decoder ended its process (exit code 3)",
}


@pytest.fixture(scope="module")
def paths(film, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [str(film.video(folder / f"{n}.mp4", frames=6 + n)) for n in range(5)]


@pytest.fixture(autouse=True)
def _deaths_are_found_soon(monkeypatch):
    """torch looks for dead workers when no batch has come for five seconds."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


def read_but(fault, path, marker=None, slots=None):
    """A decoder that has a fault for one video; with a marker, a file, only where that does not exist yet."""

    def read(info, frames):
        if info.path == path:
            if marker is None:
                fault()
            elif not marker.exists():
                marker.touch()
                fault()
        return read_frames(info, frames)

    return read


def unreadable(path, reason):
    def read(info, frames):
        if info.path == path:
            raise VideoError(reason, path)
        return read_frames(info, frames)

    return read


class Run:
    """Batches of a loader with a guard, and all that was said."""

    def __init__(self, paths, read=read_frames, listed=None, guarded=True, seconds=SECONDS):
        self.said, self.noted = [], []
        plan = ClipPlan(0, np.arange(len(paths)), FRAMES, 2, (0.3, 1.0), (0.75, 1.35), True)
        self.dataset = ClipDataset(Reader(list(paths), 2, read=read), plan, CROP)
        self.crashes = Crashes(paths, listed, self.said.append)
        self.guard = Guard(self.crashes, seconds, self.said.append, self.noted.append) if guarded else None

    def loader(self, first=0, last=6, workers=2, batch_size=4, **more):
        sets = [{"num_blocks": 2, "spatial_scale": (0.3, 0.3), "temporal_scale": (0.5, 0.5)}]
        masks = MaskCollator(sets, CROP, FRAMES, 4, 2, seed=0, truncation="random", group=batch_size)
        return make_loader(
            self.dataset, masks, first_step=first, last_step=last, global_batch=8, batch_size=batch_size,
            workers=workers, pin_memory=False, tokens=32, guard=self.guard, **more,
        )  # fmt: skip

    def __call__(self, **settings):
        with running(self.loader(**settings)) as batches:
            return list(batches)


def assert_same(got, want):
    """Clips, masks, slots and the files that could not be read."""
    assert [batch.slots for batch in got] == [batch.slots for batch in want]
    for one, other in zip(got, want):
        assert torch.equal(one.clips, other.clips), one.slots
        assert all(torch.equal(a, b) for a, b in zip(one.masks_context, other.masks_context)), one.slots
        assert all(torch.equal(a, b) for a, b in zip(one.masks_target, other.masks_target)), one.slots
        assert one.bad == other.bad, one.slots


def open_files():
    """What this process has open, without the memory of batches that a failed test still holds."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return Counter(kind.split(":")[0] for kind in (os.readlink(link) for link in links if link.is_symlink()))


@pytest.fixture
def nothing_left(paths):
    """No process, file or thread that was not there before."""
    Run(paths)(last=1, workers=1)  # what is imported late is there now
    gc.collect()
    before, threads = open_files(), threading.active_count()
    yield
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.05)  # feeders of closed queues
    gc.collect()
    assert multiprocessing.active_children() == []
    assert threading.active_count() == threads
    assert open_files() == before


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_video_that_ends_its_process_is_replaced_like_an_unreadable_one(
    paths, tmp_path, fault, workers, nothing_left
):
    want = Run(paths, unreadable(paths[CULPRIT], FAULTS[fault]), guarded=False)(workers=0)
    run = Run(paths, read_but(fault, paths[CULPRIT]), tmp_path / "crashed.jsonl")
    got = run(workers=workers)
    assert sum(len(batch.slots) for batch in got) == 48
    assert_same(got, want)
    assert {entry for batch in got for entry in batch.bad} == {(paths[CULPRIT], FAULTS[fault])}
    deaths = [f"loader     a loader process ended with {paths[CULPRIT]} in hand: {FAULTS[fault]}" for _ in range(2)]
    deaths[0] += "; it is tried once more"
    assert run.said[:2] == deaths
    (first, *_) = [json.loads(line) for line in (tmp_path / "crashed.jsonl").read_text().splitlines()]
    assert (first["path"], first["reason"]) == (paths[CULPRIT], FAULTS[fault])
    if fault in (hang, crash):
        assert fault.__name__ in run.noted[0], "the stack names the function"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_video_that_does_so_once_is_tried_again_and_not_reported(paths, tmp_path, fault, nothing_left):
    want = Run(paths, guarded=False)(workers=0)
    listed = tmp_path / "crashed.jsonl"
    run = Run(paths, read_but(fault, paths[CULPRIT], tmp_path / "marker"), listed)
    assert_same(run(), want)
    assert run.said == [
        f"loader     a loader process ended with {paths[CULPRIT]} in hand: {FAULTS[fault]}; it is tried once more"
    ]
    assert not listed.exists()


def test_a_replacement_is_in_hand_too_and_several_may_be_guilty(paths, nothing_left):
    first, second = paths[1], paths[3]

    def read(info, frames):
        if info.path in (first, second):
            crash()
        return read_frames(info, frames)

    def refuse(info, frames):
        if info.path in (first, second):
            raise VideoError(FAULTS[crash], info.path)
        return read_frames(info, frames)

    run = Run(paths, read)
    want = Run(paths, refuse, guarded=False)(workers=0)
    assert any(len(batch.bad) > 1 for batch in want)
    assert_same(run(), want)
    assert {paths[video] for video in run.crashes.known} == {first, second}


def test_processes_of_a_world_and_micro_batches_go_on_where_they_were(paths, nothing_left):
    for rank in range(2):
        want = Run(paths, unreadable(paths[CULPRIT], FAULTS[leave]), guarded=False)
        run = Run(paths, read_but(leave, paths[CULPRIT]))
        part = {"rank": rank, "world": 2, "batch_size": 2, "first": 1, "last": 5}
        assert_same(run(**part), want(workers=0, **part))
        assert run.crashes.known


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_passes_over_what_crashed_before(paths, tmp_path, workers, nothing_left):
    listed = tmp_path / "crashed.jsonl"
    whole = Run(paths, read_but(crash, paths[CULPRIT]), listed)()
    again = Run(paths, read_but(crash, paths[CULPRIT]), listed)
    assert_same(again(first=3, workers=workers), whole[6:])
    assert again.said == []


def test_before_the_slot_of_the_crash_its_clips_are_those_of_the_first_run(paths, tmp_path, nothing_left):
    """A video may be decoded for one slot and crash for a later one, as other frames of it are read."""
    order = Run(paths).dataset.plan.order
    slots = [slot for slot in range(48) if order.video(slot) == CULPRIT]
    run = Run(paths, listed=tmp_path / "crashed.jsonl")

    def read(info, frames):
        if run.guard.place is not None and run.guard._hands[run.guard.place].tolist() == [CULPRIT, slots[4]]:
            crash()
        return read_frames(info, frames)

    run.dataset.reader.read_frames = read
    whole = run()
    bad = [slot for batch in whole for slot in batch.slots if batch.bad and order.video(slot) == CULPRIT]
    assert min(bad) >= slots[4] - 3
    assert run.crashes.known[CULPRIT][0] == slots[4]
    assert_same(Run(paths, listed=tmp_path / "crashed.jsonl")(workers=0), whole)


# -- what is not the fault of a video ---------------------------------------------------------------------------------


def test_processes_that_die_with_nothing_in_hand_end_the_run_in_the_end(paths, monkeypatch, nothing_left):
    run = Run(paths)
    began = []

    def enter(place):
        Guard.enter(run.guard, place)
        be_killed()

    watching = run.guard.watching
    monkeypatch.setattr(run.guard, "enter", enter)
    monkeypatch.setattr(run.guard, "watching", lambda workers: began.append(1) or watching(workers))
    with pytest.raises(RuntimeError) as caught:
        run(workers=1)
    assert str(caught.value) == (
        "processes of the loader end again and again before a batch is made: a loader process ended with no video in "
        "hand: the process that decoded it was killed, for want of memory perhaps"
    )
    assert len(began) == 5


def test_where_every_video_crashes_the_loader_gives_up(paths, nothing_left):
    many = [f"{path}" for path in paths for _ in range(3)]
    run = Run(many, lambda info, frames: leave())
    with pytest.raises(RuntimeError, match="again and again before a batch is made"):
        run(workers=2)
    assert len(run.crashes.known) in (11, 12)  # two processes may die of two videos at once


def test_processes_killed_now_and_then_cost_no_video(paths, nothing_left):
    """With few videos it is soon the same one that was in hand."""
    want = Run(paths, guarded=False)(workers=0, last=30)
    run, got = Run(paths, lambda info, frames: time.sleep(0.01) or read_frames(info, frames)), []
    with running(run.loader(last=30)) as batches:
        for number, batch in enumerate(batches):
            got.append(batch)
            if number % 14 == 5:
                for child in multiprocessing.active_children():
                    child.kill()
    assert_same(got, want)
    assert run.crashes.known == {}
    assert len([line for line in run.said if "killed" in line]) >= 4


def test_a_killed_process_convicts_a_video_only_where_it_is_the_same_clip():
    guard = Guard(Crashes(["a.mp4"]), 1.0, lambda text: None)
    with guard.watching(2):
        for handed_out, code, convicted in [(3, -9, False), (8, -9, False), (12, -9, True), (20, -11, True)]:
            guard._hands[1] = 0, 40 + handed_out
            assert guard.blame({1: code}, handed_out)[1] == convicted
            assert guard.crashes.known.keys() == ({0} if handed_out >= 12 else set())


def test_what_a_reader_raises_is_raised_as_without_a_guard(paths, nothing_left):
    def broken(info, frames):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        Run(paths, broken)()
    with pytest.raises(TooManyBadFiles, match="none of the 1 files can be read"):
        Run(["nowhere.mp4"])()


def test_a_slow_video_within_the_limit_is_none_of_our_business(paths, nothing_left):
    run = Run(paths, lambda info, frames: time.sleep(0.1) or read_frames(info, frames), seconds=0.6)
    assert len(run(last=2)) == 4, "the limit is that of one video, not of a batch of four"
    assert run.said == []


def test_a_process_that_waits_has_nothing_in_hand_and_no_limit(paths, nothing_left):
    """A long step or an evaluation keeps the workers waiting."""
    want = Run(paths, guarded=False)(workers=0)
    run = Run(paths, seconds=0.5)
    with running(run.loader(workers=1)) as batches:
        got = [next(batches)]
        time.sleep(1.5)
        (child,) = multiprocessing.active_children()
        assert child.is_alive()
        child.kill()
        got += batches
    assert_same(got, want)
    assert run.said == [
        "loader     a loader process ended with no video in hand: the process that decoded it was killed, for want of "
        "memory perhaps"
    ]


# -- around it --------------------------------------------------------------------------------------------------------


def test_no_death_interrupts_the_training_process(paths, nothing_left):
    """torch would raise from a signal handler, wherever the process is."""
    handler = signal.getsignal(signal.SIGCHLD)
    mine = lambda *_: handler(*_)  # noqa: E731
    signal.signal(signal.SIGCHLD, mine)
    try:
        with running(Run(paths).loader(workers=1)) as batches:
            next(batches)
            (child,) = multiprocessing.active_children()
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            sum(range(1000))  # time for a handler
            assert len(list(batches)) == 11
        assert signal.getsignal(signal.SIGCHLD) is mine, "what was there before is there again"
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_a_countdown_of_the_training_process_stops_no_worker(paths, nothing_left):
    """faulthandler has one countdown, whose lock a fork would inherit."""
    import faulthandler

    faulthandler.dump_traceback_later(600)
    try:
        assert len(Run(paths)(last=1)) == 2
    finally:
        faulthandler.cancel_dump_traceback_later()


def test_a_loader_that_is_left_early_leaves_nothing(paths, tmp_path, monkeypatch, nothing_left):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 1.0)  # its patience with a worker
    with running(Run(paths).loader()) as batches:
        next(batches)
    with pytest.raises(ZeroDivisionError), running(Run(paths).loader()) as batches:
        _ = 1 // 0
    read, delivered = [], tmp_path / "delivered"

    def hang_in_the_second_batch(info, frames):
        read.append(info.path)
        if len(read) > 4:
            while not delivered.exists():  # a process that holds the lock does not hand over its first batch either
                time.sleep(0.01)
            hang()
        return read_frames(info, frames)

    run = Run(paths, hang_in_the_second_batch, seconds=600)
    with running(run.loader(workers=1)) as batches:
        next(batches)
        delivered.touch()
        time.sleep(0.3)
        assert run.guard._hands[0, 1] == 4


def test_batches_can_be_skipped_within_a_step():
    for rank in range(2):
        whole = list(SlotBatches(2, 5, 12, 2, rank, 2))
        for skip in range(10):
            rest = SlotBatches(2, 5, 12, 2, rank, 2, skip)
            assert list(rest) == whole[skip:]
            assert len(rest) == len(whole) - skip


@pytest.mark.parametrize(
    ("code", "timed_out", "reason"),
    [
        (1, True, "decoding took more than 0.5 s"),
        (0, False, "the decoder ended its process (exit code 0)"),
        (-int(signal.SIGBUS), False, "the decoder crashed (SIGBUS; a full /dev/shm does that too)"),
        (-int(signal.SIGILL), False, "the decoder crashed (SIGILL)"),
        (-250, False, "the decoder crashed (signal 250)"),
    ],
)
def test_an_end_is_told_in_words(code, timed_out, reason):
    assert why(code, timed_out, 0.5) == reason


# -- the list ---------------------------------------------------------------------------------------------------------


def test_the_list_of_crashes_survives_strange_names_and_damage(tmp_path):
    said, listed = [], tmp_path / "crashed.jsonl"
    paths = ["/a\nb.mp4", "/\udcff.mp4", "/c.mp4"]
    crashes = Crashes(paths, listed)
    crashes.add(0, 9, "why")
    crashes.add(1, 5, "because")
    crashes.add(0, 7, "why")
    crashes.add(0, 8, "why")
    assert Crashes(paths, listed).known == {0: (7, "why"), 1: (5, "because")}
    with listed.open("a") as out:
        out.write('nonsense\n[]\n{"path": "/gone.mp4", "reason": "", "slot": 1}\n{"path": "/c.m')
    again = Crashes(paths, listed, said.append)
    assert again.known == {0: (7, "why"), 1: (5, "because")}
    assert len(said) == 2
    again.add(2, 1, "x")
    assert Crashes(list(reversed(paths)), listed, said.append).known[0] == (1, "x")
    assert [again.reason(0, slot) for slot in (6, 7, 8)] == [None, "why", "why"]


def test_a_list_of_crashes_that_cannot_be_written_is_said(tmp_path):
    said = []
    crashes = Crashes(["a.mp4"], tmp_path / "gone" / "crashed.jsonl", said.append)
    crashes.add(0, 3, "why")
    assert crashes.reason(0, 3) == "why"
    assert "cannot be written" in said[0]


def test_the_probe_and_the_pictures_never_open_what_crashed(paths):
    run = Run(paths, read_but(crash, paths[CULPRIT]))
    run.crashes.add(CULPRIT, 30, "the decoder crashed (SIGSEGV)")
    run.crashes.keep_from(run.dataset.reader)
    with pytest.raises(VideoError, match=r"^the decoder crashed \(SIGSEGV\)$"):
        run.dataset.reader.read(CULPRIT, np.arange(2))
    assert Path(run.dataset.reader.info(0).path) == Path(paths[0])
