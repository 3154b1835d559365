"""Runs of the real program, started from a fork server: how to begin, watch, hurt and compare them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fastjepa.exits import Exit

ROOT = Path(__file__).parents[2]
# A safety net against a run that never ends, for the slowest machine: nothing is measured by it.
PATIENCE = 240
Rows = list[dict]
# What an unbroken run and a resumed one may differ in: it is time, not training.
TIMES = ("clips_per_s", "data_wait", "memory_gb", "mfu")

RECIPE = """
model: {name: vit_nano, predictor_depth: 1, predictor_dim: 16, init_std: 0.04}
mask:
  sets:
    - {num_blocks: 3, spatial_scale: [0.3, 0.3], temporal_scale: [0.5, 0.5]}
    - {num_blocks: 2, spatial_scale: [0.6, 0.6], temporal_scale: [0.5, 0.5]}
  truncation: random
  group: 4
data:
  path: synthetic://moving-shapes?videos=48&size=48&frames=8
  frames: 4
  stride: 1
  crop: 32
  patch: 8
  batch_size: 4
  workers: 0
optim:
  steps: 12
  warmup_steps: 2
  global_batch: 4
  lr: 1e-3
  clip_grad: 10.0
  dtype: float32
runtime: {threads: 1, device: cpu}
log: {every: 1, images: false}
checkpoint: {every: 2, keep: 2}
eval: {probe: none}
"""


class Server:
    """The fork server (see forkserver.py). One request at a time."""

    def __init__(self, cache: Path) -> None:
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment["OMP_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.forkserver"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **request: object) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the fork server has died"
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=PATIENCE)


class Child:
    """One run of the program. It is over after `wait`."""

    def __init__(self, server: Server, pid: int, output: Path) -> None:
        self.server, self.pid, self.output = server, pid, output
        self.code: int | None = None

    def poll(self, seconds: float = 0.0) -> int | None:
        if self.code is None:
            self.code = self.server.ask(wait=self.pid, seconds=seconds)["code"]
        return self.code

    def wait(self) -> int:
        """The exit code, or minus the number of the signal that killed it."""
        if self.poll(PATIENCE) is None:
            self.end()
            raise AssertionError(f"the run did not end in {PATIENCE} s:\n{self.said()}")
        assert self.code is not None
        return self.code

    def send(self, number: int, group: bool = False) -> None:
        """A signal, to its loader processes too where `group`."""
        if self.poll() is None:
            (os.killpg if group else os.kill)(self.pid, number)

    def end(self) -> None:
        """Nothing of it is left after this."""
        self.send(signal.SIGKILL, group=True)
        self.poll(PATIENCE)

    @property
    def out(self) -> str:
        return self._printed("out")

    @property
    def err(self) -> str:
        return self._printed("err")

    def _printed(self, where: str) -> str:
        path = self.output.with_name(f"{self.output.name}.{where}")
        return path.read_text() if path.exists() else ""

    def said(self) -> str:
        return self.out + self.err


@dataclass
class Lab:
    """A folder in which one test runs the program. Runs are called by the name of their log folder."""

    server: Server
    folder: Path
    unbroken: dict[tuple[str, ...], Rows]

    def __post_init__(self) -> None:
        self.children: list[Child] = []
        self.recipe = self.folder / "tiny.yaml"
        self.recipe.write_text(RECIPE)

    def start(self, name: str, *overrides: str, sabotage: list | None = None) -> Child:
        """Begin a run, or go on with it."""
        return self.command(str(self.recipe), f"log.folder={self.folder / name}", *overrides, sabotage=sabotage)

    def command(self, *arguments: str, sabotage: list | None = None) -> Child:
        """The program with exactly these arguments."""
        output = self.folder / f"child-{len(self.children)}"
        pid = self.server.ask(start=arguments, output=str(output), sabotage=sabotage or [])["pid"]
        self.children.append(Child(self.server, pid, output))
        return self.children[-1]

    def run(self, name: str, *overrides: str, code: int = Exit.DONE, sabotage: list | None = None) -> Child:
        """A run, waited for; it must end with this code."""
        child = self.start(name, *overrides, sabotage=sabotage)
        assert child.wait() == code, child.said()
        # Loader processes whose run is killed may complain of it.
        assert code < 0 or "Traceback" not in child.said()
        return child

    def path(self, name: str) -> Path:
        """The folder of a run: there is exactly one."""
        (found,) = (self.folder / name).glob("tiny-??????")
        return found

    def status(self, name: str) -> dict:
        return json.loads((self.path(name) / "status.json").read_text())

    def rows(self, name: str) -> Rows:
        """What metrics.jsonl says at this moment; a last line that is only half written is left out."""
        found = list((self.folder / name).glob("tiny-??????/metrics.jsonl"))
        lines = found[0].read_text().splitlines(keepends=True) if found else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for(self, child: Child, name: str, step: int) -> None:
        """Until the row of this step is logged, or the run is over."""
        end = time.monotonic() + PATIENCE
        while not any(row["step"] >= step for row in self.rows(name)[-1:]) and child.poll() is None:
            assert time.monotonic() < end, f"no row of step {step} in {PATIENCE} s:\n{child.said()}"
            time.sleep(0.002)

    def wait_for_file(self, child: Child, path: Path) -> None:
        """Until this file exists; the run must not end before."""
        end = time.monotonic() + PATIENCE
        while not path.exists():
            assert child.poll() is None, child.said()
            assert time.monotonic() < end, f"no {path} in {PATIENCE} s:\n{child.said()}"
            time.sleep(0.002)

    def whole(self, *overrides: str) -> list[tuple]:
        """What a run with these settings gives when nothing befalls it."""
        if overrides not in self.unbroken:
            name = f"whole-{len(self.unbroken)}"
            self.run(name, *overrides)
            self.unbroken[overrides] = self.rows(name)
        return exact(self.unbroken[overrides])

    def close(self) -> None:
        for child in self.children:
            child.end()


def exact(rows: Rows) -> list[tuple]:
    """All that training has to do with, a tuple a row, floats as hexadecimal: equal only where every bit is."""
    return [
        tuple((k, v.hex() if isinstance(v, float) else v) for k, v in sorted(row.items()) if k not in TIMES)
        for row in rows
    ]


def steps(rows: Rows) -> list[int]:
    return [row["step"] for row in rows]


def assert_none_lost(rows: Rows, want: list[tuple]) -> None:
    """Each step once, in order, and every figure of training equal to the last bit."""
    assert steps(rows) == list(range(1, len(want) + 1))
    assert exact(rows) == want
