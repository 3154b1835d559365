"""Attention of whole or ragged batches through whichever library fits, and the reasons of the choice.

Dense: q [B, M, H, d], k and v [B, N, H, d]. Ragged: the rows of all clips one after another, q [R, H, d], with
cu_seqlens [B + 1] on the device, whose values the host never reads. Every backend says in words why it cannot take some
inputs; `auto` takes the first of an order that has nothing to say.
"""

import torch
from torch import Tensor

from fastjepa_kernels.attention_backends import BACKENDS, Inputs, why_not

# The order that `auto` walks, by device and form. Libraries come first, and our own kernel runs only when asked for, as
# long as no measurement says otherwise: the source of each order is named.
ORDER: dict[tuple[str, str], dict[str, str]] = {
    ("cuda", "dense"): {"order": "sdpa flash efficient xformers math", "source": "static"},
    ("cuda", "ragged"): {"order": "varlen xformers padded", "source": "static"},
    ("other", "dense"): {"order": "sdpa math", "source": "static"},
    ("other", "ragged"): {"order": "padded", "source": "static"},
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    kv_cu_seqlens: Tensor | None = None,
    kv_max_length: int | None = None,
    lengths: tuple[int, ...] | None = None,
    kv_lengths: tuple[int, ...] | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> Tensor:
    """softmax(scale * q k^T) v of every clip and head -> as q; scale is d ** -0.5 where it is not given.

    Dense, q is [B, M, H, d] and k, v are [B, N, H, d]. Ragged, q is [R, H, d] and k, v are [S, H, d] with `cu_seqlens`
    int32 [B + 1], where clips start in q and the last one ends, and `max_length`, a number of the host no smaller than
    the longest clip; k and v are split as q is, or by `kv_cu_seqlens` and `kv_max_length`. A clip may be empty: rows
    that have nothing to attend to are 0. All tensors have one dtype and device and any strides.

    `backend` is "auto", "sdpa" (torch decides), "cudnn", "flash", "efficient" or "math" (that kernel of torch's
    SDPA and no other), "varlen" (`torch.nn.attention.varlen`), "xformers" (its block-diagonal mask is built from
    numbers of the host, so ragged it needs `lengths` and, with `kv_cu_seqlens`, `kv_lengths`: rows of each clip),
    "indexed" (`indexed_attention` of this package) or "padded" (ragged clips padded to `max_length` with a mask: two
    copies each way and scores of the padding, wherever nothing else runs). `explain_attention` says what is chosen.

    `deterministic` asks for a backward pass that repeats bit by bit. cuDNN's is left out then; torch's other fused
    kernels keep the promise only under `torch.use_deterministic_algorithms(True)`, which this function does not set.
    Calls that a library is known to get wrong (`attention_backends.KNOWN_FAILURES`) are not given to it either.

    Moves q, k, v and the result once for fused kernels; 4 M N d FLOPs a head and clip forward and 10 M N d backward,
    which torch's counter sees where it knows the library's operation. The host asks the device for nothing, and no
    setting of the process is left changed. It replaces the choice by hand between these libraries. Not for masks,
    causal attention or dropout, and not under a fixed choice of torch's that must hold across machines.

    Errors: ValueError for inputs that do not fit together, for a backend asked for by name that cannot take them, and
    where none can: with the reasons of each.
    """
    inputs = _inputs(
        q, k, v, scale, cu_seqlens, max_length, kv_cu_seqlens, kv_max_length, lengths, kv_lengths, deterministic
    )
    return BACKENDS[_choose(inputs, backend)].run(inputs)


def explain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    kv_cu_seqlens: Tensor | None = None,
    kv_max_length: int | None = None,
    lengths: tuple[int, ...] | None = None,
    kv_lengths: tuple[int, ...] | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> str:
    """What `attention` does with these arguments, and why: a line for the inputs, one for the choice, one a backend.

    Nothing is computed. Errors: ValueError as `attention`.
    """
    inputs = _inputs(
        q, k, v, scale, cu_seqlens, max_length, kv_cu_seqlens, kv_max_length, lengths, kv_lengths, deterministic
    )
    chosen = _choose(inputs, backend)
    entry = _order(inputs)
    form = "ragged" if inputs.ragged else "dense"
    why = "asked for by name" if backend != "auto" else f"the first that fits of {', '.join(entry['order'].split())}"
    lines = [
        f"attention: {form}, q {list(q.shape)}, k {list(k.shape)}, {str(q.dtype).removeprefix('torch.')} on {q.device}"
        + (", deterministic" if deterministic else ""),
        f"chosen: {chosen}, {why}" + (f" (order: {entry['source']})" if backend == "auto" else ""),
    ]
    for name, one in BACKENDS.items():
        reasons = why_not(name, inputs)
        if reasons:
            told = "no: " + "; ".join(reasons)
        elif name == chosen:
            told = "runs"
        elif name in entry["order"].split():
            told = "fits, and stands later in the order" if backend == "auto" else "fits"
        else:
            told = "fits, and runs when asked for by name"
        more = one.describe()
        lines.append(f"  {name}: {told}" + (f" [{more}]" if more else ""))
    return "\n".join(lines)


def _order(inputs: Inputs) -> dict[str, str]:
    device = "cuda" if inputs.q.device.type == "cuda" else "other"
    return ORDER[device, "ragged" if inputs.ragged else "dense"]


def _choose(inputs: Inputs, backend: str) -> str:
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"attention: backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
        reasons = why_not(backend, inputs)
        if reasons:
            raise ValueError(f"attention: backend={backend!r} was asked for, but {'; '.join(reasons)}")
        return backend
    for name in _order(inputs)["order"].split():
        if not why_not(name, inputs):
            return name
    table = [
        f"  {name}: {'; '.join(why_not(name, inputs)) or 'fits, and runs when asked for by name'}" for name in BACKENDS
    ]
    raise ValueError("attention: no backend of the order takes these inputs\n" + "\n".join(table))


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    cu_seqlens: Tensor | None,
    max_length: int | None,
    kv_cu_seqlens: Tensor | None,
    kv_max_length: int | None,
    lengths: tuple[int, ...] | None,
    kv_lengths: tuple[int, ...] | None,
    deterministic: bool,
) -> Inputs:
    """Checked, with the scale and the splits of k and v filled in."""
    ragged = cu_seqlens is not None
    if q.ndim != (3 if ragged else 4) or q.shape[-1] == 0:
        form = "q [R, H, d] beside cu_seqlens" if ragged else "q [B, M, H, d] without cu_seqlens"
        raise ValueError(f"attention: expected {form}, got {list(q.shape)}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"attention: q must be of a floating dtype, got {q.dtype}")
    for what, x in (("k", k), ("v", v)):
        if x.ndim != q.ndim or x.shape[-2:] != q.shape[-2:] or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"attention: expected {what} {'[S' if ragged else '[B, N'}, {q.shape[-2]}, {q.shape[-1]}] of "
                f"{q.dtype} on {q.device}, got {list(x.shape)} of {x.dtype} on {x.device}"
            )
    if k.shape != v.shape or (not ragged and k.shape[0] != q.shape[0]):
        raise ValueError(f"attention: q, k and v do not go together: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if not ragged:
        if any(x is not None for x in (max_length, kv_cu_seqlens, kv_max_length, lengths, kv_lengths)):
            raise ValueError("attention: lengths and kv_cu_seqlens go with cu_seqlens, got them without")
        if k.shape[1] == 0:
            raise ValueError("attention: there are no keys, expected at least one for dense q")
    if (kv_cu_seqlens is None) != (kv_max_length is None):
        raise ValueError("attention: kv_cu_seqlens and kv_max_length are given together or not at all")
    if cu_seqlens is not None:
        _check_splits("cu_seqlens", cu_seqlens, "max_length", max_length, lengths, q)
        if kv_cu_seqlens is None:
            if k.shape[0] != q.shape[0] or kv_lengths is not None:
                raise ValueError(
                    f"attention: without kv_cu_seqlens k is split as q is, and has its {q.shape[0]} rows and lengths, "
                    f"got {k.shape[0]} rows" + ("" if kv_lengths is None else " and kv_lengths")
                )
            kv_cu_seqlens, kv_max_length, kv_lengths = cu_seqlens, max_length, lengths
        else:
            _check_splits("kv_cu_seqlens", kv_cu_seqlens, "kv_max_length", kv_max_length, kv_lengths, k)
            if kv_cu_seqlens.shape != cu_seqlens.shape:
                raise ValueError(
                    f"attention: cu_seqlens {list(cu_seqlens.shape)} and kv_cu_seqlens {list(kv_cu_seqlens.shape)} "
                    "are of different numbers of clips"
                )
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return Inputs(
        q, k, v, factor, cu_seqlens, max_length or 0, kv_cu_seqlens, kv_max_length or 0, lengths, kv_lengths,
        deterministic,
    )  # fmt: skip


def _check_splits(
    name: str, starts: Tensor, what: str, longest: int | None, lengths: tuple[int, ...] | None, x: Tensor
) -> None:
    if starts.ndim != 1 or starts.shape[0] < 2 or starts.dtype != torch.int32 or starts.device != x.device:
        raise ValueError(
            f"attention: {name} must be int32 [B + 1] on {x.device}, got {list(starts.shape)} of {starts.dtype} on "
            f"{starts.device}"
        )
    if longest is None or isinstance(longest, Tensor) or longest < 1:
        raise ValueError(f"attention: {name} needs {what}, a number of the host from 1 on, got {longest!r}")
    if lengths is not None and (len(lengths) != starts.shape[0] - 1 or sum(lengths) != x.shape[0]):
        raise ValueError(
            f"attention: expected {starts.shape[0] - 1} lengths beside {name} with {x.shape[0]} rows together, got "
            f"{len(lengths)} with {sum(lengths)}"
        )
