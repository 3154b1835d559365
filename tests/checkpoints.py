"""A state of every dtype and shape, and what tests of checkpoints ask of it."""

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
