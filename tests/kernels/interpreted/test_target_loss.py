"""The kernels of the loss in Triton's interpreter: needs TRITON_INTERPRET=1 before the start; float32 and float16."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import target_loss, use
from fastjepa_kernels.config import forced
from fastjepa_kernels.dispatch import interpreted
from fastjepa_kernels.reference import target_loss as reference
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs in a process with TRITON_INTERPRET=1")


def _inputs(
    kept: int, width: int, dtype: torch.dtype = torch.float32, masks: int = 2, clips: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kept * width)
    tokens = kept + 3
    prediction = torch.randn(masks * clips, kept, width, generator=generator).to(dtype)
    target = (5 + 3 * torch.randn(clips, tokens, width, generator=generator)).to(dtype)
    index = torch.rand(masks, clips, tokens, generator=generator).argsort(dim=-1)[..., :kept].contiguous()
    return guarded(prediction), guarded(target), guarded(index)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Tensor]]:
    """All that `torch.empty` hands out is full of NaN, with NaN around; call it for the list, and to end that."""
    made: list[Tensor] = []

    def poisoned(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(guarded(torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)))
        return made[-1]

    monkeypatch.setattr(torch, "empty", poisoned)

    def finish() -> list[Tensor]:
        monkeypatch.undo()
        return made

    return finish


def _run(impl: str, exponent: float, index: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(loss, gradient) as functions of prediction and target."""

    def loss(p: Tensor, t: Tensor) -> Tensor:
        return target_loss(p, t, index, exponent=exponent, impl=impl)

    def gradient(p: Tensor, t: Tensor) -> Tensor:
        leaf = p.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, t), leaf, torch.tensor(1000.0))[0].to(p.dtype)

    return loss, gradient


@pytest.mark.parametrize("exponent", [1.0, 2.0, 1.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kept", "width"), [(1, 24), (7, 40), (33, 96), (1, 1000)])
def test_as_exact_as_torch(kept: int, width: int, dtype: torch.dtype, exponent: float) -> None:
    prediction, target, index = _inputs(kept, width, dtype)
    ours, theirs = _run("triton", exponent, index), _run("reference", exponent, index)
    for run, expected in zip(ours, theirs):
        check(run, expected, prediction, target)


@pytest.mark.parametrize("exponent", [1.0, 1.5])
@pytest.mark.parametrize(("kept", "width"), [(1, 24), (7, 40), (33, 96), (7, 1000)])
def test_every_value_is_written_and_nothing_else(
    fresh: Callable[[], list[Tensor]], kept: int, width: int, exponent: float
) -> None:
    prediction, target, index = _inputs(kept, width)
    _, gradient = _run("triton", exponent, index)
    result = gradient(prediction, target)
    buffers = fresh()
    assert len(buffers) == 5  # sums, mean and deviation of rows; the loss; the gradient
    assert all(buffer.isfinite().all() and intact(buffer) for buffer in buffers)
    assert result.isfinite().all()
    assert all(intact(x) for x in (prediction, target, index))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
def test_gradient_is_zero_where_prediction_and_target_agree(exponent: float) -> None:
    prediction = torch.zeros(1, 3, 24, requires_grad=True)
    target, index = torch.full((1, 4, 24), 7.0), torch.tensor([[0, 3, 0]])
    loss = target_loss(prediction, target, index, exponent=exponent, impl="triton")
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, prediction)[0], torch.zeros_like(prediction))


def test_strides_are_read_in_place() -> None:
    prediction, target, index = _inputs(7, 40)
    wide = torch.full((4, 9, 48), float("nan"))
    wide[:, 2:, :40] = prediction
    shifted = torch.full((10, 2, 44), float("nan"))
    shifted[:, :, :40] = target.transpose(0, 1)
    turned = index.transpose(0, 2).contiguous().transpose(0, 2)
    last = prediction.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = [run(prediction, target) for run in _run("triton", 1.5, index)]
    for p, t in ((wide[:, 2:, :40], target), (prediction, shifted[:, :, :40].transpose(0, 1)), (last, target)):
        got = [run(p, t) for run in _run("triton", 1.5, turned)]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))
        assert got[1].is_contiguous()


def test_more_rows_than_one_addition_takes() -> None:
    prediction, target, index = _inputs(33, 24)
    loss, expected = (_run(impl, 1.0, index)[0] for impl in ("triton", "reference"))
    with forced("target_loss_total", LANES=16):
        check(loss, expected, prediction, target)


def test_results_repeat_bit_for_bit_and_int32_is_the_same() -> None:
    prediction, target, index = _inputs(33, 96)
    first = [run(prediction, target) for run in _run("triton", 1.0, index)]
    for again in (index, index.int()):
        assert all(torch.equal(run(prediction, target), x) for run, x in zip(_run("triton", 1.0, again), first))


def test_not_a_number_is_not_hidden() -> None:
    for exponent in (1.0, 1.5, 2.0):
        prediction, target, index = _inputs(7, 24)
        prediction[1, 2, 3] = float("nan")
        loss, gradient = _run("triton", exponent, index)
        assert loss(prediction, target).isnan()
        _, expected = _run("reference", exponent, index)
        torch.testing.assert_close(gradient(prediction, target), expected(prediction, target), equal_nan=True)


def test_statistics_are_those_of_the_reference_and_the_whole_width_is_used() -> None:
    prediction, target, index = _inputs(7, 1000)
    ours = torch.ops.fastjepa.target_loss(prediction, target, index, 1.0, 1e-5)
    for a, b in zip(ours, reference.loss(prediction, target, index, 1.0, 1e-5)):
        torch.testing.assert_close(a, b)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    prediction, target, index = _inputs(1, 24)
    with use("triton"), pytest.raises(ValueError, match="compute in float32, got float64"):
        target_loss(prediction.double(), target, index)
    wide = torch.zeros(4, 1, 8193)
    with pytest.raises(ValueError, match="at most 8192 channels"):
        target_loss(wide, torch.zeros(2, 4, 8193), index, impl="triton")
