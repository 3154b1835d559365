"""A process in which nothing moves ends and says where it stood; one that moves, or has ended, is left alone."""

import faulthandler
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastjepa import watcher
from fastjepa.watchdog import Watchdog

ROOT = Path(__file__).parents[1]
HEAD = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from fastjepa.watchdog import Watchdog
FOLDER = Path(sys.argv[1])
def watched(seconds=0.5, rank=2):
    watchdog = Watchdog(seconds / 60, rank, FOLDER)
    watchdog.__enter__()
    print(watchdog._watcher.pid, flush=True)
    return watchdog
"""
HANGS = {
    "in C, with the interpreter lock held": "ctypes.PyDLL(None).sleep(60)",
    "asleep": "time.sleep(60)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "in a lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "in a thread that the main one waits for": "t = threading.Thread(target=asleep); t.start(); t.join()",
}


@pytest.fixture
def launch(tmp_path):
    """Start a program that has `watched`; its folder is tmp_path."""
    started = []

    def go(code, **options):
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD + code, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            **options,
        )
        started.append(process)
        return process

    yield go
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_the_end_of(pid: int) -> None:
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline, "the watcher outlives the process that it watches"
        time.sleep(0.02)


@pytest.mark.parametrize("how", HANGS)
def test_a_process_in_which_nothing_moves_says_where_it_stands_and_ends(launch, tmp_path, how):
    (tmp_path / "status.json").write_text('{"state": "training", "step": 1230, "steps": 9000, "loss": 0.5}')
    process = launch(
        f"""
def asleep(): time.sleep(60)
def where_it_hangs(): {HANGS[how]}
watchdog = watched()
watchdog.stage("computing", 1233)
watchdog.stage("waiting for data", 1234)
where_it_hangs()
time.sleep(60)
"""
    )
    out, error = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGUSR2
    assert "rank 2: nothing has moved for 0.5 s in stage 'waiting for data' at step 1234" in error
    assert error.count("\n") == 1
    assert ("it was stopped by a signal" in error) == (how == "stopped")
    stacks = tmp_path / "watchdog-rank2.txt"
    assert str(stacks) in error
    (line,) = (tmp_path / "train.log").read_text().splitlines()
    assert line.split("  ", 1)[1] == error.strip()
    heading, *frames = stacks.read_text().splitlines()
    assert "in stage 'waiting for data' at step 1234" in heading
    assert any("where_it_hangs" in frame for frame in frames)
    assert any(" in asleep" in frame for frame in frames) == ("thread" in how)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("failed", 1234, 9000)
    assert status["reason"] in error
    assert "loss" not in status
    assert abs(status["heartbeat"] - time.time()) < 60
    wait_for_the_end_of(int(out))
    assert {path.name for path in tmp_path.iterdir()} == {"status.json", "train.log", stacks.name}


def test_a_process_that_does_not_answer_is_killed(launch, tmp_path):
    process = launch("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]); watched(); time.sleep(60)")
    _, error = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    first, second = error.splitlines()
    assert "in stage 'starting'" in first
    assert "at step" not in first
    assert second == "rank 2: it gave no Python stacks for 3 s and was killed"
    assert [line.split("  ", 1)[1] for line in (tmp_path / "train.log").read_text().splitlines()] == [first, second]


def test_what_cannot_be_written_saves_no_life(launch, tmp_path):
    """The reader of stderr hangs, its pipe is full, and the disk of the run folder too."""
    for name in ("train.log", "watchdog-rank2.txt"):
        (tmp_path / name).symlink_to("/dev/full")
    process = launch(
        """
os.set_blocking(2, False)
try:
    while True: os.write(2, b"x" * 4096)
except BlockingIOError: pass
os.set_blocking(2, True)
from fastjepa import watcher
if os.fork():
    time.sleep(60)  # the process that hangs: the other one watches it
parent = os.getppid()
watcher.SECONDS_TO_WRITE = 0.3
watcher.end(parent, 2, FOLDER, FOLDER / "watchdog-rank2.txt", bytes(watcher.RECORD.size), 1.0)
os._exit(0)
"""
    )
    assert process.wait(timeout=20) == -signal.SIGUSR2


def test_a_process_that_moves_lives(launch, tmp_path):
    process = launch(
        """
watchdog = watched(seconds=1)
for step in range(60):
    watchdog.stage("computing", 7)
    time.sleep(0.05)
print("lives")
watchdog.__exit__(None, None, None)
"""
    )
    out, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")
    assert out.endswith("lives\n")
    assert list(tmp_path.iterdir()) == []


def test_a_stage_may_have_more_patience_for_itself_alone(launch):
    process = launch(
        """
watchdog = watched()
watchdog.stage("first step", 1, patience=6.0)
time.sleep(1.5)
print("patient", flush=True)
watchdog.stage("second step")
time.sleep(60)
"""
    )
    out, error = process.communicate(timeout=30)
    assert "patient" in out
    assert "nothing has moved for 0.5 s in stage 'second step' at step 1" in error


def test_a_forked_process_gives_no_sign_of_life(launch):
    process = launch(
        """
