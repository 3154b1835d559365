"""What `attention` chooses from: for each backend when it cannot run, in words, and the call.

A library is asked what it can do, by import, signature and its own questions; a version is compared only where nothing
else tells a right result from a wrong one.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastjepa_kernels.indexed import indexed_attention

# Before this one, cuDNN gives NaN for a clip without rows.
CUDNN_WITH_EMPTY_CLIPS = 92500


class Inputs(NamedTuple):
    """Checked arguments of `attention`; for ragged ones the splits of k and v are filled in."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    cu_seqlens: Tensor | None
    max_length: int
    kv_cu_seqlens: Tensor | None
    kv_max_length: int
    lengths: tuple[int, ...] | None
    kv_lengths: tuple[int, ...] | None
    deterministic: bool
    masked: bool = False  # an explicit mask goes to the library

    @property
    def ragged(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def differentiated(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))


class Backend(NamedTuple):
    """`why_not` gives reasons, none where it fits; `describe` what there is to say about the library itself."""

    why_not: Callable[[Inputs], list[str]]
    run: Callable[[Inputs], Tensor]
    describe: Callable[[], str] = lambda: ""


class KnownFailure(NamedTuple):
    """Calls for which a library gives wrong numbers: `fails` of the inputs and its version, and the reason in words."""

    fails: Callable[[Inputs, tuple[int, ...]], bool]
    told: str


def _half_a_tile_behind_a_mask(inputs: Inputs, torch_version: tuple[int, ...]) -> bool:
    """Where cuDNN's dq is NaN; the scores it takes besides (a row's log-sum-exp below -88.7) the host does not know."""
    # Number by number: dynamo of torch 2.11 does not compare the tuples.
    major, minor = torch_version[0], torch_version[1]
    since = major > 2 or (major == 2 and minor >= 11)
    affected = since and inputs.q.device.type == "cuda" and inputs.masked and inputs.differentiated
    # Lengths change from step to step, and code that asks for their remainder is compiled again for another one.
    return affected and (torch.compiler.is_compiling() or inputs.k.shape[1] % 128 == 64)


# By backend. An entry stands for a fact that can be stated as a condition: a report without one excludes nothing.
# tests/kernels/test_gpu_attention.py looks for further ones on a GPU.
KNOWN_FAILURES: dict[str, tuple[KnownFailure, ...]] = {
    "cudnn": (
        KnownFailure(
            _half_a_tile_behind_a_mask,
            "its backward pass gives NaN with a mask and N mod 128 = 64 keys since torch 2.11 (pytorch issue 196678)",
        ),
    ),
}


@torch.compiler.assume_constant_result
def _version(backend: str) -> tuple[int, ...]:
    """Of the library behind a backend, e.g. (2, 11, 0); none where it does not load."""
    text = str(torch.__version__)
    if backend == "xformers":
        text = "" if _fmha() is None else importlib.import_module("xformers").__version__
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def known_failures(backend: str, inputs: Inputs) -> list[str]:
    """Why a backend that would take these inputs must not have them."""
    if backend == "sdpa":
        found = [(kernel, told) for kernel in SDPA_KERNELS for told in known_failures(kernel, inputs)]
        return [f"torch may choose {kernel}: {told}" for kernel, told in found]
    version = _version(backend) if backend in KNOWN_FAILURES else ()
    return [one.told for one in KNOWN_FAILURES.get(backend, ()) if one.fails(inputs, version)]


def why_not(backend: str, inputs: Inputs) -> list[str]:
    """Every reason that keeps a backend from these inputs; none where it runs."""
    return BACKENDS[backend].why_not(inputs) + known_failures(backend, inputs)


def _where(*reasons: tuple[bool, str]) -> list[str]:
    return [reason for holds, reason in reasons if holds]


def _unrepeatable(inputs: Inputs) -> tuple[bool, str]:
    loose = inputs.q.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
    return (
        inputs.deterministic and inputs.differentiated and loose,
        "its backward pass repeats only under torch.use_deterministic_algorithms(True)",
    )


DENSE_ONLY = "it takes dense clips, got cu_seqlens"
RAGGED_ONLY = "it takes ragged clips, got no cu_seqlens"


def _sdpa(inputs: Inputs, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=inputs.scale).transpose(1, 2)


def _why_not_sdpa(inputs: Inputs) -> list[str]:
    loose = inputs.q.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
    return _where(
        (inputs.ragged, DENSE_ONLY),
        (inputs.deterministic and loose, "torch may choose cuDNN, whose backward pass does not repeat"),
    )


