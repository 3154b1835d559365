"""The global batches are those of one process, however many loader processes and training processes share them."""

import numpy as np
import pytest
import torch

from fastjepa.data.crashes import Crashes
from fastjepa.data.dataset import ClipDataset, Reader
from fastjepa.data.guard import Guard
from fastjepa.data.loader import make_loader, running
from fastjepa.data.sampling import ClipPlan
from fastjepa.masks import MaskCollator

GLOBAL, STEPS = 12, (2, 5)


@pytest.fixture(scope="module")
def paths(film, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    made = [str(film.video(folder / f"{n}.mp4", frames=6 + n)) for n in range(5)]
    (folder / "empty.mp4").touch()
    return [*made, str(folder / "empty.mp4"), str(folder / "missing.mp4")]


def part(paths, rank, world, workers, batch_size):
    """The batches of one training process, with its guard."""
    plan = ClipPlan(0, np.arange(len(paths)), 4, 2, (0.3, 1.0), (0.75, 1.35), True)
    sets = [{"num_blocks": 2, "spatial_scale": (0.3, 0.3), "temporal_scale": (0.5, 0.5)}]
    loader = make_loader(
        ClipDataset(Reader(paths, 2), plan, 16), MaskCollator(sets, 16, 4, 4, 2, seed=0, truncation="random", group=2),
        first_step=STEPS[0], last_step=STEPS[1], global_batch=GLOBAL, batch_size=batch_size, workers=workers,
        pin_memory=False, tokens=32, rank=rank, world=world, guard=Guard(Crashes(paths), 60.0, pytest.fail),
    )  # fmt: skip
    with running(loader) as batches:
        return list(batches)


def global_batches(paths, world, workers, batch_size=2):
    """By step: slots, clips and bad files of all processes together, put in the order of the ranks."""
    parts = [part(paths, rank, world, workers, batch_size) for rank in range(world)]
    per_step = GLOBAL // world // batch_size
    steps = []
    for step in range(STEPS[1] - STEPS[0]):
        batches = [batch for own in parts for batch in own[step * per_step : (step + 1) * per_step]]
        steps.append(
            (
                [slot for batch in batches for slot in batch.slots],
                torch.cat([batch.clips for batch in batches]),
                [entry for batch in batches for entry in batch.bad],
                [[s.tolist() for s in (*batch.masks_context, *batch.masks_target)] for batch in batches],
            )
        )
    assert all(len(own) == per_step * len(steps) for own in parts)
    return steps


@pytest.fixture(scope="module")
def wanted(paths):
    found = global_batches(paths, 1, 0)
    assert [slots for slots, *_ in found] == [list(range(GLOBAL * s, GLOBAL * (s + 1))) for s in range(*STEPS)]
    # Each process remembers what it could not read, and tells of it again at every slot all the same.
    assert {path for _, _, bad, _ in found for path, _ in bad} == set(paths[5:])
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_global_batches_are_the_same(paths, wanted, world, workers):
    for got, want in zip(global_batches(paths, world, workers), wanted, strict=True):
        assert got[0] == want[0]
        assert torch.equal(got[1], want[1])
        assert got[2:] == want[2:]


def test_what_does_not_divide_is_refused(paths):
    with pytest.raises(ValueError, match="cannot be divided"):
        part(paths, 0, 5, 0, 1)
