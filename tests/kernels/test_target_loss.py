import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

import fastjepa_kernels
from fastjepa_kernels import target_loss
from fastjepa_kernels.dispatch import has_triton, interpreted


def _inputs(
    masks: int = 2, clips: int = 3, tokens: int = 11, kept: int = 5, width: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kept * width)
    prediction = torch.randn(masks * clips, kept, width, generator=generator, dtype=torch.float64).to(dtype)
    target = (5 + 3 * torch.randn(clips, tokens, width, generator=generator, dtype=torch.float64)).to(dtype)
    index = torch.rand(masks, clips, tokens, generator=generator).argsort(dim=-1)[..., :kept]
    return prediction, target, index


def _by_hand(prediction: Tensor, target: Tensor, index: Tensor, exponent: float) -> Tensor:
    """The loss as the public training code writes it: all tokens normalised, one mask after another."""
    normal = F.layer_norm(target, target.shape[-1:])
    losses = []
    for rows, mask in zip(prediction.chunk(len(index)), index):
        goal = torch.stack([normal[clip][places] for clip, places in enumerate(mask)])
        losses.append((rows - goal).abs().pow(exponent).mean() / exponent)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("exponent", [1.0, 2.0, 1.5, 0.5, 3.0])
def test_loss_and_gradient_are_those_of_the_loop_over_masks(exponent: float) -> None:
    prediction, target, index = _inputs(dtype=torch.float64)
    prediction.requires_grad_()
    ours, theirs = (run(prediction, target, index) for run in (_with(exponent), lambda *x: _by_hand(*x, exponent)))
    torch.testing.assert_close(ours, theirs)
    upstream = torch.tensor(-3.0, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(loss, prediction, upstream)[0] for loss in (ours, theirs)))


def _with(exponent: float = 1.0):
    return lambda p, t, i: target_loss(p, t, i, exponent=exponent, impl="reference")


@pytest.mark.parametrize("exponent", [1.0, 2.0, 1.5, 0.5])
def test_gradient_is_the_slope(exponent: float) -> None:
    prediction, target, index = _inputs(width=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p: _with(exponent)(p, target, index), (prediction.requires_grad_(),), eps=1e-7
    )


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
def test_gradient_is_zero_where_prediction_and_target_agree(exponent: float) -> None:
    target = torch.full((1, 4, 8), 7.0)
    prediction = torch.zeros(1, 2, 8, requires_grad=True)
    loss = _with(exponent)(prediction, target, torch.tensor([[0, 3]]))
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(prediction))


def test_index_of_one_mask_and_of_int32_and_repeated_tokens() -> None:
    prediction, target, index = _inputs(masks=1)
    wanted = _with()(prediction, target, index)
    assert torch.equal(_with()(prediction, target, index[0]), wanted)
    assert torch.equal(_with()(prediction, target, index.int()), wanted)
    index[..., 1] = index[..., 0]
    torch.testing.assert_close(_with()(prediction, target, index), _by_hand(prediction, target, index, 1.0))


def test_target_gets_no_gradient() -> None:
    prediction, target, index = _inputs()
    loss = _with()(prediction, target.requires_grad_(), index)
    assert not loss.requires_grad
    loss = _with()(prediction.requires_grad_(), target, index)
    loss.backward()
    assert target.grad is None
    assert prediction.grad is not None


