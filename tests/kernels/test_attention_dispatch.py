"""`attention`: every backend that runs here against a plain softmax, the reasons of the others, and the choice."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastjepa_kernels import attention, explain_attention
from fastjepa_kernels import attention_backends as backends
from fastjepa_kernels import attention_dispatch as dispatch

NAMES = ("sdpa", "cudnn", "flash", "efficient", "math", "varlen", "xformers", "indexed", "padded")
LENGTHS, KV_LENGTHS = (3, 0, 7, 1, 2), (4, 2, 1, 0, 9)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(rows: int = 5, keys: int = 7, heads: int = 3, size: int = 16, dtype=torch.float32) -> list[Tensor]:
    return [normal(2, n, heads, size, dtype=dtype, seed=n + i) for i, n in enumerate((rows, keys, keys))]


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def ragged(cross: bool, dtype=torch.float32, size: int = 16) -> tuple[list[Tensor], dict]:
    """Clips of several lengths, one of them empty; with `cross` the keys are split in another way."""
    keys = KV_LENGTHS if cross else LENGTHS
    qkv = [normal(sum(n), 3, size, dtype=dtype, seed=i) for i, n in enumerate((LENGTHS, keys, keys))]
    splits = {"cu_seqlens": starts(LENGTHS), "max_length": max(LENGTHS)}
    if cross:
        splits |= {"kv_cu_seqlens": starts(keys), "kv_max_length": max(keys)}
    return qkv, splits


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of one clip, [M, H, d]; rows without keys are 0."""
    if not len(k):
        return q * 0
    scores = torch.einsum("mhd,nhd->hmn", q, k) * scale
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("hmn,nhd->mhd", weights, v)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, cross: bool = False) -> Tensor:
    """Clip by clip."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.ndim == 4:
        return torch.stack([softmax_attention(*clip, scale) for clip in zip(q, k, v)])
    keys = KV_LENGTHS if cross else LENGTHS
    clips = zip(q.split(LENGTHS), k.split(keys), v.split(keys))
    return torch.cat([softmax_attention(*clip, scale) for clip in clips])


def gradients(run, inputs: list[Tensor]) -> list[Tensor]:
    """The result and its gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    out.backward(normal(*out.shape, seed=9).to(out.dtype))
    return [out, *(x.grad for x in leaves)]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flash", "math"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("size", [16, 24, 7])