def _why_not_kernel(inputs: Inputs, backend: SDPBackend, ask: Callable[..., bool] | None) -> list[str]:
    """Of one fused kernel of SDPA: torch's own answer where it gives one."""
    q, k, v = inputs.q, inputs.k, inputs.v
    reasons = _where(
        (inputs.ragged, DENSE_ONLY),
        (any(x.stride(-1) != 1 for x in (q, k, v)), "it needs neighbouring channels in q, k and v"),
    )
    if backend == SDPBackend.CUDNN_ATTENTION and inputs.deterministic:
        reasons.append("its backward pass does not repeat")
    elif _unrepeatable(inputs)[0]:
        reasons.append(_unrepeatable(inputs)[1])
    if q.device.type != "cuda":
        if backend != SDPBackend.FLASH_ATTENTION or q.device.type != "cpu":
            reasons.append(f"it needs a CUDA device, got {q.device.type}")
    elif not reasons and ask is not None and not torch.compiler.is_compiling():
        params: Any = torch.backends.cuda.SDPAParams
        if not ask(params(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, 0.0, False, False), False):
            reasons.append(f"torch.backends.cuda.{ask.__name__} says no (its debug=True prints why)")
    return reasons


def _kernel(backend: SDPBackend, question: str | None) -> Backend:
    ask = None if question is None else getattr(torch.backends.cuda, question, None)

    def run(inputs: Inputs) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(inputs)

    return Backend(lambda inputs: _why_not_kernel(inputs, backend, ask), run)


def _why_not_math(inputs: Inputs) -> list[str]:
    return _where((inputs.ragged, DENSE_ONLY))


def _math(inputs: Inputs) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _sdpa(inputs)


@torch.compiler.assume_constant_result
def _varlen_takes() -> tuple[str, ...]:
    """Names of the arguments of torch's varlen attention; none where it is missing."""
    try:
        return tuple(inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn).parameters)
    except (ImportError, AttributeError):
        return ()


@torch.compiler.assume_constant_result
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _why_not_varlen(inputs: Inputs) -> list[str]:
    q, known = inputs.q, _varlen_takes()
    on_gpu = q.device.type == "cuda"
    return _where(
        (not known, "torch.nn.attention.varlen is missing in this torch"),
        (bool(known) and "scale" not in known, "that of this torch takes no scale"),
        (not inputs.ragged, RAGGED_ONLY),
        (not on_gpu, f"it needs a CUDA device, got {q.device.type}"),
        (on_gpu and _capability(q.device.index or 0) < (8, 0), "it needs compute capability 8.0"),
        (q.dtype not in (torch.float16, torch.bfloat16), f"it takes float16 and bfloat16, got {q.dtype}"),
        (q.shape[-1] % 8 != 0 or q.shape[-1] > 256, f"it takes heads of 8, 16, ... 256, got {q.shape[-1]}"),
        _unrepeatable(inputs),
    )


@torch.compiler.assume_constant_result
def _old_cudnn() -> bool:
    return (torch.backends.cudnn.version() or 0) < CUDNN_WITH_EMPTY_CLIPS


def _varlen(inputs: Inputs) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert inputs.cu_seqlens is not None
    # Newer ones try cuDNN first and obey this choice; the host does not know whether a clip is empty.
    flash_only = inputs.deterministic or _old_cudnn()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash_only else nullcontext():
        out = varlen_attn(
            inputs.q, inputs.k, inputs.v, inputs.cu_seqlens, inputs.kv_cu_seqlens, inputs.max_length,
            inputs.kv_max_length, scale=inputs.scale,
        )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _fmha() -> Any:
    """`xformers.ops.fmha`, or None."""
    try:
        return importlib.import_module("xformers.ops.fmha")
    except ImportError:
        return None


def _operators() -> list[Any]:
    """The forward operators of xformers that load here."""
    return [one for one in getattr(_fmha(), "ALL_FW_OPS", ()) if one.is_available()]


def _operator_names() -> str:
    """Empty without xformers."""
    names = ", ".join(str(one.NAME) for one in _operators())
    return "" if _fmha() is None else f"operators: {names or 'none'}"


def _why_not_xformers(inputs: Inputs) -> list[str]:
    if torch.compiler.is_compiling():
        return ["its mask is built on the host, which compiled code would be made anew for"]
    fmha, q = _fmha(), inputs.q
    told = not inputs.ragged or (inputs.lengths is not None and inputs.kv_lengths is not None)
    devices = {device for one in _operators() for device in getattr(one, "SUPPORTED_DEVICES", ("cuda",))}
    empty = any(n == 0 for n in (*(inputs.lengths or ()), *(inputs.kv_lengths or ())))
    return _where(
        (fmha is None, "xformers is not installed, or does not load"),
        (
            fmha is not None and not (hasattr(fmha, "memory_efficient_attention") and hasattr(fmha, "attn_bias")),
            "this xformers has no memory_efficient_attention with masks",
        ),
        (
            fmha is not None and q.device.type not in devices,
            f"the operators that load take {' or '.join(sorted(devices)) or 'no device'}, got {q.device.type}",
        ),
        (q.dtype == torch.float64, "it takes no float64"),
        (not told, "its mask is built on the host, and needs lengths (and kv_lengths)"),
        (empty, "a clip is empty, for which its operators do not promise 0"),
        (inputs.deterministic and inputs.differentiated, "its operators promise no backward pass that repeats"),
    )