@pytest.mark.parametrize(("p", "t"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_loss_is_float32_and_the_gradient_of_the_dtype_of_the_prediction(p: torch.dtype, t: torch.dtype) -> None:
    prediction, target, index = _inputs(width=96)
    prediction, target = prediction.to(p).requires_grad_(), target.to(t)
    loss = _with()(prediction, target, index)
    loss.backward()
    assert loss.dtype == torch.float32
    assert prediction.grad.dtype == p
    torch.testing.assert_close(loss, _by_hand(prediction.float(), target.float(), index, 1.0))


@pytest.mark.parametrize("exponent", [1.5])
@pytest.mark.parametrize("name", ["target_loss", "target_loss_reference"])
def test_registration_is_sound(name: str, exponent: float) -> None:
    prediction, target, index = _inputs()
    strided = prediction.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    run = getattr(torch.ops.fastjepa, name).default
    for x in (prediction, strided):
        library.opcheck(run, (x.detach().requires_grad_(), target, index, exponent, 1e-5))
    mixed = (prediction.bfloat16().requires_grad_(), target, index.int(), exponent, 1e-5)
    library.opcheck(run, mixed)
    _, mean, rstd = run(strided, target, index, exponent, 1e-5)
    backward = getattr(torch.ops.fastjepa, name.replace("loss", "loss_backward")).default
    checks = ("test_schema", "test_faketensor")
    library.opcheck(backward, (torch.tensor(2.0), strided, target, index, mean, rstd, exponent), test_utils=checks)


def test_compiles_as_one_graph_and_rarely_again_for_other_lengths() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(target_loss, backend="aot_eager", fullgraph=True)
    frames = torch._dynamo.utils.counters["stats"]
    before = frames["unique_graphs"]
    for kept in range(2, 22):
        prediction, target, index = _inputs(tokens=25, kept=kept)
        prediction.requires_grad_()
        losses = [run(prediction, target, index, exponent=2.0, impl="reference") for run in (compiled, target_loss)]
        assert torch.equal(*losses)
        assert torch.equal(*(torch.autograd.grad(loss, prediction)[0] for loss in losses))
    assert frames["unique_graphs"] - before <= 3


def test_a_loss_that_is_no_number_is_not_hidden() -> None:
    prediction, target, index = _inputs()
    prediction[1, 2, 3] = math.nan
    assert _with()(prediction, target, index).isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, t, i: ((p[0], t, i), {}), "expected prediction"),
        (lambda p, t, i: ((p[:-1], t, i), {}), "do not fit prediction"),
        (lambda p, t, i: ((p, t[:-1], i), {}), "do not fit prediction"),
        (lambda p, t, i: ((p, t[..., :-1], i), {}), "do not fit prediction"),
        (lambda p, t, i: ((p, t, i[0]), {}), "do not fit prediction"),
        (lambda p, t, i: ((p[:, :0], t, i[..., :0]), {}), "nothing to compare"),
        (lambda p, t, i: ((p, t, i.float()), {}), "int32 or int64"),
        (lambda p, t, i: ((p, t.long(), i), {}), "floating dtype"),
        (lambda p, t, i: ((p, t, i), {"exponent": 0.0}), "exponent must be above 0"),
        (lambda p, t, i: ((p, t, i), {"exponent": math.nan}), "exponent must be above 0"),
        (lambda p, t, i: ((p, t, i), {"eps": -1.0}), "eps must be above 0"),
        (lambda p, t, i: ((p, t, i), {"impl": "fast"}), "impl must be one of"),
    ],
)
def test_mistakes_are_named(change, message: str) -> None:
    arguments, named = change(*_inputs())
    with pytest.raises(ValueError, match=message):
        target_loss(*arguments, **named)


def test_explain_names_the_loss() -> None:
    assert fastjepa_kernels.explain("target_loss", torch.empty(0), impl="reference").startswith(
        "target_loss: reference"
    )


@pytest.mark.skipif(not has_triton() or interpreted(), reason="compiles with Triton")
@pytest.mark.parametrize("target", ["sm_90"])
def test_kernels_compile_without_spills_and_without_float64(target: str) -> None:
    from fastjepa_kernels._triton.target_loss import shipped
    from fastjepa_kernels.testing.compile_only import compile_for

    chosen = [entry for entry in shipped() if entry.name.endswith("q=1.5") and "8192" not in entry.name]
    assert len(chosen) == 5
    for entry in chosen:
        needs = compile_for(target, entry.kernel, entry.signature, entry.constants, warps=entry.warps)
        assert (needs.spilled, needs.float64) == (0, 0), entry.name
