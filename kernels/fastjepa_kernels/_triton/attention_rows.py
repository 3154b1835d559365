"""What the attention kernels share: which rows a clip has, how a row of a head is read, turned, multiplied and written.

A head of d channels is held as one or two chunks whose widths are powers of two, none below 16, which is the least that
a matrix product takes: 80 is 64 + 16 and 88 is 64 + 32. 104 and 112 would be three; they are one of 128, because the
registers of three spill on sm_80. Lanes beyond d are masked, so that memory sees d channels alone. Where a head has no
second chunk, the first is given in its place and never looked at.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def chunk(head, number):
    """Width of chunk 0 or 1, or 0 where there is none."""
    width = (head + 15) // 16 * 16
    first = (1 << width.bit_length()) // 2
    rest = width - first
    if rest & (rest - 1):
        first, rest = 2 * first, 0
    return rest if number else first


@triton.constexpr_function
def begin_of(head, number):
    """The first channel of a chunk."""
    return chunk(head, 0) if number else 0


@triton.jit
def span(clip, most, starts, lengths, FLAT: tl.constexpr, LENGTHS: tl.constexpr):
    """Where the rows of a clip begin in results and index, and how many of them take part."""
    if FLAT:
        begin = tl.load(starts + clip).to(tl.int64)
        count = (tl.load(starts + clip + 1) - begin).to(tl.int32)
    else:
        begin = clip * most
        count = most
        if LENGTHS:
            count = tl.minimum(tl.load(lengths + clip).to(tl.int32), most)
    return begin, count


@triton.jit
def tokens(index, begin, place, present, INDEX: tl.constexpr):
    """Numbers of the rows within their clip, int64."""
    token = place.to(tl.int64)
    if INDEX:
        token = tl.load(index + begin + place, mask=present, other=0).to(tl.int64)
    return token


@triton.jit
def origin(x, clip, begin, head, x_clip, x_row, x_head, FLAT: tl.constexpr, UNIT: tl.constexpr):
    """Row 0 of a clip and head; strides are given in units, of 8 values where they allow loads of 16 bytes."""
    first = begin * (x_row * UNIT) if FLAT else clip * (x_clip * UNIT)
    return x + first + head * (x_head * UNIT)


@triton.jit
def load_chunk(x, offset, present, HEAD: tl.constexpr, N: tl.constexpr):
    """Chunk N of rows at these offsets [R]; zeros where a row or a channel is absent."""
    lane = begin_of(HEAD, N) + tl.arange(0, chunk(HEAD, N))
    mask = present[:, None]
    if begin_of(HEAD, N) + chunk(HEAD, N) > HEAD:
        mask = mask & (lane < HEAD)[None, :]
    return tl.load(x + offset[:, None] + lane[None, :], mask=mask, other=0.0)


@triton.jit
def load(x, offset, present, HEAD: tl.constexpr):
    """All chunks of the rows."""
    a = load_chunk(x, offset, present, HEAD, 0)
    b = a
    if chunk(HEAD, 1):
        b = load_chunk(x, offset, present, HEAD, 1)
    return a, b


@triton.jit
def store_chunk(x, offset, present, values, HEAD: tl.constexpr, N: tl.constexpr):
    """The counterpart of `load_chunk`, rounded to the dtype of x."""
    lane = begin_of(HEAD, N) + tl.arange(0, chunk(HEAD, N))
    mask = present[:, None]
    if begin_of(HEAD, N) + chunk(HEAD, N) > HEAD:
        mask = mask & (lane < HEAD)[None, :]
    tl.store(x + offset[:, None] + lane[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def store(x, offset, present, a, b, HEAD: tl.constexpr):
    """All chunks of the rows."""
    store_chunk(x, offset, present, a, HEAD, 0)
    if chunk(HEAD, 1):
        store_chunk(x, offset, present, b, HEAD, 1)


@triton.jit
def zeros(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Float32 sums of all chunks."""
    a = tl.zeros([ROWS, chunk(HEAD, 0)], dtype=tl.float32)
    b = a
    if chunk(HEAD, 1):
        b = tl.zeros([ROWS, chunk(HEAD, 1)], dtype=tl.float32)
    return a, b


@triton.jit
def inner(a, b, x, y, HEAD: tl.constexpr, PRECISION: tl.constexpr):
    """Rows [R, d] and rows [S, d] -> their products [R, S]."""
    total = tl.dot(a, tl.trans(x), input_precision=PRECISION)
    if chunk(HEAD, 1):
        total = tl.dot(b, tl.trans(y), total, input_precision=PRECISION)
    return total


@triton.jit
def mix(a, b, weights, x, y, HEAD: tl.constexpr, PRECISION: tl.constexpr):
    """Sums [R, d] plus weights [R, S] times rows [S, d]."""
    weights = weights.to(x.dtype)
    a = tl.dot(weights, x, a, input_precision=PRECISION)
    if chunk(HEAD, 1):
        b = tl.dot(weights, y, b, input_precision=PRECISION)
    return a, b


@triton.jit
def scale(a, b, factor, HEAD: tl.constexpr):
    """All chunks times a number, or times [R, 1]."""
    a = a * factor
    if chunk(HEAD, 1):
        b = b * factor
    return a, b


@triton.jit
def multiply_sum(a, b, x, y, HEAD: tl.constexpr):
    """The sum over channels of one row times the other, float32 [R]."""
    total = tl.sum(a.to(tl.float32) * x.to(tl.float32), axis=1)
    if chunk(HEAD, 1):
        total += tl.sum(b.to(tl.float32) * y.to(tl.float32), axis=1)
    return total
