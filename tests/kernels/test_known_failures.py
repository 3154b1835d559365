"""What a library is known to get wrong: such calls go elsewhere, with the reason, and all others stay."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend

from fastjepa_kernels import attention, explain_attention
from fastjepa_kernels import attention_backends as backends
from fastjepa_kernels import attention_dispatch as dispatch

TOLD = "its backward pass gives NaN with a mask and N mod 128 = 64 keys since torch 2.11 (pytorch issue 196678)"


def on_a_gpu(keys=192, masked=True, device="cuda", wanted=True, **more):
    """Reasons see the device, dtype and strides of tensors alone: a stand-in shows those of a GPU."""
    x = SimpleNamespace(device=SimpleNamespace(type=device, index=0), dtype=torch.bfloat16, shape=(2, keys, 3, 64),
                        requires_grad=wanted, stride=lambda dim: 1, transpose=lambda *dims: x)  # fmt: skip
    return backends.Inputs(x, x, x, 0.125, None, 0, None, 0, None, None, False, masked=masked)._replace(**more)


@pytest.fixture
def able(monkeypatch):
    """A torch whose kernels take everything."""
    for name in ("cudnn", "flash", "efficient"):
        able = backends.BACKENDS[name]._replace(why_not=lambda inputs: [])
        monkeypatch.setitem(backends.BACKENDS, name, able)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")


@pytest.mark.parametrize("keys", [64, 192, 704, 1088])
def test_cudnn_never_has_half_a_tile_behind_a_mask(able, keys):
    assert backends.why_not("cudnn", on_a_gpu(keys)) == [TOLD]
    assert backends.why_not("sdpa", on_a_gpu(keys)) == [f"torch may choose cudnn: {TOLD}"]
    assert dispatch._choose(on_a_gpu(keys), "auto") == "flash"
    with pytest.raises(ValueError, match="backend='cudnn' was asked for, but its backward pass gives NaN"):
        dispatch._choose(on_a_gpu(keys), "cudnn")


@pytest.mark.parametrize(
    "inputs",
    [
        {"masked": False},  # what every dense call of `attention` is
        {"wanted": False},
        {"device": "xpu"},
        *({"keys": 128 + n} for n in (0, 1, 8, 32, 63, 65, 72, 120)),
    ],
    ids=str,
)
def test_other_calls_stay_where_they_are(able, inputs):
    assert backends.known_failures("cudnn", on_a_gpu(**inputs)) == []
    assert backends.known_failures("sdpa", on_a_gpu(**inputs)) == []
    if on_a_gpu(**inputs).q.device.type == "cuda":
        assert dispatch._choose(on_a_gpu(**inputs), "auto") == "sdpa"


def test_the_version_of_the_library_counts(able, monkeypatch):
    for version, fails in (("2.9.1", False), ("2.10.0+cu128", False), ("2.11.0a0+git1", True), ("2.13.1", True)):
        monkeypatch.setattr(torch, "__version__", version)
        assert (backends.why_not("cudnn", on_a_gpu()) == [TOLD]) is fails, version
    seen = []
    entry = backends.KnownFailure(lambda inputs, version: seen.append(version) or version < (0, 0, 32), "it errs")
    monkeypatch.setitem(backends.KNOWN_FAILURES, "xformers", (entry,))
    stub = ModuleType("xformers")
    stub.__version__ = "0.0.31.post1"
    for name in ("xformers", "xformers.ops", "xformers.ops.fmha"):
        monkeypatch.setitem(sys.modules, name, stub)
    assert backends.known_failures("xformers", on_a_gpu()) == ["it errs"]
    assert seen == [(0, 0, 31)]


def test_compiled_code_never_asks_for_the_remainder(able, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert {len(backends.known_failures("cudnn", on_a_gpu(keys))) for keys in range(128, 256)} == {1}
    assert backends.known_failures("cudnn", on_a_gpu(masked=False)) == []


@pytest.mark.parametrize("longest", [192, 200])
def test_padded_clips_leave_it_out_of_what_torch_chooses_from(able, monkeypatch, longest):
    """Clips with a mask, the only calls that have one: torch still chooses, from the other kernels."""
    entered, mask = [], []
    real = backends.sdpa_kernel
    library = backends.F.scaled_dot_product_attention
    monkeypatch.setattr(backends, "sdpa_kernel", lambda chosen: entered.append(chosen) or real(chosen))
    monkeypatch.setattr(
        backends.F, "scaled_dot_product_attention",
        lambda *qkv, attn_mask, scale: mask.append(attn_mask) or library(*qkv, attn_mask=attn_mask, scale=scale),
    )  # fmt: skip
    fails = backends.KNOWN_FAILURES["cudnn"][0].fails
    elsewhere = SimpleNamespace(device=SimpleNamespace(type="cuda"))

    def as_on_a_gpu(inputs, version):
        return fails(on_a_gpu(inputs.k.shape[1], masked=inputs.masked, q=elsewhere, wanted=True), version)

    # `differentiated` reads q: the stand-in wants a gradient too.
    elsewhere.requires_grad = True
    entry = backends.KnownFailure(as_on_a_gpu, TOLD)
    monkeypatch.setitem(backends.KNOWN_FAILURES, "cudnn", (entry,))
    q = torch.randn(7, 2, 16)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    attention(q, q, q, cu_seqlens=starts, max_length=longest)
    sound = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    assert entered == ([sound] if longest % 128 == 64 else [])
    assert mask[0].shape[-1] == longest


def test_a_new_entry_excludes_its_backend_everywhere_with_its_sentence(monkeypatch):
    q = torch.randn(1, 8, 2, 16)
    assert "chosen: sdpa" in explain_attention(q, q, q)
    entry = backends.KnownFailure(lambda inputs, version: inputs.q.shape[-1] == 16, "it errs at heads of 16")
    monkeypatch.setitem(backends.KNOWN_FAILURES, "flash", (entry,))
    told = explain_attention(q, q, q)
    assert "chosen: math" in told
    assert "  flash: no: it errs at heads of 16" in told
    assert "  sdpa: no: torch may choose flash: it errs at heads of 16" in told
    wide = torch.randn(1, 8, 2, 24)
    assert "chosen: sdpa" in explain_attention(wide, wide, wide)


def test_entries_name_backends_and_are_sentences():
    assert set(backends.KNOWN_FAILURES) <= set(backends.BACKENDS)
    for entries in backends.KNOWN_FAILURES.values():
        assert all(len(entry.told) > 30 for entry in entries)


def test_padded_clips_compile_whole_without_the_kernel(monkeypatch):
    torch._dynamo.reset()
    entry = backends.KnownFailure(lambda inputs, version: inputs.masked, "it errs with a mask")
    monkeypatch.setitem(backends.KNOWN_FAILURES, "cudnn", (entry,))
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    for rows in (7, 70, 200):
        q = torch.randn(rows, 2, 16).requires_grad_()
        starts = torch.tensor([0, 3, rows], dtype=torch.int32)
        splits = {"cu_seqlens": starts, "max_length": rows}
        torch.testing.assert_close(run(q, q, q, **splits), attention(q, q, q, **splits))
    assert counter.frame_count == 1
