"""Whole runs of several processes through their launchers: the run of one process, once, in one folder."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastjepa.exits import Exit
from tests.conftest import ROOT
from tests.processes import free_port

FSDP2 = ("runtime.parallel=fsdp2",)
APART = "another process of this run has ended; its own line says why"
# One clip in a forward pass, whatever the number of processes: it divides a step of four by all of them.
ONE_BY_ONE = "data.batch_size=1"
MARKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in MARKS} | {"OMP_NUM_THREADS": "1"} | more


class Run:
    """A run by torchrun in a folder of its own; `wait` for its end, `rows` of its metrics."""

    def __init__(self, recipe: Path, folder: Path, processes: int, *overrides: str) -> None:
        self.folder = folder
        arguments = ["-m", "fastjepa.train", str(recipe), f"log.folder={folder}", ONE_BY_ONE, *overrides]
        launcher = [
            "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1",
            "--master-port", str(free_port()),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else []), *arguments], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(),
        )  # fmt: skip

    def wait(self) -> str:
        """What all processes have said."""
        return self.process.communicate(timeout=300)[0]

    @property
    def path(self) -> Path:
        (folder,) = self.folder.glob("tiny-*")
        return folder

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        """Of all steps, each there once."""
        found = self.rows()
        assert [row["step"] for row in found] == list(range(1, len(found) + 1))
        return [row["loss"] for row in found]

    def until_rows(self, count: int) -> None:
        """Wait for so many logged steps."""
        end = time.monotonic() + 200
        while time.monotonic() < end:
            files = list(self.folder.glob("tiny-*/metrics.jsonl"))
            if files and files[0].read_bytes().count(b"\n") >= count:
                return
            assert self.process.poll() is None, self.wait()
            time.sleep(0.01)
        raise AssertionError("the run did not log in time")

    def children(self) -> dict[int, int]:
        """Process number of each rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = dict(one.partition(b"=")[::2] for one in path.read_bytes().split(b"\0"))
                mine = path.parent.joinpath("stat").read_text().rpartition(")")[2].split()[1] == str(self.process.pid)
            except OSError:
                continue
            if mine and b"RANK" in variables:
                found[int(variables[b"RANK"])] = int(path.parent.name)
        return found


@pytest.fixture
def started(recipe, tmp_path):
    """Start a run by torchrun, in the folder of this name."""
    begun = []

    def go(folder, processes, *overrides):
        begun.append(Run(recipe, tmp_path / folder, processes, *overrides))
        return begun[-1]

    yield go
    for run in begun:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


