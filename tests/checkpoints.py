"""A state of every dtype and shape, and what tests of checkpoints ask of it."""

import os
import sys
import traceback
from pathlib import Path

import torch

from fastjepa import checkpoint
from fastjepa.checkpoint import load, newest

TRAINER = {"samples_seen": 40, "settings": {"optim.lr": 1e-3}, "scaler": None}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "encoder.weight": torch.randn(33, 17, generator=rng),
        "encoder.bias": torch.randn(21, generator=rng).bfloat16(),
        "predictor.cube": torch.randn(3, 4, 5, generator=rng, dtype=torch.float64),
        "optimizer.step": torch.tensor(seed),
        "optimizer.scale": torch.tensor(seed / 7),
        "optimizer.counts": torch.arange(300) * seed,
    }


def assert_bitwise(have: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert have[name].dtype == tensor.dtype
        assert have[name].shape == tensor.shape
        assert torch.equal(have[name].contiguous().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def content(found: checkpoint.Found) -> dict[str, torch.Tensor]:
    values = {name: torch.full_like(tensor, 77) for name, tensor in tensors(0).items()}
    load(found, values)
    return values


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def quiet(text: str) -> None:
    raise AssertionError(f"nothing was to be said: {text}")


def seed_found(root: Path) -> int | None:
    """Which content the newest checkpoint has, every bit of it; nothing may be said on the way."""
    found = newest(root, quiet)
    if found is None:
        return None
    have = content(found)
    seed = int(have["optimizer.step"])
    assert_bitwise(have, tensors(seed))
    return seed


def in_child(action) -> int:
    """Run in a forked process, so that its hooks and limits die with it; its exit code, 1 with a printed traceback."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watch_changes(root: Path, before_change) -> None:
    """Call before_change(event) ahead of everything that changes the disk. Cannot be undone: for children only."""

    def hook(event, arguments):
        written = (
            event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and str(arguments[0]).startswith(str(root))
        )
        if written or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"):
            before_change(event)

    fsync = os.fsync

    def watched_fsync(handle):
        before_change("os.fsync")
        fsync(handle)

    os.fsync = watched_fsync
    sys.addaudithook(hook)
