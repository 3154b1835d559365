"""Attention over rows named by an index: what to call.

B clips, N rows of a clip, Kq queries and Kk keys that take part, H heads of d channels, R rows of all clips in a row.
Bytes and FLOPs are of the Triton form.
"""

from torch import Tensor

from fastjepa_kernels.checks import check_index
from fastjepa_kernels.dispatch import Impl, choose
from fastjepa_kernels.ops import attention as _attention_ops  # noqa: F401  (registers the operators)
from fastjepa_kernels.positions import Rope
from fastjepa_kernels.registry import operation

NAME = "indexed_attention"
HEAD_SIZES = range(16, 129, 8)


def indexed_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    q_index: Tensor | None = None,
    kv_index: Tensor | None = None,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    rope: Rope | None = None,
    ids: Tensor | tuple[Tensor, Tensor] | None = None,
    qkv_bias: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Softmax attention of chosen rows to chosen rows, read where they lie -> [B, Kq, H, d], contiguous.

    `q` is the packed projection [B, N, 3, H, d], or a [B, Nq, H, d] beside `k` and `v` [B, N, H, d]; any strides with
    neighbouring channels are read in place. `q_index` [B, Kq] and `kv_index` [B, Kk], int32 or int64, name the rows
    that ask and those that are asked, each at most once in a clip; without one all rows do. Of a clip with
    `q_lengths` or `kv_lengths` [B] only so many rows of the index (or of all) take part: the others' content is not
    read, their results and gradients are 0. A clip without keys gives zeros.

    Flat form: packed [R, 3, H, d], or [R, H, d] each, with `cu_seqlens` int32 [B + 1], where every clip begins and the
    last ends (so 0 first and R last; a padded tail is a clip of its own), and `max_length`, rows of the longest clip
    -> [R, H, d]. A clip may be empty.

    `rope` turns queries and keys by the token numbers in the index (the row number in the clip without one), in
    float32, rounded once. Where rows are not the tokens of whole clips, `ids` are the token numbers of all rows, int32
    or int64 [B, N], or [R] in flat form (a row of an index then has the number at its place); queries that are other
    rows than the keys have their own: a pair ([B, Nq], [B, N]). The rows that take part are then first written one
    after another, once, and their gradients written back by a second kernel: one more copy of those rows each way.
    `qkv_bias` [3, H, d] is added to packed rows as they are read, in float32, rounded once to their dtype, so that the
    projection may run without one. Its gradient is the float32 sum of theirs as it is written (with `rope`, before the
    last rounding): the programs that write it leave a row of sums for each block, and one more launch adds those up.
    Without `rope` no row is copied. `scale` is d ** -0.5 unless given.

    Dtypes: float32 (products in full float32), bfloat16 and float16, one for all rows; d from 16 to 128 in steps of 8.
    Softmax, sums and statistics are of float32. Forward reads each chosen query once and each chosen key and value
    once for every block of queries (from the cache, mostly), writes the result and 4 bytes a query and head; 4 Kq Kk d
    FLOPs a clip and head. Backward is two passes without atomics, bitwise repeatable, straight into the gradient of
    the packed projection; counted as 10 Kq Kk d (both passes compute scores, which makes 14). With an index the
    gradient is filled with zeros before; without, every row is written once. FLOP counters take every clip for as long
    as the longest in flat form. There is no second derivative.

    It replaces gathering rows, `scaled_dot_product_attention` and scattering their gradients. Not where all rows take
    part and nothing else is fused: the library's attention is as fast or faster, on Hopper most of all.

    Errors: ValueError for shapes, dtypes or an implementation that cannot run. Numbers out of range are not checked on
    a GPU.
    """
    flat = cu_seqlens is not None
    _check_rows(q, k, v, flat)
    if cu_seqlens is not None:
        if max_length is None or any(x is not None for x in (q_index, kv_index, q_lengths, kv_lengths)):
            raise ValueError(f"{NAME}: cu_seqlens goes with max_length, and without index and lengths")
        _check_numbers("cu_seqlens", cu_seqlens, q)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{NAME}: expected cu_seqlens [B + 1], got {list(cu_seqlens.shape)}")
    elif max_length is not None:
        raise ValueError(f"{NAME}: max_length goes with cu_seqlens")
    _check_clips(q, q_index, kv_index, q_lengths, kv_lengths)
    heads, head = q.shape[-2:]
    if qkv_bias is not None and (
        k is not None
        or qkv_bias.shape != (3, heads, head)
        or qkv_bias.device != q.device
        or not qkv_bias.dtype.is_floating_point
    ):
        raise ValueError(
            f"{NAME}: expected a floating qkv_bias {[3, heads, head]} on {q.device} beside a packed q, got "
            f"{list(qkv_bias.shape)}, {qkv_bias.dtype} on {qkv_bias.device}"
        )
    q_ids, kv_ids = _check_ids(ids, q, q if k is None else k, rope, flat)
    run = operation(NAME, choose(NAME, impl, q))
    turn = Rope((1, 1, 1)) if rope is None else rope
    return run(
        q, k, v, q_index, kv_index, q_lengths, kv_lengths, cu_seqlens, qkv_bias, q_ids, kv_ids, max_length or 0,
        head**-0.5 if scale is None else float(scale), [] if rope is None else list(turn.grid), float(turn.theta),
        turn.compat,
    )[0]  # fmt: skip


def _check_rows(q: Tensor, k: Tensor | None, v: Tensor | None, flat: bool) -> None:
    lead = "[R" if flat else "[B, N"
    if (k is None) != (v is None):
        raise ValueError(f"{NAME}: k and v come together, or neither beside a packed q")
    if k is None or v is None:
        if q.ndim != 5 - flat or q.shape[-3] != 3:
            raise ValueError(f"{NAME}: expected packed q {lead}, 3, H, d], got {list(q.shape)}")
    elif not (
        q.ndim == k.ndim == 4 - flat
        and k.shape == v.shape
        and q.shape[-2:] == k.shape[-2:]
        and (q.shape[0] == k.shape[0])
    ):
        raise ValueError(
            f"{NAME}: expected q, k and v {lead}, H, d] each, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    elif not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(f"{NAME}: q, k and v must have one dtype and device, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"{NAME}: q must be of a floating dtype, got {q.dtype}")
    if q.shape[-1] not in HEAD_SIZES:
        raise ValueError(f"{NAME}: heads must have 16 to 128 channels in steps of 8, got {q.shape[-1]}")


def _check_clips(
    q: Tensor,
    q_index: Tensor | None,
    kv_index: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
) -> None:
    for what, index in (("q_index", q_index), ("kv_index", kv_index)):
        if index is None:
            continue
        check_index(NAME, index, q)
        if index.ndim != 2 or index.shape[0] != q.shape[0]:
            raise ValueError(f"{NAME}: expected {what} [{q.shape[0]}, K], got {list(index.shape)}")
    for what, lengths in (("q_lengths", q_lengths), ("kv_lengths", kv_lengths)):
        if lengths is None:
            continue
        _check_numbers(what, lengths, q)
        if lengths.shape != q.shape[:1]:
            raise ValueError(f"{NAME}: expected {what} [{q.shape[0]}], got {list(lengths.shape)}")


def _check_ids(
    ids: Tensor | tuple[Tensor, Tensor] | None, q: Tensor, k: Tensor, rope: Rope | None, flat: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Token numbers of the rows of q and of k."""
    if ids is None:
        return None, None
    if rope is None:
        raise ValueError(f"{NAME}: ids are token numbers, which rope alone reads: give rope too, or no ids")
    both = ids if isinstance(ids, tuple) else (ids, ids)
    for what, one, x in zip(("q", "k and v"), both, (q, k)):
        _check_numbers("ids", one, q)
        rows = x.shape[:1] if flat else x.shape[:2]
        if one.shape != rows:
            raise ValueError(f"{NAME}: expected ids {list(rows)} for {what} {list(x.shape)}, got {list(one.shape)}")
    return both


def _check_numbers(what: str, numbers: Tensor, q: Tensor) -> None:
    if numbers.dtype.is_floating_point or numbers.dtype.itemsize < 4 or numbers.device != q.device:
        raise ValueError(
            f"{NAME}: {what} must be int32 or int64 on {q.device}, got {numbers.dtype} on {numbers.device}"
        )