@pytest.mark.parametrize("overrides", [(), (*FSDP2, "data.workers=2")], ids=["ddp", "fsdp2"])
def test_two_processes_are_one_run(run, started, overrides):
    code, alone = run(folder="alone")
    assert code == Exit.DONE
    two = started("two", 2, *overrides)
    said = two.wait()
    assert two.process.returncode == Exit.DONE, said
    kind = "FSDP2, a part of each weight in each" if overrides else "DDP, all weights in each"
    assert said.count(f"processes  2 by torchrun over gloo: {kind}") == 1
    for line in ("run        ", "data       ", "decoder    ", "device     ", "done       10 steps"):
        assert len(re.findall(f"^{line}", said, re.MULTILINE)) == 1, said
    expected = [json.loads(line)["loss"] for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert two.losses() == pytest.approx(expected, rel=1e-5)
    assert json.loads((two.path / "status.json").read_text())["state"] == "done"


def test_a_wrong_setting_is_one_sentence_of_all(started, tmp_path):
    unreadable, uneven = (started("wrong", 2, wrong) for wrong in ("data.path=/nowhere/at/all", "optim.global_batch=3"))
    said = uneven.wait()
    assert said.count("optim.global_batch: expected a multiple of") == 1, said
    assert said.startswith("optim.global_batch: expected"), "before torchrun's own words, and nothing else"
    assert set(re.findall(r"exitcode +: (\S+)", said)) == {"2"}, said
    said = unreadable.wait()
    assert said.count("/nowhere/at/all") == 1, said
    assert not list((tmp_path / "wrong").glob("tiny-*"))


def test_slurm_starts_the_same_run(recipe, tmp_path, run):
    """srun sets these variables, and more that do not matter, for each of its tasks."""
    folder, stop = tmp_path / "slurm", "runtime.stop_at=4"
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "fastjepa.train", str(recipe), f"log.folder={folder}", ONE_BY_ONE, stop],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env=environment(
                SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_STEP_NUM_TASKS="2", SLURM_JOB_ID="4711",
                SLURM_STEP_NODELIST="localhost", MASTER_PORT=str(port),
            ),
        )
        for port in [free_port()] for rank in range(2)
    ]  # fmt: skip
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [Exit.DONE, Exit.DONE], said
    assert "processes  2 by srun over gloo: DDP" in said[0]
    assert said[1] == "", "one of them speaks"
    (made,) = folder.glob("tiny-*")
    _, alone = run("runtime.stop_at=4", folder="alone")
    losses = [
        [json.loads(line)["loss"] for line in (one / "metrics.jsonl").read_text().splitlines()] for one in (made, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("overrides", [(), FSDP2], ids=["ddp", "fsdp2"])
def test_a_signal_to_torchrun_saves_in_all_and_a_resume_is_bitwise(started, overrides):
    whole = started("whole", 2, *overrides)
    assert "done" in whole.wait()
    parts = started("parts", 2, *overrides, "checkpoint.every=1000")
    parts.until_rows(3)
    parts.process.send_signal(signal.SIGTERM)
    said = parts.wait()
    assert len(re.findall("saved at step", said)) == 1, said
    assert json.loads((parts.path / "status.json").read_text())["state"] == "stopped"
    again = started("parts", 2, *overrides)
    assert "resumed    from" in again.wait()
    assert again.losses() == whole.losses()


@pytest.mark.long
@pytest.mark.parametrize("overrides", [(), FSDP2], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_one_process_ends_all_and_a_resume_is_bitwise(started, overrides, rank):
    whole = started("whole", 2, *overrides)
    assert "done" in whole.wait()
    parts = started("parts", 2, *overrides)
    parts.until_rows(5)
    os.kill(parts.children()[rank], signal.SIGKILL)
    said = parts.wait()
    assert parts.process.returncode != 0
    assert "GLHF" not in said, "gloo's own words are in train.log"
    again = started("parts", 2, *overrides)
    assert "resumed    from" in again.wait()
    assert again.losses() == whole.losses()


@pytest.mark.long
@pytest.mark.parametrize("kinds", [("", "ddp"), ("ddp", "fsdp2"), ("fsdp2", ""), ("fsdp2", "ddp")], ids=str)
def test_a_run_goes_on_with_other_processes(started, run, kinds):
    """1 to 4, 4 to 2, 2 to 1: the same clips in the same order, the same losses to rounding."""
    numbers = {"": 1, "ddp": 4, "fsdp2": 2}
    _, alone = run(folder="alone")
    expected = [json.loads(line)["loss"] for line in (alone / "metrics.jsonl").read_text().splitlines()]
    for kind, stop in zip(kinds, (4, 10)):
        ways = (f"runtime.parallel={kind}",) if kind else ()
        part = started("parts", numbers[kind], *ways, f"runtime.stop_at={stop}")
        said = part.wait()
        assert part.process.returncode == Exit.DONE, said
    assert part.losses() == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("overrides", [(), FSDP2], ids=["ddp", "fsdp2"])
def test_a_probe_of_several_processes_finds_what_one_finds(started, run, overrides):
    _, alone = run("eval.probe=linear", "runtime.stop_at=4", folder="alone")
    two = started("two", 2, "eval.probe=linear", "runtime.stop_at=4", *overrides)
    said = two.wait()
    assert two.process.returncode == Exit.DONE, said
    found, wanted = (
        json.loads((path / "probe" / "step-0000004.json").read_text())["results"] for path in (two.path, alone)
    )
    assert [one["task"] for one in found] == [one["task"] for one in wanted]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_cool_down_of_two_processes_begins_as_that_of_one(run, started, kind):
    """With the optimizer of a run of one process, and a mask token that the recipe never trains."""
    shared = ("compat.mask_token_by_length=true", "model.positions=rope_v2", "optim.decay=constant")
    _, first = run(*shared, "runtime.stop_at=3", folder="first")
    second = (
        *shared, f"init.from={first}", "init.optimizer=true", "optim.decay=linear", "optim.warmup_steps=0",
        "data.crop=48", "runtime.stop_at=4",
    )  # fmt: skip
    code, alone = run(*second, ONE_BY_ONE, folder="alone")
    assert code == Exit.DONE
    two = started("two", 2, *second, f"runtime.parallel={kind}")
    said = two.wait()
    assert two.process.returncode == Exit.DONE, said
    assert said.count("optimizer  moments and step counts are those of") == 1
    expected = [json.loads(line)["loss"] for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert len(expected) == 4
    assert two.losses() == pytest.approx(expected, rel=1e-5)