def test_dense_clips(backend, scale, size):
    qkv = dense(size=size)
    ours = gradients(lambda *x: attention(*x, scale=scale, backend=backend), qkv)
    for mine, other in zip(ours, gradients(lambda *x: plain(*x, scale=scale), qkv)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "padded"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("deterministic", [False, True])
def test_ragged_clips_with_an_empty_one(backend, cross, scale, deterministic):
    qkv, splits = ragged(cross)
    more = {"scale": scale, "backend": backend, "deterministic": deterministic}
    ours = gradients(lambda *x: attention(*x, **splits, **more), qkv)
    for mine, other in zip(ours, gradients(lambda *x: plain(*x, scale, cross), qkv)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    if cross:  # the fourth clip has no keys
        assert ours[0][sum(LENGTHS[:3])].count_nonzero() == 0


@pytest.mark.parametrize("cross", [False, True])
def test_the_padding_may_be_longer_than_any_clip_and_nothing_of_other_clips_leaks(cross):
    qkv, splits = ragged(cross)
    expected = attention(*qkv, **splits)
    for name in splits:
        if name.endswith("max_length"):
            splits[name] += 5
    torch.testing.assert_close(attention(*qkv, **splits), expected, rtol=1e-5, atol=1e-6)
    keys = KV_LENGTHS if cross else LENGTHS
    for x, n in zip(qkv, (LENGTHS, keys, keys)):
        x[: n[0]] = float("nan")
    out, *grads = gradients(lambda *x: attention(*x, **splits), qkv)
    torch.testing.assert_close(out[LENGTHS[0] :], expected[LENGTHS[0] :], rtol=1e-5, atol=1e-6)
    assert grads[0][LENGTHS[0] :].isfinite().all()
    assert grads[1][keys[0] :].isfinite().all()
    assert grads[2][keys[0] :].isfinite().all()


def test_gradients_are_the_derivatives():
    qkv, splits = ragged(True, torch.float64, size=2)
    leaves = [x.requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **splits), leaves, fast_mode=True)


def test_strided_inputs_of_a_packed_projection_and_no_rows_at_all():
    packed = normal(2, 6, 3, 4, 16)
    q, k, v = packed.unbind(2)
    torch.testing.assert_close(attention(q, k, v), plain(q, k, v), rtol=1e-4, atol=1e-5)
    flat = normal(13, 3, 4, 16)
    _, splits = ragged(False)
    q, k, v = flat.unbind(1)
    torch.testing.assert_close(attention(q, k, v, **splits), plain(q, k, v), rtol=1e-4, atol=1e-5)
    none = normal(0, 3, 16)
    zeros = torch.zeros(3, dtype=torch.int32)
    assert attention(none, none, none, cu_seqlens=zeros, max_length=1).shape == (0, 3, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    qkv, splits = ragged(False, dtype)
    assert attention(*qkv, **splits).dtype == dtype
    torch.testing.assert_close(
        attention(*qkv, **splits).float(), plain(*(x.float() for x in qkv)), rtol=3e-2, atol=3e-2
    )


class HostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cross", [False, True])
def test_the_host_reads_no_value_and_leaves_every_switch_alone(cross):
    def switches() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        return (
            cuda.flash_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        )

    qkv, splits = ragged(cross)
    before = switches()
    with HostReads():
        gradients(lambda *x: attention(*x, **splits), qkv)
        gradients(lambda *x: attention(*x, backend="math"), dense())
        explain_attention(*qkv, **splits)
    assert switches() == before


def test_a_clip_of_length_zero_gives_no_nan_to_anyone(monkeypatch):
    library = backends.F.scaled_dot_product_attention

    def wary(*qkv, attn_mask, scale):
        assert attn_mask.any(-1).all()  # kernels differ in what they make of a row that may see nothing
        return library(*qkv, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(backends.F, "scaled_dot_product_attention", wary)
    qkv, splits = ragged(True)
    assert all(x.isfinite().all() for x in gradients(lambda *x: attention(*x, **splits), qkv))


def test_compiles_whole():
    torch._dynamo.reset()
    run = torch.compile(attention, fullgraph=True, backend="aot_eager")
    qkv, splits = ragged(True)
    for mine, other in zip(
        gradients(lambda *x: run(*x, **splits), qkv), gradients(lambda *x: attention(*x, **splits), qkv)
    ):
        torch.testing.assert_close(mine, other)
    for name in ("auto", "math"):
        ours = gradients(lambda *x, name=name: run(*x, backend=name), dense())
        for mine, other in zip(ours, gradients(lambda *x: attention(*x), dense())):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_few_recompiles_over_many_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(attention, fullgraph=True, backend=counter)
    for length in range(2, 22):
        qkv = dense(length, length + 1)
        torch.testing.assert_close(run(*qkv), plain(*qkv), rtol=1e-4, atol=1e-5)
        lengths = (length, 1, 5)
        flat = [normal(sum(lengths), 3, 16, seed=n) for n in range(3)]
        splits = {"cu_seqlens": starts(lengths), "max_length": length + 4}
        expected = torch.cat([softmax_attention(*clip, 0.25) for clip in zip(*(x.split(lengths) for x in flat))])
        torch.testing.assert_close(run(*flat, **splits), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 4  # of each form, one of one length and one of all


def test_repeats_bit_by_bit():
    qkv, splits = ragged(True)
    one, two = (gradients(lambda *x: attention(*x, **splits), qkv) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one, two))


def test_every_backend_is_there_and_every_order_names_some():
    assert tuple(backends.BACKENDS) == NAMES
    for entry in dispatch.ORDER.values():
        assert set(entry["order"].split()) <= set(NAMES)
        assert entry["source"] == "static"
        assert "indexed" not in entry["order"]


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("cudnn", "needs a CUDA device, got cpu"),
        ("efficient", "needs a CUDA device, got cpu"),
        ("varlen", "takes ragged clips.*needs a CUDA device.*float16 and bfloat16"),
        ("xformers", "not installed"),
        ("indexed", "heads of 16, 24, ... 128, got 20"),
        ("padded", "takes ragged clips"),
    ],
)
def test_a_backend_that_was_asked_for_runs_or_says_why_not(backend, words):
    with pytest.raises(ValueError, match=f"backend='{backend}' was asked for, but .*{words}"):
        attention(*dense(size=20), backend=backend)


@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "flash", "efficient", "math"])
def test_dense_backends_refuse_ragged_clips(backend):
    qkv, splits = ragged(False)
    with pytest.raises(ValueError, match="takes dense clips, got cu_seqlens"):
        attention(*qkv, **splits, backend=backend)


def test_channels_that_are_not_neighbours():
    qkv = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in dense()]
    with pytest.raises(ValueError, match="neighbouring channels"):
        attention(*qkv, backend="flash")
    torch.testing.assert_close(attention(*qkv), plain(*qkv), rtol=1e-4, atol=1e-5)