watchdog = watched()
watchdog.stage("waiting for data", 5)
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        watchdog.stage("in a worker", 9)
        time.sleep(0.02)
    os._exit(0)
time.sleep(60)
"""
    )
    assert process.wait(timeout=30) == -signal.SIGUSR2
    assert "'waiting for data' at step 5" in process.stderr.readline()


@pytest.mark.parametrize(
    "ending", ["watchdog.__exit__(None, None, None)", "pass", "os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"]
)
@pytest.mark.parametrize("worker", [False, True])
def test_the_watcher_goes_with_the_process_however_it_ends(launch, ending, worker):
    """Also where a forked worker lives on, which has all open files of its parent."""
    fork = "if not os.fork(): os.setsid(); os.close(1); os.close(2); time.sleep(2); os._exit(0)" if worker else ""
    process = launch(f"watchdog = watched(seconds=60)\n{fork}\n{ending}")
    out, error = process.communicate(timeout=30)
    wait_for_the_end_of(int(out))
    assert error == ""


def test_signals_to_the_whole_job_leave_the_watcher_alive(launch):
    process = launch(
        """
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)  # what is ignored would be so in the watcher too
watchdog = watched(seconds=2)
time.sleep(0.7)  # until the watcher runs
print("ready", flush=True)
while True: time.sleep(60)
""",
        start_new_session=True,
    )
    pid = int(process.stdout.readline())
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.killpg(process.pid, number)  # Ctrl-C of the terminal
        os.kill(pid, number)  # scancel
    assert alive(pid)
    assert os.getsid(pid) != os.getsid(process.pid)
    assert process.wait(timeout=30) == -signal.SIGUSR2


def test_time_in_which_the_whole_job_is_suspended_does_not_count(launch):
    process = launch(
        """
watchdog = watched(seconds=2)
for _ in range(6):
    watchdog.stage("computing", 7)
    time.sleep(0.6)
"""
    )
    both = (int(process.stdout.readline()), process.pid)
    time.sleep(0.7)
    for pid in both:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    for pid in both:  # the watcher comes back first
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.3)
    assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("minutes", [None, 0])
def test_without_minutes_nothing_is_started(tmp_path, monkeypatch, minutes):
    def refuse(*arguments, **more):
        raise AssertionError("nothing is to be started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(faulthandler, "register", refuse)
    with Watchdog(minutes, 0, tmp_path) as watchdog:
        watchdog.stage("computing", 1)
    assert list(tmp_path.iterdir()) == []


def test_one_run_after_another_in_a_process_leaves_it_as_it_was(tmp_path):
    for _ in range(2):
        with Watchdog(1, 0, tmp_path) as watchdog:
            pid = watchdog._watcher.pid
            watchdog.stage("computing", 1)
            assert alive(pid)
        assert not alive(pid)
        assert not faulthandler.unregister(signal.SIGUSR2)
        watchdog.stage("after the end", 2)
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    (tmp_path / "watchdog-rank0.txt").write_text("stacks of a hang before\n")
    with Watchdog(1, 0, tmp_path):
        pass
    assert (tmp_path / "watchdog-rank0.txt").read_text() == "stacks of a hang before\n"


def test_a_heartbeat_is_a_write_into_memory(tmp_path):
    with Watchdog(5, 0, tmp_path) as watchdog:
        for number, (name, step, patience) in enumerate(
            [("computing", 3, 1.0), ("saving", None, 4.0), ("a long name " * 20, 4, 1.0)], start=2
        ):
            watchdog.stage(name, step, patience)
            beats, at, seconds, stored = watcher.RECORD.unpack(watchdog._memory[:])
            assert (beats, at, seconds) == (number, step or 3, 300 * patience)
            assert name.startswith(stored.rstrip(b"\0").decode())


def test_the_watcher_needs_the_standard_library_only():
    """It is started without site packages, where nothing of ours can be found."""
    command = [sys.executable, "-I", "-S", watcher.__file__, "0", "0", "0", "a", "b"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert "mmap.mmap(shared" in done.stderr  # so far it came: there is no memory to look at


def test_a_record_that_is_being_written_ends_nobody(monkeypatch):
    polls = iter([7] * 50)
    monkeypatch.setattr(os, "getppid", lambda: next(polls, 1))
    assert watcher.watch(mmap.mmap(-1, watcher.RECORD.size), 7) is None


def test_a_stage_never_leaves_the_record_empty(tmp_path, monkeypatch):
    """The watcher may look at any moment: between two bytes of a write, too."""
    with Watchdog(1.0, 0, tmp_path) as watchdog:
        seen = []
        memory = watchdog._memory

        class Spy:
            def __setitem__(self, place, content):
                seen.append(watcher.RECORD.unpack(content)[2])
                memory[place] = content

        monkeypatch.setattr(watchdog, "_memory", Spy())
        watchdog.stage("computing", 3)
        monkeypatch.setattr(watchdog, "_memory", memory)
    assert seen == [60.0]
