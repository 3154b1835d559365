"""The Triton forms of `ema_update_` and `adamw_ema_` in the interpreter, beside their references."""

from itertools import chain

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import adamw_ema_, dispatch, ema_update_
from fastjepa_kernels.reference import updates as reference
from fastjepa_kernels.testing import poison, yardstick

if not dispatch.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

SHAPES = ((1, 24), (7, 40), (33, 96), (1, 1000), (512,), (), (0, 3))


def values(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """In the middle of buffers of NaN."""
    generator = torch.Generator().manual_seed(seed)
    return [poison.guarded(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("momentum", [0.996, torch.tensor(0.5, dtype=torch.float64), 1.0, 0.0])
def test_the_average_is_as_exact_as_its_reference_and_stays_inside(dtype, momentum):
    targets, onlines = values(0), values(1, dtype)

    def through(impl):
        def run(target: Tensor, online: Tensor) -> Tensor:
            target = target.clone()
            if target.dtype == torch.float64:
                move = 1.0 - torch.as_tensor(momentum, dtype=torch.float64)
                reference.ema_update_([target], [online], move)
            else:
                ema_update_([target], [online], momentum, impl=impl)
            return target

        return run

    for target, online in zip(targets, onlines):
        yardstick.check(through("triton"), through("reference"), target, online)
    twice = [through("triton")(t, o) for t, o in zip(targets, onlines)]
    ema_update_(targets, onlines, momentum, impl="triton")
    assert same(targets, twice)
    assert all(poison.intact(x) for x in (*targets, *onlines))


def test_the_average_of_tensors_that_are_not_contiguous():
    generator = torch.Generator().manual_seed(3)
    start, online = torch.randn(40, 33, generator=generator), torch.randn(17, 80, generator=generator)[:, ::2]
    results = []
    for impl in ("triton", "reference"):
        store = start.clone()
        ema_update_([store.t()[3:20]], [online], 0.9, impl=impl)
        results.append(store)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert not torch.equal(results[0], start)


@pytest.mark.parametrize("count", [1, 7, 33, 512, 513])
def test_neighbours_keep_their_values(count):
    # NaN around a tensor does not show an update in place that goes too far: what it writes is NaN again.
    stores = [torch.rand(count + 1024, generator=torch.Generator().manual_seed(n)) + 0.5 for n in range(6)]
    before = [store.clone() for store in stores]
    parameter, gradient, mean, square, target, online = ([store[64 : 64 + count]] for store in stores)
    copy = torch.zeros(count + 1024, dtype=torch.float16)
    adamw_ema_(
        parameter, gradient, mean, square, [torch.zeros(())], lr=0.1, targets=target, momentum=0.5,
        copies=[copy[64 : 64 + count]], impl="triton",
    )  # fmt: skip
    ema_update_(online, parameter, 0.5, impl="triton")
    for n, (store, old) in enumerate(zip(stores, before)):
        changed = (store != old).nonzero().flatten()
        assert changed.tolist() == ([] if n == 1 else list(range(64, 64 + count)))
    assert copy.nonzero().flatten().tolist() == list(range(64, 64 + count))


def test_a_graph_that_saved_a_target_refuses():
    target = torch.ones(3, requires_grad=True)
    loss = (target * target).sum()
    ema_update_([target], [torch.zeros(3)], 0.5, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("averaged", "copied"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_the_step_is_as_exact_as_its_reference_and_stays_inside(dtype, averaged, copied, skip):
    def start():
        state = [values(0), values(1, dtype), values(2), [poison.guarded(x.square()) for x in values(3)]]
        nan = [poison.guarded(torch.full(shape, float("nan"), dtype=torch.float16)) for shape in SHAPES]
        more = [poison.guarded(x.clone()) for x in nan] if averaged and copied else None
        return state, values(4) if averaged else None, nan if copied else None, more

    results = {}
    for impl in ("triton", "reference", "again"):
        state, targets, copies, averages = start()
        steps = [torch.tensor(float(n)) for n in range(len(SHAPES))]
        adamw_ema_(
            *state, steps, lr=0.01, weight_decay=0.1, clip_scale=torch.tensor(0.7), found_inf=torch.tensor(skip),
            targets=targets, momentum=0.9 if averaged else None, copies=copies, target_copies=averages,
            impl="triton" if impl == "again" else impl,
        )  # fmt: skip
        touched = [*chain(*state), *(targets or []), *(copies or []), *(averages or [])]
        assert all(poison.intact(x) for x in touched)
        results[impl] = [x.clone() for x in touched]
        if skip:
            state, targets, copies, averages = start()
            before = [*chain(*state), *(targets or []), *(copies or []), *(averages or [])]
            assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(touched, before))
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(results["triton"], results["again"]))
    if skip:
        return
    scalars = exact_scalars(0.9 if averaged else 1.0)
    state, targets, copies, averages = start()
    wide = [[x.double() for x in some] for some in (*state, targets or [], copies or [], averages or [])]
    reference.adamw_ema_(*wide, scalars, 0.9, 0.999, 1e-8)
    for ours, eager, exact in zip(results["triton"], results["reference"], chain(*wide)):
        limit = 2 * yardstick.distance(eager, exact) + torch.finfo(ours.dtype).eps
        assert ours.isfinite().all()
        assert yardstick.distance(ours, exact) <= limit


def exact_scalars(momentum: float) -> Tensor:
    count = torch.arange(1, len(SHAPES) + 1, dtype=torch.float64)
    fixed = [torch.full_like(count, x) for x in (1 - 0.01 * 0.1, torch.tensor(0.7).item(), 0.0, 1 - momentum)]
    return torch.stack([fixed[0], 0.01 / (1 - 0.9**count), (1 - 0.999**count).sqrt(), *fixed[1:]], dim=1)


def test_nan_gradients_of_a_step_that_is_left_out_do_no_harm():
    parameter, mean, square, target = (torch.full((5,), x) for x in (1.0, 2.0, 3.0, 4.0))
    step = torch.tensor(2.0)
    adamw_ema_(
        [parameter], [torch.full((5,), float("nan"))], [mean], [square], [step], lr=0.1,
        clip_scale=torch.tensor(float("nan")), found_inf=torch.tensor(1.0), targets=[target], momentum=0.0,
        impl="triton",
    )  # fmt: skip
    assert [x.unique().tolist() for x in (parameter, mean, square, target, step)] == [[1.0], [2.0], [3.0], [4.0], [2.0]]


def test_a_step_of_tensors_that_are_not_contiguous():
    generator = torch.Generator().manual_seed(5)
    start = [torch.randn(24, 7, generator=generator).square() for _ in range(6)]
    results = []
    for impl in ("triton", "reference"):
        parameter, gradient, mean, square, target = (x.clone().t() for x in start[:5])
        copy = torch.zeros(24, 7, dtype=torch.float16).t()
        adamw_ema_(
            [parameter], [gradient], [mean], [square], [torch.zeros(())], lr=0.1, targets=[target], momentum=0.5,
            copies=[copy], impl=impl,
        )  # fmt: skip
        results.append([parameter, mean, square, target, copy])
    torch.testing.assert_close(*results, rtol=2e-6, atol=1e-6)
    assert not torch.equal(results[0][0], start[0].t())
    assert results[0][4].count_nonzero() == 7 * 24
