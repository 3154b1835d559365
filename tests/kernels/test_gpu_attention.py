"""Every backend of `attention` on a GPU, at the lengths and scores where libraries are known to break.

Lengths leave every multiple of 8 over 128, scores reach +-60, or are all near -120, where the log-sum-exp of a row is
below what exp takes in float32. A backend that fails here gets an entry in `KNOWN_FAILURES` (attention_backends.py).
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import attention
from fastjepa_kernels import attention_backends as backends
from fastjepa_kernels import attention_dispatch as dispatch

SHORT = 40  # rows of the second clip of ragged calls
HEADS = 2
# Three times the error of fused forms that round weights but not scores; one that rounds scores is far above it.
BOUND = {torch.bfloat16: 0.006, torch.float16: 0.0008}


def inputs_of(rows: int, size: int, scores: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v and the gradient of the result: [rows, H, d], rounded to the dtype, scores as their name says."""
    generator = torch.Generator().manual_seed(rows + size)
    q, k, v, grad = (torch.randn(rows, HEADS, size, generator=generator) for _ in range(4))
    if scores == "large":
        most = torch.einsum("mhd,nhd->hmn", q, k).abs().max() * size**-0.5
        q = q * (60 / most)
    else:
        q, k = 0.1 * q, 0.1 * k
        q[..., 0], k[..., 0] = 1.0, -120 * size**0.5
    return [x.to(device, dtype) for x in (q, k, v, grad)]


class Exact(NamedTuple):
    """Results in float32, and for each the same sum over absolute values: what its rounding errors grow with."""

    values: list[Tensor]
    sizes: list[Tensor]


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths: tuple[int, ...]) -> Exact:
    """Result, dq, dk and dv from the same rounded inputs, clip by clip. Nothing cancels in the sizes: P (|dP| + |D|)
    stands for dS = P (dP - D), D the row sums of P dP."""
    scale = q.shape[-1] ** -0.5
    clips = []
    for a, b, c, g in zip(*(x.float().split(lengths) for x in (q, k, v, grad))):
        p = (torch.einsum("mhd,nhd->hmn", a, b) * scale).softmax(-1)
        dp = torch.einsum("mhd,nhd->hmn", g, c)
        d = (p * dp).sum(-1, keepdim=True)
        # Of absolute values, not the absolute value of the sum: a fused kernel rounds its terms.
        pairs = ((p * (dp - d), b, a, c, g), (p * (dp.abs() + d.abs()), b.abs(), a.abs(), c.abs(), g.abs()))
        for ds, keys, queries, values, grads in pairs:
            clips.append(
                [
                    torch.einsum("hmn,nhd->mhd", p, values),
                    torch.einsum("hmn,nhd->mhd", ds, keys) * scale,
                    torch.einsum("hmn,mhd->nhd", ds, queries) * scale,
                    torch.einsum("hmn,mhd->nhd", p, grads),
                ]
            )
    return Exact(*([torch.cat(parts) for parts in zip(*clips[side::2])] for side in (0, 1)))


def off_by(mine: Tensor, true: Tensor, size: Tensor) -> float:
    """The largest error of a channel, as a share of its size."""
    return float(((mine.float() - true).norm(dim=(0, 1)) / size.norm(dim=(0, 1))).max())


