"""`add_layer_norm` with a bias of x, LayerScale and DropPath: values, gradients, contract."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend

from fastjepa_kernels import add_layer_norm
from fastjepa_kernels.testing import yardstick

NAMES = ("x", "residual", "weight", "bias", "x_bias", "scale", "row_scale")
CHOICES = list(product((False, True), repeat=3))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(
    *shape: int, dtype: torch.dtype = torch.float32, given: tuple[bool, bool, bool] = (True, True, True)
) -> dict[str, Tensor]:
    """All that `add_layer_norm` takes, with gradients; the first clip of DropPath is dropped."""
    width = shape[-1]
    made = {"x": normal(*shape, dtype=dtype), "residual": normal(*shape, dtype=dtype, seed=1) * 2 - 3}
    made |= {"weight": normal(width, dtype=dtype, seed=2) + 1, "bias": normal(width, dtype=dtype, seed=3)}
    made |= {"x_bias": normal(width, dtype=dtype, seed=4), "scale": normal(width, dtype=dtype, seed=5) + 0.5}
    leaves = {name: value.requires_grad_() for name, value in made.items()}
    leaves["row_scale"] = torch.tensor([0.0, 1.25, 1.5, 2.0][: shape[0]], dtype=dtype)
    return {name: leaves[name] for name, there in zip(NAMES, (True,) * 4 + given) if there}


def composed(x, residual, weight, bias, x_bias=None, scale=None, row_scale=None, out_dtype=None):
    """One step at a time in float32 (float64 for float64), the sum rounded as that of the operation."""
    wide = torch.promote_types(x.dtype, torch.float32)
    branch = x.to(wide)
    branch = branch if x_bias is None else branch + x_bias
    branch = branch if scale is None else branch * scale
    branch = branch if row_scale is None else branch * row_scale.reshape(-1, *[1] * (x.ndim - 1))
    total = (residual.to(wide) + branch).to(residual.dtype)
    out = F.layer_norm(total.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps=1e-6)
    return out.to(x.dtype if out_dtype is None else out_dtype), total


def backward(results: tuple[Tensor, Tensor], used: str) -> None:
    """Through the normalised form, the sum, or both."""
    upstream = [normal(*results[0].shape, seed=8 + n).to(result.dtype) for n, result in enumerate(results)]
    chosen = {"both": (0, 1), "normalised": (0,), "sum": (1,)}[used]
    torch.autograd.backward([results[n] for n in chosen], [upstream[n] for n in chosen])


@pytest.mark.parametrize("given", CHOICES)
@pytest.mark.parametrize("shape", [(3, 40), (4, 2, 3, 24)])
@pytest.mark.parametrize("used", ["both", "normalised", "sum"])
def test_it_is_the_steps_one_by_one(shape, given, used):
    ours, theirs = inputs(*shape, given=given), inputs(*shape, given=given)
    results, expected = add_layer_norm(**ours), composed(**theirs)
    for result, other in zip(results, expected):
        torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-5)
    backward(results, used)
    backward(expected, used)
    for name in ours:
        if theirs[name].grad is None:
            assert ours[name].grad is None, name
        else:
            torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("given", CHOICES)
@pytest.mark.parametrize("used", ["both", "normalised", "sum"])
def test_gradients_are_the_derivatives(given, used):
    made = inputs(2, 2, 3, dtype=torch.float64, given=given)
    names = [name for name in made if name != "row_scale"]

    def run(*values: Tensor):
        results = add_layer_norm(**{**made, **dict(zip(names, values))})
        return results if used == "both" else results[used == "sum"]

    assert torch.autograd.gradcheck(run, [made[name] for name in names])


@pytest.mark.parametrize("wanted", NAMES[:6])
def test_each_gradient_alone(wanted):
    alone, together = inputs(2, 7, 24), inputs(2, 7, 24)
    for name in NAMES[:6]:
        alone[name].requires_grad_(name == wanted)
    for made in (alone, together):
        backward(add_layer_norm(**made), "both")
    assert [name for name in alone if alone[name].grad is not None] == [wanted]
    torch.testing.assert_close(alone[wanted].grad, together[wanted].grad, rtol=0, atol=0)


def test_a_dropped_clip_keeps_its_residual_to_the_bit_and_passes_no_gradient_to_x():
    made = inputs(3, 7, 24)
    _, total = results = add_layer_norm(**made)
    assert total[0].equal(made["residual"][0])
    backward(results, "both")
    assert made["x"].grad[0].count_nonzero() == 0
    assert made["residual"].grad[0].count_nonzero() == 7 * 24


def test_dtypes_of_results_and_gradients():
    made = inputs(2, 7, 24)
    made["x"] = made["x"].detach().bfloat16().requires_grad_()
    made["scale"] = made["scale"].detach().half().requires_grad_()
    out, total = results = add_layer_norm(**made)
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    backward(results, "both")
    assert all(value.grad.dtype == value.dtype for name, value in made.items() if name != "row_scale")
    other = {name: value.detach().double().requires_grad_() for name, value in made.items()}
    expected, _ = exact = composed(**other)
    backward(exact, "both")
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)
    for name in NAMES[1:6]:
        torch.testing.assert_close(made[name].grad.double(), other[name].grad, rtol=2e-2, atol=4e-2)
    assert add_layer_norm(**made, out_dtype=torch.float16)[0].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_as_exact_as_the_steps_in_the_same_precision(dtype):
    """The steps of eager PyTorch round after each one; the operation once."""
    made = {name: value.detach() for name, value in inputs(3, 33, 96, dtype=dtype).items()}
    names = list(made)

    def eager(x, residual, weight, bias, x_bias, scale, row_scale):
        total = residual + (x + x_bias) * scale * row_scale.view(-1, 1, 1)
        return F.layer_norm(total, x.shape[-1:], weight, bias, eps=1e-6), total

    def gradient_of(run, name):
        def call(*values: Tensor) -> Tensor:
            leaves = [value.clone().requires_grad_(one != "row_scale") for one, value in zip(names, values)]
            backward(run(*leaves), "both")
            return leaves[names.index(name)].grad

        return call

    def ours(*values: Tensor):
        return add_layer_norm(**dict(zip(names, values)))

    yardstick.check(lambda *values: ours(*values)[1], lambda *values: eager(*values)[1], *made.values())
    for name in names[:-1]:
        yardstick.check(gradient_of(ours, name), gradient_of(eager, name), *made.values())


@pytest.mark.parametrize("trained", [True, False])
def test_x_is_kept_only_for_the_gradient_of_the_scale(trained):
    made, kept = inputs(2, 7, 24), []
    made["scale"].requires_grad_(trained)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        add_layer_norm(**made)
    assert (made["x"].data_ptr() in kept) == trained
    assert made["residual"].data_ptr() not in kept


def test_strided_and_empty_inputs():
    x, residual = normal(3, 8, 48), normal(3, 8, 48, seed=1)
    factors = {"x_bias": normal(24, seed=2), "scale": normal(48, seed=3)[::2]}
    for view in (lambda x: x[:, ::2, 4:28], lambda x: x[:, :, ::2].transpose(0, 1), lambda x: x[0, :, :24]):
        one, two = view(x), view(residual)
        row_scale = torch.arange(2.0 * one.shape[0])[::2]
        results = add_layer_norm(one, two, None, None, **factors, row_scale=row_scale)
        expected = composed(one, two, torch.ones(24), torch.zeros(24), **factors, row_scale=row_scale)
        for result, other in zip(results, expected):
            torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-5)
    for shape in ((0, 7, 24), (2, 0, 24)):
        made = inputs(*shape)
        backward(add_layer_norm(**made), "both")
        assert all(made[name].grad.equal(torch.zeros(24)) for name in NAMES[2:6])


@pytest.mark.parametrize("suffix", ["", "_reference"])
def test_torch_accepts_the_operators(suffix):
    add = getattr(torch.ops.fastjepa, f"add_layer_norm{suffix}").default
    made = inputs(2, 3, 8)
    values = [made[name] for name in NAMES]
    library.opcheck(add, (*values[:4], 1e-6, *values[4:], torch.bfloat16))
    library.opcheck(add, (values[0], values[1].detach().half(), None, None, 1e-6, *values[4:], torch.float32))
    back = getattr(torch.ops.fastjepa, f"add_layer_norm_backward{suffix}").default
    x, residual, weight, _, x_bias, scale, row_scale = (value.detach() for value in values)
    gradient, mean = normal(2, 3, 8, seed=6), normal(2, 3, seed=7)
    fixed = residual, weight, mean, mean.exp()
    for given, extra, flags in (
        (gradient, residual.cos(), (True,) * 5),
        (gradient, None, (False, True, False, True, False)),
        (None, gradient, (False, False, True, False, True)),
        (None, gradient, (False, False, True, False, False)),
    ):
        library.opcheck(back, (given, extra, *fixed, x, x_bias, scale, row_scale, torch.float32, *flags))
        if not flags[-1]:
            library.opcheck(back, (given, extra, *fixed, None, None, None, None, torch.float32, *flags))


def test_compiles_whole_with_few_recompiles_over_many_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(made: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return add_layer_norm(**made, out_dtype=torch.bfloat16, impl="reference")

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in range(2, 22):
        ours, theirs = inputs(2, length, 24), inputs(2, length, 24)
        results, expected = compiled(ours), step(theirs)
        backward(results, "both")
        backward(expected, "both")
        for mine, other in zip((*results, *ours.values()), (*expected, *theirs.values())):
            torch.testing.assert_close(mine, other)
            torch.testing.assert_close(mine.grad, other.grad) if mine.is_leaf and mine.requires_grad else None
    assert counter.frame_count <= 2


def test_repeats_bit_by_bit():
    def gradients() -> list[Tensor]:
        made = inputs(3, 33, 24)
        backward(add_layer_norm(**made), "both")
        return [made[name].grad for name in NAMES[:6]]

    assert all(one.equal(other) for one, other in zip(gradients(), gradients()))


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({"x_bias": torch.ones(7)}, r"floating x_bias \[8\]"),
        ({"x_bias": torch.ones(8).long()}, "floating x_bias"),
        ({"scale": torch.ones(1)}, r"floating scale \[8\]"),
        ({"scale": torch.ones(8, device="meta")}, "on meta"),
        ({"row_scale": torch.ones(3)}, r"floating row_scale \[4\]"),
        ({"row_scale": torch.ones(4, 1)}, r"floating row_scale \[4\]"),
        ({"row_scale": torch.ones(4).long()}, "floating row_scale"),
        ({"row_scale": torch.ones(4, requires_grad=True)}, "no gradient"),
        ({"out_dtype": torch.int32}, "out_dtype"),
    ],
)
def test_mistakes_are_sentences(factors, words):
    with pytest.raises(ValueError, match=f"add_layer_norm: .*{words}"):
        add_layer_norm(normal(4, 8), normal(4, 8), **factors)


def test_a_row_alone_has_no_clips():
    with pytest.raises(ValueError, match=r"row_scale needs x \[B, \.\.\., D\], got \[8\]"):
        add_layer_norm(normal(8), normal(8), row_scale=torch.ones(8))


def test_the_heaviest_backward_fits_into_registers(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from fastjepa_kernels._triton import norms
    from fastjepa_kernels.testing.compile_only import compile_for

    names = ("add norm back all fp32 1280", "add back all fp32 1280", "add back all bf16 8192")
    heaviest = [entry for entry in norms.shipped() if entry.name in names]
    assert len(heaviest) == 3
    for entry in heaviest:
        needs = compile_for("sm_90", entry.kernel, entry.signature, entry.constants, warps=entry.warps)
        assert needs.spilled == 0, (entry.name, needs)
        assert needs.float64 == 0, (entry.name, needs)
