"""Rotary positions: what to call. B clips, K tokens of a clip, H heads of d channels."""

from typing import overload

from torch import Tensor

from fastjepa_kernels.checks import check_index
from fastjepa_kernels.dispatch import Impl, choose
from fastjepa_kernels.ops import rope as _rope_ops  # noqa: F401  (registers the operators)
from fastjepa_kernels.positions import Rope
from fastjepa_kernels.registry import operation


@overload
def rope3d(x: Tensor, ids: Tensor, rope: Rope, *, impl: Impl = "auto") -> Tensor: ...
@overload
def rope3d(x: tuple[Tensor, Tensor], ids: Tensor, rope: Rope, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]: ...
def rope3d(
    x: Tensor | tuple[Tensor, Tensor], ids: Tensor, rope: Rope, *, impl: Impl = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """Turn the channels of each head by the place of its token in the grid: x [B, K, H, d] -> [B, K, H, d].

    `x` is one tensor, or queries and keys `(q, k)` of one dtype, whose numbers of heads may differ; a pair costs one
    launch and its angles once. Any strides with neighbouring channels are read in place: slices qkv[:, :, 0] of a
    packed projection [B, K, 3, H, d], and [B, H, K, d] as x.transpose(1, 2). Results are contiguous [B, K, H, d].
    `ids` are token numbers, int32 or int64 [B, K], or [K] where all clips have the same; `rope` gives the grid and the
    layout of the angles (see `Rope`). Channels beyond three segments of 2 * ((d // 3) // 2) are copied: of 64 channels
    3 * 20 turn, of 80 3 * 26.

    Angles are of float32 and made from the numbers in registers (float64 for float64, which the reference alone takes),
    whatever the dtype: the released V-JEPA 2 code rounds its frequencies to that of the queries, here they stay exact,
    with `compat` too. Triton takes positions up to 10000 on an axis. Reads and writes every value once, and one number
    a token; about 3 FLOPs a value, of which counters see none. The gradient is the transposed map, the inverse rotation
    where `compat` is off; it keeps the numbers alone and can be differentiated again.

    It replaces the rotations of RoPEAttention (V-JEPA 2) and VJEPA2RopeAttention (transformers), which make their sines
    again in every block. Not before `indexed_attention`, which turns what it loads, nor for axes of unequal segments.

    Errors: ValueError for shapes, dtypes, devices or an implementation that cannot run (Triton takes no float64). Token
    numbers out of range are not checked.
    """
    q, k = x if isinstance(x, tuple) else (x, None)
    for one in (q,) if k is None else (q, k):
        if one.ndim != 4 or one.shape[-1] < 6 or one.shape[:2] != q.shape[:2] or one.shape[-1] != q.shape[-1]:
            raise ValueError(
                f"rope3d: expected [B, K, H, d] with d of at least 6, and q and k of one B, K and d, got "
                f"{list(q.shape)}" + ("" if k is None else f" and {list(k.shape)}")
            )
        check_index("rope3d", ids, one)
        if one.dtype != q.dtype:
            raise ValueError(f"rope3d: q and k must be of one dtype, got {q.dtype} and {one.dtype}")
    if ids.shape not in (q.shape[:2], q.shape[1:2]):
        raise ValueError(
            f"rope3d: expected ids {list(q.shape[:2])} or {list(q.shape[1:2])} for x {list(q.shape)}, got "
            f"{list(ids.shape)}"
        )
    _, height, width = rope.grid
    run = operation("rope3d", choose("rope3d", impl, q))
    first, second = run(q, k, ids.expand(q.shape[:2]), height, width, float(rope.theta), rope.compat, False)
    return first if k is None else (first, second)