def called(backend: str, form: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths: tuple[int, ...]) -> list:
    """The backend's result and gradients; a sentence where it says that it cannot take the inputs."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    more = {}
    if form == "ragged":
        starts = torch.tensor([0, *lengths], device=q.device).cumsum(0).int()
        more = {"cu_seqlens": starts, "max_length": max(lengths), "lengths": lengths}
    given = leaves if form == "ragged" else [x.unsqueeze(0) for x in leaves]
    splits = (more.get("cu_seqlens"), more.get("max_length"), None, None, more.get("lengths"), None)
    reasons = [] if backend == "auto" else backends.why_not(backend, dispatch._inputs(*given, None, *splits, False))
    if reasons:
        return ["; ".join(reasons)]
    out = attention(*given, backend=backend, **more)
    out = out if form == "ragged" else out.squeeze(0)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def mistakes(
    backend: str, form: str, size: int, scores: str, dtype: torch.dtype, device: torch.device
) -> tuple[list[str], list[str]]:
    """(a line for each wrong tensor, reasons why the backend did not run), over all remainders."""
    wrong, refused = [], []
    for rest in range(0, 128, 8):
        length = 1024 + rest
        lengths = (length, SHORT) if form == "ragged" else (length,)
        inputs = inputs_of(sum(lengths), size, scores, dtype, device)
        found = called(backend, form, *inputs, lengths)
        if len(found) == 1:
            refused.append(f"N mod 128 = {rest}: {found[0]}")
            continue
        names = ("result", "dq", "dk", "dv")
        for name, mine, true, size_of in zip(names, found, *exact(*inputs, lengths), strict=True):
            place = f"N = {length}, N mod 128 = {rest}: {name}"
            if not mine.isfinite().all():
                wrong.append(f"{place} has {int((~mine.isfinite()).sum())} values that are not finite")
            elif (error := off_by(mine, true, size_of)) > BOUND[dtype]:
                wrong.append(f"{place} is {error:.2g} off, expected at most {BOUND[dtype]}")
    return wrong, refused


def check(backend, form, size, scores, dtype, device):
    """Fails with the entry that is missing; returns why the backend did not run, where it never did."""
    wrong, refused = mistakes(backend, form, size, scores, dtype, device)
    entry = (
        f"{backend} is wrong for {form} clips, heads of {size}, {scores} scores, {dtype}, torch {torch.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}. Add to KNOWN_FAILURES in attention_backends.py\n"
        f'    "{backend}": (KnownFailure(lambda inputs, version: <these conditions>, "<what goes wrong>"),)'
    )
    assert not wrong, entry + "\n" + "\n".join(wrong)
    return refused if len(refused) == 128 // 8 else []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scores", ["large", "negative"])
@pytest.mark.parametrize("size", [24, 64, 80])
@pytest.mark.parametrize("form", ["dense", "ragged"])
@pytest.mark.parametrize("backend", ["auto", *backends.BACKENDS])
def test_results_and_gradients_are_finite_and_right(backend, form, size, scores, dtype):
    refused = check(backend, form, size, scores, dtype, torch.device("cuda", torch.cuda.current_device()))
    if refused:
        assert backend != "auto", f"nothing takes these inputs: {refused[0]}"
        pytest.skip(f"the dispatcher says no: {backend}, {refused[0]}")


# The checks themselves, on a CPU.


@pytest.mark.parametrize(
    ("backend", "form", "size", "scores"),
    [("math", "dense", 24, "large"), ("flash", "dense", 64, "negative"), ("padded", "ragged", 24, "large")],
)
def test_what_runs_on_a_cpu_is_right_there(backend, form, size, scores):
    assert check(backend, form, size, scores, torch.bfloat16, torch.device("cpu")) == []


def test_a_backend_that_cannot_run_says_so_and_is_no_failure():
    (first, *_) = check("cudnn", "dense", 64, "large", torch.bfloat16, torch.device("cpu"))
    assert "it needs a CUDA device" in first


@pytest.mark.parametrize("fault", ["nan", "off"])
def test_a_backend_that_errs_at_one_remainder_is_told_with_the_entry_to_add(monkeypatch, fault):
    real = backends.BACKENDS["math"]

    def run(inputs):
        out = real.run(inputs)
        if inputs.k.shape[1] % 128 != 64:
            return out
        return out + (float("nan") if fault == "nan" else 0.2 * out)

    monkeypatch.setitem(backends.BACKENDS, "math", real._replace(run=run))
    with pytest.raises(AssertionError) as raised:
        check("math", "dense", 24, "large", torch.bfloat16, torch.device("cpu"))
    told = str(raised.value)
    assert "math is wrong for dense clips, heads of 24, large scores, torch.bfloat16" in told
    assert '"math": (KnownFailure(' in told
    assert "N = 1088, N mod 128 = 64: result" in told
    assert "mod 128 = 56" not in told
    entry = backends.KnownFailure(lambda inputs, version: inputs.k.shape[1] % 128 == 64, "it errs at half a tile")
    monkeypatch.setitem(backends.KNOWN_FAILURES, "math", (entry,))
    assert check("math", "dense", 24, "large", torch.bfloat16, torch.device("cpu")) == []
