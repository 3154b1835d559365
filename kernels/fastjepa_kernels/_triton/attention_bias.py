"""The bias of a packed projection inside the attention kernels: added to rows as they are read, its gradient summed.

Every program leaves one float32 row of sums for each gradient tile it writes, and one more launch adds those up in a
fixed order. So neither the biased rows nor the gradient are passed over again.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels._triton.attention_rows import begin_of, chunk, store_chunk
from fastjepa_kernels._triton.launch import Shipped, pinned
from fastjepa_kernels.config import lookup


@triton.jit
def bias_row(bias, part: tl.constexpr, heads, head, HEAD: tl.constexpr, BIAS: tl.constexpr):
    """All chunks of the row of queries (part 0), keys (1) or values (2) and a head, float32; unread without BIAS."""
    a, b = 0.0, 0.0
    if BIAS:
        row = bias + (part * heads + head) * HEAD
        a = bias_chunk(row, HEAD, 0)
        if chunk(HEAD, 1):
            b = bias_chunk(row, HEAD, 1)
    return a, b


@triton.jit
def bias_chunk(row, HEAD: tl.constexpr, N: tl.constexpr):
    """Chunk N of a row [d]; zeros beyond its channels."""
    lane = begin_of(HEAD, N) + tl.arange(0, chunk(HEAD, N))
    return tl.load(row + lane, mask=lane < HEAD, other=0.0).to(tl.float32)


@triton.jit
def add_bias(a, b, x, y, HEAD: tl.constexpr, BIAS: tl.constexpr):
    """The row that `bias_row` gave added to all rows in float32, rounded once to their dtype."""
    if BIAS:
        a = (a.to(tl.float32) + x[None, :]).to(a.dtype)
        if chunk(HEAD, 1):
            b = (b.to(tl.float32) + y[None, :]).to(b.dtype)
    return a, b


@triton.jit
def store_sums(x, a, b, HEAD: tl.constexpr):
    """The sums over all rows, one row [d] of float32."""
    first = tl.arange(0, 1)
    offset, present = first, first == 0
    store_chunk(x, offset, present, tl.sum(a.to(tl.float32), axis=0)[None, :], HEAD, 0)
    if chunk(HEAD, 1):
        store_chunk(x, offset, present, tl.sum(b.to(tl.float32), axis=0)[None, :], HEAD, 1)


@triton.jit
def as_written(a, b, present, like, HEAD: tl.constexpr):
    """A gradient tile as memory sees it: rounded to the dtype of `like`, zeros in rows that take no part."""
    a = tl.where(present[:, None], a, 0.0).to(like.dtype.element_ty)
    if chunk(HEAD, 1):
        b = tl.where(present[:, None], b, 0.0).to(like.dtype.element_ty)
    return a, b


@triton.jit(do_not_specialize=("asking", "seen"))
def bias_sum_kernel(parts, out, asking, seen, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """out [3, D] from parts [asking + 2 seen, D]: rows of queries, of keys, of values; LANES columns a program."""
    part = tl.program_id(1)
    begin = tl.where(part == 0, 0, asking + (part - 1) * seen).to(tl.int64)
    count = tl.where(part == 0, asking, seen)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    total = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (lane < WIDTH)[None, :]
        total += tl.load(parts + (begin + row)[:, None] * WIDTH + lane[None, :], mask=inside, other=0.0)
    tl.store(out + part * WIDTH + lane, tl.sum(total, axis=0), mask=lane < WIDTH)


def sum_bias(parts: Tensor, out: Tensor, asking: int, seen: int) -> None:
    """out [3, H, d] = the sums of `asking` rows of parts [rows, H * d], of `seen` more, and of as many again, float32.

    The current device is that of the tensors.
    """
    width = parts.shape[-1]
    settings = lookup("layer_norm_sum", device=parts.device, width=width, length=max(asking, seen))
    bias_sum_kernel[(triton.cdiv(width, settings["LANES"]), 3)](parts, out, asking, seen, WIDTH=width, **settings)


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """The sum at the widths of ViT-L and ViT-H."""
    types = {"parts": "*fp32", "out": "*fp32", "asking": "i32", "seen": "i32"}
    for width in (1024, 1280):
        fixed = {"WIDTH": width, **lookup("layer_norm_sum", architecture=architecture, width=width)}
        yield pinned(f"attention bias sum {width}", bias_sum_kernel, types, fixed)


def candidates(width: int) -> dict[str, list[dict[str, int]]]:
    """Nothing of its own: the settings are those of the sum in `norms`."""
    return {}
