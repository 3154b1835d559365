"""Many tensors in one launch, in the interpreter: the same bits as one by one, and tables that are made once."""

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import adamw_ema_, config, ema_update_
from fastjepa_kernels._triton import updates as kernels

# Less than a tile, several tiles and more than the program of a group takes, multiples of 16 and others.
COUNTS = (1, 16, 33, 512, 1000, 1024, 1040, 1024, 2064, 2500, 0)


class Counted:
    """Stands for a kernel and counts its launches."""

    def __init__(self, kernel) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> dict[str, Counted]:
    """Two tiles a program, no tables of other tests, and every kernel counted."""
    for operation in ("ema_update_", "adamw_ema_"):
        monkeypatch.setitem(config._forced, operation, {"TILES": 2})
    monkeypatch.setattr(kernels, "_tables", {})
    names = ("ema_kernel", "ema_group_kernel", "adamw_ema_kernel", "adamw_ema_group_kernel")
    counted = {name: Counted(getattr(kernels, name)) for name in names}
    for name, one in counted.items():
        monkeypatch.setattr(kernels, name, one)
    return counted


def stores(seed: int, dtype: torch.dtype = torch.float32, counts=COUNTS) -> tuple[list[Tensor], list[Tensor]]:
    """Buffers, and tensors in the middle of them whose neighbours must stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    made = [(torch.rand(count + 128, generator=generator) + 0.5).to(dtype) for count in counts]
    return made, [store[64 : 64 + count] for store, count in zip(made, counts)]


def alone(function, *lists: list[Tensor] | None) -> None:
    """One call a tensor, so that each has a launch of its own."""
    for n in range(len(lists[0])):
        function(*(None if some is None else [some[n]] for some in lists))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_the_average_of_many_is_that_of_each_to_the_bit(launches, dtype):
    results = []
    for run in (lambda f, *lists: f(*lists), alone):
        (kept, targets), (_, onlines) = stores(0), stores(1, dtype)
        run(lambda t, o: ema_update_(t, o, 0.75, impl="triton"), targets, onlines)
        results.append(kept)
        if run is not alone:
            assert (launches["ema_group_kernel"].launches, launches["ema_kernel"].launches) == (2, 0)
    assert launches["ema_kernel"].launches == len(COUNTS) - 1
    for store, same, before in zip(*results, stores(0)[0]):
        assert store.equal(same)
        assert store[:64].equal(before[:64])
        assert store[-64:].equal(before[-64:])
        changed = (store != before).sum()
        assert changed == len(store) - 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("averaged", "copied"), [(False, False), (True, True)])
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_the_step_of_many_is_that_of_each_to_the_bit(launches, dtype, averaged, copied, skip):
    counts = (1, 16, 1040, 33, 2064, 2500, 0) if averaged else (16, 33, 48, 7)
    results = []
    for run in (lambda f, *lists: f(*lists), alone):
        every = [stores(0, counts=counts), stores(1, dtype, counts), *(stores(n, counts=counts) for n in (2, 3, 4))]
        copies = stores(5, torch.float16, counts)
        lists = [tensors for _, tensors in every]
        steps = [torch.tensor(float(n)) for n in range(len(counts))]

        def step(parameters, gradients, means, squares, targets, copied_to, counted):
            adamw_ema_(
                parameters, gradients, means, squares, counted, lr=0.1, clip_scale=torch.tensor(0.7),
                found_inf=torch.tensor(skip), targets=targets, momentum=0.5 if averaged else None, copies=copied_to,
                impl="triton",
            )  # fmt: skip

        run(step, *lists[:4], lists[4] if averaged else None, copies[1] if copied else None, steps)
        results.append([store for made, _ in (*every, copies) for store in made])
        if run is not alone:
            single = launches["adamw_ema_kernel"].launches
            assert (launches["adamw_ema_group_kernel"].launches, single) == (2, 0)
    before = [store for n in range(5) for store in stores(n, dtype if n == 1 else torch.float32, counts)[0]]
    before += stores(5, torch.float16, counts)[0]
    assert all(one.equal(other) for one, other in zip(*results))
    for place, (store, old) in enumerate(zip(results[0], before)):
        written = not skip and (place // len(counts)) in (0, 2, 3, *([4, 5] if averaged else []))
        assert store[:64].equal(old[:64])
        assert store[-64:].equal(old[-64:])
        if not written:
            assert store.equal(old)
        elif len(store) > 128:
            assert not store.equal(old)


def test_parameters_of_several_kinds_share_a_launch_with_their_like(launches):
    """With and without targets and copies, mixed: what the reference gives, and nothing else written."""
    counts = (16, 32, 48, 64, 80, 96, 112, 128)
    results = []
    for impl in ("triton", "reference"):
        every = [stores(n, counts=counts) for n in range(5)]
        rounded = [stores(n, torch.float16, counts) for n in (5, 6)]
        (parameters, gradients, means, squares, targets), (copies, averages) = (
            [tensors for _, tensors in some] for some in (every, rounded)
        )
        adamw_ema_(
            parameters, gradients, means, squares, [torch.zeros(()) for _ in counts], lr=0.1,
            weight_decay=torch.arange(8) / 8.0, clip_scale=1 - torch.arange(8) / 10.0,
            targets=[x if n % 2 else None for n, x in enumerate(targets)], momentum=0.5,
            copies=[x if n < 4 else None for n, x in enumerate(copies)],
            target_copies=[x if n % 2 and n < 4 else None for n, x in enumerate(averages)], impl=impl,
        )  # fmt: skip
        results.append([store for made, _ in (*every, *rounded) for store in made])
    assert launches["adamw_ema_group_kernel"].launches == 4
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    before = [store for n in range(5) for store in stores(n, counts=counts)[0]]
    before += [store for n in (5, 6) for store in stores(n, torch.float16, counts)[0]]
    changed = [not store.equal(old) for store, old in zip(results[0], before)]
    odd = [bool(n % 2) for n in range(8)]
    first = [n < 4 for n in range(8)]
    both = [a and b for a, b in zip(odd, first)]
    assert changed == [*[True] * 8, *[False] * 8, *[True] * 16, *odd, *first, *both]


def test_dtypes_and_tensors_that_are_not_contiguous_go_their_own_ways(launches):
    (_, targets), (_, onlines) = (stores(n, counts=(32, 48, 64, 80, 96)) for n in (0, 1))
    onlines[1], onlines[3] = onlines[1].half(), onlines[3].half()
    targets.append(torch.rand(8, 6).t())
    onlines.append(torch.rand(8, 6).t().contiguous())
    expected = [torch.lerp(t, o.float(), 0.25) for t, o in zip(targets, onlines)]
    ema_update_(targets, onlines, 0.75, impl="triton")
    torch.testing.assert_close(targets, expected)
    assert (launches["ema_group_kernel"].launches, launches["ema_kernel"].launches) == (2, 1)


def test_tables_are_made_once_for_the_same_addresses_and_few_are_kept(monkeypatch):
    built = []
    kept = kernels._kept
    monkeypatch.setattr(
        kernels, "_kept", lambda key, build, like: kept(key, lambda: built.append(key) or build(), like)
    )
    monkeypatch.setattr(kernels, "MOST_TABLES", 3)
    (_, targets), (_, onlines) = (stores(n, counts=(32, 48)) for n in (0, 1))
    for _ in range(3):
        ema_update_(targets, onlines, 0.75, impl="triton")
    assert [key[0] for key in built] == ["chunks", "table"]
    moved = [[online.clone() for online in onlines] for _ in range(4)]
    for others in moved:
        before = [target.clone() for target in targets]
        ema_update_(targets, others, 0.75, impl="triton")
        torch.testing.assert_close(targets, [torch.lerp(t, o, 0.25) for t, o in zip(before, others)])
    # The map of tiles was used each time, and stayed.
    assert [key[0] for key in built] == ["chunks", "table"] + ["table"] * 4
    assert len(kernels._tables) == 3