def test_where_nothing_fits_every_backend_gives_every_reason(monkeypatch):
    monkeypatch.setitem(dispatch.ORDER, ("other", "dense"), {"order": "cudnn varlen", "source": "static"})
    with pytest.raises(ValueError, match="no backend of the order") as raised:
        attention(*dense())
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(NAMES)
    assert "it takes ragged clips, got no cu_seqlens; it needs a CUDA device, got cpu; " in lines[6]
    assert lines[5] == "  math: fits, and runs when asked for by name"


def on_a_gpu(**changes):
    """Reasons see the device, dtype and strides of tensors alone: a stand-in shows those of a GPU."""
    x = SimpleNamespace(device=SimpleNamespace(type="cuda", index=0), dtype=torch.bfloat16, shape=(2, 5, 3, 64),
                        requires_grad=True, stride=lambda dim: 1, transpose=lambda *dims: x)  # fmt: skip
    vars(x).update(changes)
    return backends.Inputs(x, x, x, 0.125, None, 0, None, 0, None, None, False)


def test_a_deterministic_backward_pass_leaves_cudnn_out(monkeypatch):
    asked, params = [], SimpleNamespace
    for name in ("cudnn", "flash", "efficient"):
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{name}_attention", lambda p, debug: asked.append(p) or True)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *given: params(given=given))
    fused = backends.BACKENDS
    loose, strict = on_a_gpu(), on_a_gpu()._replace(deterministic=True)
    assert fused["sdpa"].why_not(loose) == []
    assert "may choose cuDNN" in fused["sdpa"].why_not(strict)[0]
    assert "does not repeat" in fused["cudnn"].why_not(strict)[0]
    assert "use_deterministic_algorithms" in fused["flash"].why_not(strict)[0]
    assert dispatch._choose(strict, "auto") == "math"
    torch.use_deterministic_algorithms(True)
    try:
        assert fused["sdpa"].why_not(strict) == []
        assert "does not repeat" in fused["cudnn"].why_not(strict)[0]
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_varlen_takes_is_asked_of_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    flat = on_a_gpu(shape=(13, 3, 64))._replace(cu_seqlens=starts(LENGTHS), kv_cu_seqlens=starts(LENGTHS))
    order = dispatch.ORDER["cuda", "ragged"]["order"].split()
    assert order[0] == "varlen"
    assert dispatch._choose(flat, "auto") == "varlen"
    assert "8, 16, ... 256" in backends.BACKENDS["varlen"].why_not(on_a_gpu(shape=(13, 3, 20)))[-1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert backends.BACKENDS["varlen"].why_not(flat) == ["it needs compute capability 8.0"]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert "missing in this torch" in backends.BACKENDS["varlen"].why_not(flat)[0]
    assert dispatch._choose(flat, "auto") == "padded"
    old = ModuleType("torch.nn.attention.varlen")
    old.varlen_attn = lambda q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: q
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", old)
    assert "takes no scale" in backends.BACKENDS["varlen"].why_not(flat)[0]


def test_varlen_gets_its_arguments_in_their_places(monkeypatch):
    seen = {}
    stub = ModuleType("torch.nn.attention.varlen")
    stub.varlen_attn = lambda q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None: seen.update(locals()) or q
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stub)
    (q, k, v), splits = ragged(True)
    inputs = dispatch._inputs(q, k, v, 0.5, *splits.values(), None, None, False)
    assert backends.BACKENDS["varlen"].run(inputs) is q
    assert (seen["k"], seen["v"], seen["cu_seq_k"]) == (k, v, splits["kv_cu_seqlens"])
    assert (seen["max_q"], seen["max_k"], seen["scale"]) == (max(LENGTHS), max(KV_LENGTHS), 0.5)


@pytest.fixture(params=[True, False])
def xformers(request, monkeypatch):
    """Stands for xformers with its documented names; computes clip by clip."""
    fmha, calls = ModuleType("xformers.ops.fmha"), []

    class Mask:
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            made = cls()
            made.q, made.k, made.device = q_seqlen, kv_seqlen or q_seqlen, device
            return made

        @classmethod
        def older(cls, q_seqlen, kv_seqlen=None):
            return cls.from_seqlens(q_seqlen, kv_seqlen)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        calls.append(attn_bias)
        if attn_bias is None:
            return plain(query, key, value, scale)
        assert isinstance(attn_bias, Mask)
        assert query.shape[0] == 1
        clips = zip(query[0].split(attn_bias.q), key[0].split(attn_bias.k), value[0].split(attn_bias.k))
        return torch.cat([softmax_attention(*clip, scale) for clip in clips]).unsqueeze(0)

    masks = Mask if request.param else SimpleNamespace(from_seqlens=Mask.older)
    fmha.attn_bias = SimpleNamespace(BlockDiagonalMask=masks)
    fmha.memory_efficient_attention = memory_efficient_attention
    fmha.ALL_FW_OPS = [
        SimpleNamespace(NAME="smallF", SUPPORTED_DEVICES={"cpu"}, is_available=lambda: True),
        SimpleNamespace(NAME="fa3F", SUPPORTED_DEVICES={"cuda"}, is_available=lambda: False),
    ]
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)
    fmha.calls = calls
    return fmha


