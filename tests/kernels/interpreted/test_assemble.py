"""The kernels of the predictor's input in Triton's interpreter, against the reference. float32 and float16 only."""

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import assemble_tokens, config, row_keys
from fastjepa_kernels._triton import assemble as kernels
from fastjepa_kernels._triton import noise as noise_kernels
from fastjepa_kernels.reference import assemble as reference
from fastjepa_kernels.testing.poison import guarded, intact
from fastjepa_kernels.testing.yardstick import check

DTYPES = [torch.float32, torch.float16]
SIZES = [(1, 1, 24), (7, 33, 40), (33, 7, 3), (2, 1, 1001)]  # context tokens, target tokens, width
KINDS = ["token", "token a clip", "ready", "noised", "recorded", "ready gathered", "noised gathered"]
CLIPS = 2


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(kind: str, seen: int, asked: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of a kind, each between NaN, and NaN in targets and positions that nothing names."""
    tokens = seen + asked + 2
    order = torch.rand(CLIPS, tokens, generator=torch.Generator().manual_seed(7)).argsort(dim=-1)
    context_index, target_index = order[:, :seen].contiguous(), order[:, seen : seen + asked].contiguous()
    named = torch.zeros(tokens, dtype=torch.bool).index_fill_(0, order[:, : seen + asked].flatten(), True)
    given = {
        "context": normal(CLIPS, seen, width, dtype=dtype),
        "context_index": context_index,
        "target_index": target_index,
        "table": normal(tokens, width, seed=1).masked_fill(~named[:, None], float("nan")),
    }
    if "token" in kind:
        given["mask_token"] = normal(*([CLIPS] if "clip" in kind else []), width, dtype=dtype, seed=2)
    else:
        targets = normal(CLIPS, tokens if "gathered" in kind else asked, width, dtype=dtype, seed=3) * 2 + 3
        if "gathered" in kind:
            left_out = torch.ones(CLIPS, tokens, dtype=torch.bool).scatter_(1, target_index, False)
            targets = targets.masked_fill(left_out.unsqueeze(-1), float("nan"))
        given["targets"] = targets
    if "noised" in kind or kind == "recorded":
        given["alpha"] = torch.tensor([0.3, 0.8])
    if "noised" in kind:
        given["row_key"] = row_keys(torch.arange(CLIPS)[:, None] + 2**30, target_index, 1)
    if kind == "recorded":
        given["noise"] = normal(CLIPS, asked, width, dtype=dtype, seed=4)
    return {name: guarded(value) for name, value in given.items()}


def flat(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows as clips of other lengths, the first without targets."""
    rows = ("context", "context_index", "target_index", "targets", "row_key", "noise")
    given = {name: guarded(value.flatten(0, 1)) if name in rows else value for name, value in given.items()}
    seen, asked = len(given["context_index"]), len(given["target_index"])
    given["context_lengths"] = guarded(torch.tensor([0, seen // 2, seen], dtype=torch.int32))
    given["target_lengths"] = guarded(torch.tensor([0, 0, asked]))
    return given


NAMES = ("context", "context_index", "target_index", "table", "mask_token", "targets", "alpha", "row_key")


@pytest.mark.usefixtures("results_are_poisoned")
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("placed", [True, False], ids=["", "no table"])
def test_forward_is_as_exact_as_eager(placed: bool, dtype: torch.dtype, kind: str, ragged: bool) -> None:
    if ragged and "gathered" in kind:
        return
    for sizes in SIZES:
        given = inputs(kind, *sizes, dtype)
        if not placed:
            del given["table"]
        given = flat(given) if ragged else given

        def operands(given: dict[str, Tensor], context: Tensor) -> tuple:
            wide = context.dtype == torch.float64
            cast = {
                name: value.double() if wide and value.dtype.is_floating_point else value
                for name, value in given.items()
            }
            rest = (cast.get(name) for name in ("noise", "context_lengths", "target_lengths"))
            seed = torch.tensor(2**40 + 5) if "row_key" in given else None
            return context, *(cast.get(n) for n in NAMES[1:]), seed, *rest, 1e-5, "gathered" in kind, context.dtype

        results = kernels.assemble_tokens(*operands(given, given["context"]))
        for part, result in enumerate(results):
            if result.numel():

                def expected(context: Tensor, given=given, part: int = part) -> Tensor:
                    return reference.assemble_tokens(*operands(given, context))[part]

                check(lambda context, result=result: result, expected, given["context"])
        assert all(intact(value) for value in given.values())


@pytest.mark.usefixtures("results_are_poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seen", "asked", "width"), [(1, 1, 24), (7, 33, 40), (3, 300, 24), (0, 7, 3), (4, 0, 65)])
def test_sums_over_target_rows_are_as_exact_as_eager(dtype: torch.dtype, seen: int, asked: int, width: int) -> None:
    gradient = guarded(normal(CLIPS, seen + asked, width, dtype=dtype))
    rows = guarded(normal(3 * (seen + asked), width, dtype=dtype))
    seen_of = guarded(torch.tensor([0, 2 * seen, 2 * seen, 3 * seen]))
    asked_of = guarded(torch.tensor([0, asked // 2, 3 * asked, 3 * asked], dtype=torch.int32))
    for source, lengths, context, clips in (
        (gradient, (None, None), seen, CLIPS),
        (rows, (seen_of, asked_of), 3 * seen, 3),
    ):

        def run(impl, g: Tensor, lengths=lengths, context: int = context, clips: int = clips) -> Tensor:
            return impl.sum_of_targets(g, context, clips, *lengths)

        check(lambda g: run(kernels, g), lambda g: run(reference, g), source)
        assert run(kernels, source).equal(run(kernels, source))
    assert all(intact(t) for t in (gradient, rows, seen_of, asked_of))


def gradients(kind: str, ragged: bool, impl: str, change=lambda given: given) -> list[Tensor]:
    given = change(inputs(kind, 5, 7, 40))
    given = flat(given) if ragged else given
    names = [name for name in ("context", "mask_token", "targets") if name in given]
    learned = [given[name].detach().requires_grad_() for name in names]
    if "row_key" in given:
        given["seed"] = torch.tensor(3)
    out = assemble_tokens(**given | dict(zip(names, learned)), gather_targets="gathered" in kind, impl=impl)
    (out * normal(*out.shape, seed=9)).sum().backward()
    return [out, *(x.grad for x in learned)]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_public_function(kind: str, ragged: bool) -> None:
    if ragged and "gathered" in kind:
        return
    ours, theirs = (gradients(kind, ragged, impl) for impl in ("triton", "reference"))
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert all(one.equal(other) for one, other in zip(ours, gradients(kind, ragged, "triton")))


@pytest.mark.parametrize("kind", ["token", "ready", "noised", "noised gathered"])
def test_strided_inputs_and_int32_indices(kind: str) -> None:
    def strided(given: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in ("context", "targets"):
            if name in given:
                x = given[name]
                wide = torch.full((x.shape[1], x.shape[0], 2 * x.shape[2] + 3), float("nan"))
                wide[:, :, 3 : x.shape[2] + 3] = x.transpose(0, 1)
                given[name] = wide.transpose(0, 1)[:, :, 3 : x.shape[2] + 3]
        for name in ("context_index", "target_index"):
            given[name] = given[name].int().T.contiguous().T
        given["table"] = given["table"].T.contiguous().T
        return given

    for ours, theirs in zip(gradients(kind, False, "triton", strided), gradients(kind, False, "triton")):
        assert ours.equal(theirs)


@pytest.mark.parametrize("tile", [64, 256, 4096])
def test_tiles_change_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    def pure_noise(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return given | {"alpha": torch.zeros(CLIPS), "table": torch.nan_to_num(given["table"])}

    whole, _, _ = gradients("noised", False, "triton", pure_noise)
    token = gradients("token", True, "triton")
    monkeypatch.setitem(config._forced, "philox_normal", {"ROWS": max(1, tile // 64)})
    monkeypatch.setitem(config._forced, "assemble_sum", {"SPLITS": 3})
    assert gradients("noised", False, "triton", pure_noise)[0].equal(whole)
    for ours, theirs in zip(gradients("token", True, "triton"), token):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_public_function_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for module, name in (
        (kernels, "assemble_tokens"),
        (kernels, "sum_of_targets"),
        (noise_kernels, "noise_backward"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real: ran.append(name) or real(*a))
    gradients("token", False, "auto")
    gradients("noised", True, "auto")
    assert ran == ["assemble_tokens", "sum_of_targets", "assemble_tokens", "noise_backward"]


def test_what_triton_does_not_take_is_refused() -> None:
    given = inputs("token", 2, 2, 8193)
    with pytest.raises(ValueError, match="at most 8192 channels"):
        assemble_tokens(**given, impl="triton")
    given = inputs("token", 2, 2, 8)
    with pytest.raises(ValueError, match="float64"):
        assemble_tokens(**given | {"table": given["table"].double()}, impl="triton")
