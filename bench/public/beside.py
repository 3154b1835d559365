"""The public code's training step as a contender: a process that takes a turn when it is told to."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.failures import CannotRun
from bench.step.contenders import finite
from bench.step.ways import Batches, Draw
from fastjepa.masks import target_union

BLACK_BOX = Path(__file__).with_name("black_box.py")
WARM_UP = 12  # compiled, lengths of masks differ from step to step until they are taken for dynamic
TRAIN = Path("app", "vjepa", "train.py")


class Size(NamedTuple):
    """A model of the public code, and clips."""

    model: str
    crop: int
    frames: int
    batch: int


class NoCheckout(CannotRun):
    """Nothing names a checkout of the public code."""


def checkout() -> Path:
    """The checkout that JEPA_REPO names. Errors: NoCheckout without it, CannotRun where it names something else."""
    named = os.environ.get("JEPA_REPO", "")
    if not named:
        raise NoCheckout("JEPA_REPO names no checkout of the public code (clone it into peers/, which git ignores)")
    if not (Path(named) / TRAIN).is_file():
        raise CannotRun(f"JEPA_REPO: expected a checkout of the public code with {TRAIN}, given {named!r}")
    return Path(named)


class PublicCode:
    """One variant of the public code, running, with its warm-up behind it. `batches` are its masks for our side."""

    def __init__(
        self, repo: Path, variant: str, size: Size, steps: int, turn: int, device: torch.device, warm_up: int = WARM_UP
    ) -> None:
        """`steps` in turns of `turn`, before each of which one step is not timed. Errors: CannotRun."""
        self.scratch = tempfile.TemporaryDirectory()
        masks, self.said = Path(self.scratch.name, "masks.pt"), Path(self.scratch.name, "stderr.txt")
        rounds = -(-steps // turn)
        numbers = {"crop": size.crop, "frames": size.frames, "batch": size.batch, "warmup": warm_up, "turn": turn + 1,
                   "steps": warm_up + rounds * (turn + 1)}  # fmt: skip
        command = [sys.executable, str(BLACK_BOX), "--repo", str(repo), "--model", size.model, "--variant", variant]
        command += [f"--masks={masks}", *(f"--{key}={value}" for key, value in numbers.items())]
        self.turn_steps, self.device, self.commit = turn, device, commit_of(repo)
        with self.said.open("w") as errors:
            pipe, env = subprocess.PIPE, _environment(device)
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=env)
        self.last: dict[str, Any] = {}
        try:
            self._hear()
            self.batches = _batches(torch.load(masks), size, device)
        except BaseException:
            self.close()
            raise

    def turn(self, count: int) -> list[float]:
        """Milliseconds of `count` steps in a row, by the code's own clock, after one that is not counted."""
        assert count == self.turn_steps
        assert self.process.stdin is not None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what this process keeps for later is what the other one lacks
        print("go", file=self.process.stdin, flush=True)
        self._hear()
        return self.last["ms"][1:]

    def losses(self) -> list[float]:
        """Of every step so far. Errors: ValueError for one that is not finite."""
        return finite(self.last["losses"])

    def facts(self) -> dict[str, Any]:
        """What a row says besides. Its peak memory is the allocator's of its own process, with the batch."""
        return {"peak_memory_gb": self.last["peak_memory_gb"], "public_commit": self.commit,
                "how": ["the public code in a process of its own"]}  # fmt: skip

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.scratch.cleanup()

    def _hear(self) -> None:
        """Wait for what it says of its turn. Errors: CannotRun where it ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            said = [text for text in self.said.read_text().splitlines() if text.strip()]
            raise CannotRun(f"the public code ended with exit code {code}: {said[-1][:300] if said else 'no message'}")
        self.last = json.loads(line)


def commit_of(repo: Path) -> str | None:
    """The commit of the checkout; None where it is no repository."""
    command = ["git", "-C", str(repo), "rev-parse", "--verify", "--quiet", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    inside = subprocess.run([*command[:3], "rev-parse", "--show-prefix"], capture_output=True, text=True, check=False)
    # An unpacked archive inside another repository has no commit of its own.
    return done.stdout.strip() if done.returncode == 0 and not inside.stdout.strip() else None


def _environment(device: torch.device) -> dict[str, str]:
    # Beside a GPU the host's threads are the code's own affair; on a CPU both sides have one.
    return {**os.environ, **({"OMP_NUM_THREADS": "1"} if device.type == "cpu" else {})}


def _batches(sets: dict[str, list[list[torch.Tensor]]], size: Size, device: torch.device) -> Batches:
    """The masks of every step on the device, with random clips of our own form: uint8."""
    tokens = size.frames // 2 * (size.crop // 16) ** 2
    generator = torch.Generator(device).manual_seed(1)
    shape = (size.batch, 3, size.frames, size.crop, size.crop)
    clips = [torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator) for _ in range(2)]
    draws = []
    for context, target in zip(sets["context"], sets["target"]):
        union = target_union(target, tokens).to(device)
        draws.append(Draw([one.to(device) for one in context], [one.to(device) for one in target], union))
    return Batches(clips, draws)