def test_xformers_takes_dense_clips_and_ragged_ones_with_lengths_of_the_host(xformers):
    qkv = dense()
    torch.testing.assert_close(attention(*qkv, scale=0.3, backend="xformers"), plain(*qkv, scale=0.3))
    lengths, keys = (3, 1, 7), (2, 4, 5)
    q, k, v = (normal(sum(n), 3, 16, seed=i) for i, n in enumerate((lengths, keys, keys)))
    splits = {"cu_seqlens": starts(lengths), "max_length": 7, "kv_cu_seqlens": starts(keys), "kv_max_length": 5}
    ours = attention(q, k, v, **splits, lengths=lengths, kv_lengths=keys, backend="xformers")
    torch.testing.assert_close(ours, attention(q, k, v, **splits), rtol=1e-4, atol=1e-5)
    assert xformers.calls[0] is None
    assert (xformers.calls[1].q, xformers.calls[1].k) == (list(lengths), list(keys))
    same = {"cu_seqlens": starts(lengths), "max_length": 7, "lengths": lengths}
    torch.testing.assert_close(attention(q, q, q, **same, backend="xformers"), attention(q, q, q, **same))


def test_reasons_of_xformers(xformers):
    qkv, splits = ragged(False)
    with pytest.raises(ValueError, match="needs lengths"):
        attention(*qkv, **splits, backend="xformers")
    with pytest.raises(ValueError, match="a clip is empty"):
        attention(*qkv, **splits, lengths=LENGTHS, backend="xformers")
    with pytest.raises(ValueError, match="float64"):
        attention(*dense(dtype=torch.float64), backend="xformers")
    with pytest.raises(ValueError, match="no backward pass that repeats"):
        attention(*(x.requires_grad_() for x in dense()), backend="xformers", deterministic=True)
    assert "xformers: fits, and runs when asked for by name [operators: smallF]" in explain_attention(*dense())
    xformers.ALL_FW_OPS[0].SUPPORTED_DEVICES = {"cuda"}
    with pytest.raises(ValueError, match="that load take cuda, got cpu"):
        attention(*dense(), backend="xformers")
    del xformers.memory_efficient_attention
    with pytest.raises(ValueError, match="no memory_efficient_attention"):
        attention(*dense(), backend="xformers")


def test_indexed_attention_runs_by_name():
    qkv = dense()
    torch.testing.assert_close(attention(*qkv, backend="indexed"), plain(*qkv))
    qkv, splits = ragged(False)
    torch.testing.assert_close(attention(*qkv, **splits, backend="indexed"), plain(*qkv))
    qkv, splits = ragged(True)
    with pytest.raises(ValueError, match="takes no kv_cu_seqlens"):
        attention(*qkv, **splits, backend="indexed")


def test_explanations():
    lines = explain_attention(*dense()).splitlines()
    assert lines[0] == "attention: dense, q [2, 5, 3, 16], k [2, 7, 3, 16], float32 on cpu"
    assert lines[1] == "chosen: sdpa, the first that fits of sdpa, math (order: static)"
    assert [line.split(":")[0].strip() for line in lines[2:]] == list(NAMES)
    assert lines[2] == "  sdpa: runs"
    assert "  math: fits, and stands later in the order" in lines
    assert "  cudnn: no: it needs a CUDA device, got cpu" in lines
    named = explain_attention(*dense(), backend="math", deterministic=True).splitlines()
    assert named[0].endswith(", deterministic")
    assert named[1] == "chosen: math, asked for by name"
    qkv, splits = ragged(True)
    assert "chosen: padded, the first that fits of padded" in explain_attention(*qkv, **splits)


def test_flops_are_those_of_the_library():
    with FlopCounterMode(display=False) as counter:
        attention(*dense(), backend="math")
    assert counter.get_total_flops() == 4 * 2 * 3 * 5 * 7 * 16