def _xformers(inputs: Inputs) -> Tensor:
    fmha = _fmha()
    if inputs.lengths is None or inputs.kv_lengths is None:
        return fmha.memory_efficient_attention(inputs.q, inputs.k, inputs.v, scale=inputs.scale)
    build = fmha.attn_bias.BlockDiagonalMask.from_seqlens
    place = {"device": inputs.q.device} if "device" in inspect.signature(build).parameters else {}
    mask = build(list(inputs.lengths), list(inputs.kv_lengths), **place)
    q, k, v = (x.unsqueeze(0) for x in (inputs.q, inputs.k, inputs.v))
    return fmha.memory_efficient_attention(q, k, v, attn_bias=mask, scale=inputs.scale).squeeze(0)


def _why_not_indexed(inputs: Inputs) -> list[str]:
    size = inputs.q.shape[-1]
    return _where(
        (size % 8 != 0 or not 16 <= size <= 128, f"it takes heads of 16, 24, ... 128, got {size}"),
        (inputs.ragged and inputs.kv_cu_seqlens is not inputs.cu_seqlens, "its ragged form takes no kv_cu_seqlens"),
    )


def _indexed(inputs: Inputs) -> Tensor:
    splits: dict[str, Any] = {"cu_seqlens": inputs.cu_seqlens, "max_length": inputs.max_length} if inputs.ragged else {}
    return indexed_attention(inputs.q, inputs.k, inputs.v, scale=inputs.scale, **splits)


def _why_not_padded(inputs: Inputs) -> list[str]:
    return _where((not inputs.ragged, RAGGED_ONLY))


def _padded(inputs: Inputs) -> Tensor:
    assert inputs.cu_seqlens is not None
    assert inputs.kv_cu_seqlens is not None
    place = _places(inputs.q, inputs.cu_seqlens, inputs.max_length)
    kv_place = _places(inputs.k, inputs.kv_cu_seqlens, inputs.kv_max_length)
    clips = inputs.cu_seqlens.shape[0] - 1
    q = _pad(inputs.q, place, clips, inputs.max_length)
    k, v = (_pad(x, kv_place, clips, inputs.kv_max_length) for x in (inputs.k, inputs.v))
    counts = (inputs.kv_cu_seqlens[1:] - inputs.kv_cu_seqlens[:-1]).view(-1, 1, 1, 1)
    # A clip without keys attends to one row of zeros: nothing is divided by 0, and its result is 0.
    mask = torch.arange(inputs.kv_max_length, device=q.device) < counts.clamp_min(1)
    padded = inputs._replace(q=q, k=k, v=v, masked=True)
    exact = inputs.q.device.type == "cuda" and inputs.deterministic
    sound = ["math"] if exact else [name for name in SDPA_KERNELS if not known_failures(name, padded)]
    all_sound = len(sound) == len(SDPA_KERNELS)
    with nullcontext() if all_sound else sdpa_kernel([SDPA_KERNELS[name] for name in sound]):
        out = _sdpa(padded, mask)
    return out.flatten(0, 1)[place]


def _places(x: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Where each row of x [R, H, d] stands among the rows of clips padded to one length: [R]."""
    row = torch.arange(x.shape[0], device=x.device, dtype=starts.dtype)
    clip = torch.searchsorted(starts, row, right=True) - 1
    return clip * longest + row - starts[clip]


def _pad(x: Tensor, place: Tensor, clips: int, longest: int) -> Tensor:
    """[R, H, d] -> [B, longest, H, d], zeros behind every clip: no row is read twice, so no gradient is summed."""
    return x.new_zeros(clips * longest, *x.shape[1:]).index_copy(0, place, x).unflatten(0, (clips, longest))


# What torch chooses from where it is left to it.
SDPA_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = {
    "sdpa": Backend(_why_not_sdpa, _sdpa),
    "cudnn": _kernel(SDPBackend.CUDNN_ATTENTION, "can_use_cudnn_attention"),
    "flash": _kernel(SDPBackend.FLASH_ATTENTION, "can_use_flash_attention"),
    "efficient": _kernel(SDPBackend.EFFICIENT_ATTENTION, "can_use_efficient_attention"),
    "math": Backend(_why_not_math, _math),
    "varlen": Backend(_why_not_varlen, _varlen),
    "xformers": Backend(_why_not_xformers, _xformers, _operator_names),
    "indexed": Backend(_why_not_indexed, _indexed),
    "padded": Backend(_why_not_padded, _padded),
}
