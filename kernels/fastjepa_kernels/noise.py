"""Noise for the targets of a predictor, one function each: what to call.

B clips, N tokens, K kept tokens, D width, R rows. Bytes and FLOPs are of the Triton form.
"""

import torch
from torch import Tensor

from fastjepa_kernels.checks import check_index
from fastjepa_kernels.dispatch import Impl, choose
from fastjepa_kernels.ops import noise as _noise_ops  # noqa: F401  (registers the operators)
from fastjepa_kernels.registry import operation

TOKEN_BITS, SET_BITS, SLOT_BITS = 20, 8, 35


def row_keys(slot: Tensor | int, token: Tensor | int, mask_set: Tensor | int = 0) -> Tensor:
    """The number that the noise of a row is drawn from, int64, of the broadcast shape of the three.

    `slot` is the global number of the clip (below 2 ** 35), `token` the number of the token in its clip (below
    2 ** 20), `mask_set` that of the mask set (below 2 ** 8); integers, or int32 and int64 tensors of one device. The
    three are packed side by side into 63 bits, so two rows have one key only where all three are equal; a row keeps
    its key in any order of rows, packing, batch or number of ranks. For masks [B, K]: `row_keys(slots[:, None], index,
    number)`.

    Plain integer arithmetic of torch, no kernel: 8 bytes a row. Not a hash: keys out of range would coincide. Numbers
    that the host holds are checked; those of a tensor are not, which would stop a GPU.

    Errors: ValueError for a number out of range or a tensor of another dtype.
    """
    parts: list[Tensor | int] = []
    fields = ("slot", slot, SLOT_BITS), ("token", token, TOKEN_BITS), ("mask_set", mask_set, SET_BITS)
    for name, given, bits in fields:
        if isinstance(given, Tensor):
            if given.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"row_keys: {name} must be int32 or int64, got {given.dtype}")
            parts.append(given.long())
        elif not 0 <= given < 2**bits:
            raise ValueError(f"row_keys: {name} must be from 0 to 2 ** {bits} - 1, got {given}")
        else:
            parts.append(given)
    clip, place, number = parts
    key = (clip << (TOKEN_BITS + SET_BITS)) | (number << TOKEN_BITS) | place
    return key if isinstance(key, Tensor) else torch.tensor(key, dtype=torch.int64)


def philox_normal(row_key: Tensor, width: int, seed: Tensor | int, *, impl: Impl = "auto") -> Tensor:
    """Standard normal numbers: row_key int64 [...] -> float32 [..., width], a pure function of key, channel and seed.

    `seed` is an int64 tensor of no dims on the device, which a CUDA graph can replay with another value, or a number
    from 0 to 2 ** 63 - 1. The first channels of a row do not depend on the width.

    Philox-4x32-10: the counter of 128 bits is (number of the group of four channels, 0, low and high word of the row
    key), the key of 64 bits is the seed, and a group's four channels are the four words, two a pair through
    Box-Muller. Under one seed the map from counters to words is a bijection of 128 bits, and (group, row key) is part
    of the counter as it is: no two groups of four channels, of however many rows, read the same block of words, so
    nothing repeats, short of 2 ** 34 channels and 2 ** 64 rows. Two seeds are two bijections. Uniform numbers keep 32
    bits and are never 0: values reach 6.76. Triton and the reference agree bit for bit in the words, and in the
    normals to about 1e-6.

    Writes 4 bytes and reads 8 / width bytes a value; about 50 instructions of the GPU a value, most of them integer,
    none of which counts as a FLOP. For tests, and where noise is needed by itself; `torch.randn` is cheaper where a
    value need not be a function of its place.

    Errors: ValueError for a key or seed of another dtype, device or shape, no channel, or an implementation that
    cannot run.
    """
    if row_key.dtype != torch.int64:
        raise ValueError(f"philox_normal: row_key must be int64, got {row_key.dtype}")
    if not 1 <= width < 2**31:
        raise ValueError(f"philox_normal: width must be at least 1, got {width}")
    start = _seed("philox_normal", seed, row_key.device)
    return operation("philox_normal", choose("philox_normal", impl, row_key, channels=width))(row_key, width, start)


def layer_norm_noise(
    x: Tensor,
    alpha: Tensor,
    row_key: Tensor | None = None,
    seed: Tensor | int | None = None,
    *,
    eps: float = 1e-5,
    noise: Tensor | None = None,
    position: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """sqrt(alpha) * LayerNorm(x) + sqrt(1 - alpha) * e + position: x [..., D] -> [..., D]; the norm has no weights.

    `alpha`, from 0 to 1, is the share of the variance that stays the signal's: floating, of some leading dims of x (for
    x [B, K, D]: [], [B] or [B, K]), on the device. e is `philox_normal(row_key, D, seed)` with row_key int64 [...], or
    the `noise` handed in, of the shape of x. `position` is added where given; its dims are the last ones of x ([D],
    [K, D], ...). Floating dtypes may all differ; the result is of `out_dtype`, or that of x. Statistics and sums are
    float32, rounded once (float64 where x is, in the reference).

    Reads x (and position, and noise) and writes the result, 8 bytes of statistics and 8 of key a row; noise that is
    made here is never stored, and costs about 50 instructions a value. About 11 FLOPs a value otherwise; counters see
    none. Backward reads x and the gradient and writes dx, about 13 FLOPs a value: that of a LayerNorm times
    sqrt(alpha), so that it needs neither noise nor seed. alpha, noise and position are constants and get no gradient;
    there is no second derivative. Bitwise repeatable, no atomics.

    It replaces `F.layer_norm`, `torch.randn_like` and four passes that mix them. Not for a learned position (add it
    after), nor where the noise itself is a target: draw that with `philox_normal` and hand it in.

    Errors: ValueError for shapes, dtypes, devices, constants that require a gradient, neither or both of noise and
    row_key with seed, or an implementation that cannot run (Triton takes no float64 and up to 8192 channels).
    """
    name = "layer_norm_noise"
    if x.ndim == 0 or x.shape[-1] == 0 or not x.dtype.is_floating_point:
        raise ValueError(
            f"{name}: x must be floating [..., D] with at least one channel, got {list(x.shape)}, {x.dtype}"
        )
    start = check_draw(name, x.shape, x, alpha, row_key, seed, noise, eps)
    if position is not None:
        if position.ndim == 0 or position.shape != x.shape[x.ndim - position.ndim :]:
            raise ValueError(
                f"{name}: position must have the last dims of x {list(x.shape)}, got {list(position.shape)}"
            )
        check_constant(name, "position", position, x)
    out_dtype = check_out_dtype(name, out_dtype, x)
    given = [t.dtype for t in (alpha, noise, position) if t is not None]
    chosen = choose(name, impl, x, out_dtype, *given, channels=x.shape[-1])
    return operation(name, chosen)(x, alpha, row_key, start, noise, position, float(eps), out_dtype)[0]


def gather_norm_noise(
    x: Tensor,
    index: Tensor,
    alpha: Tensor,
    row_key: Tensor | None = None,
    seed: Tensor | int | None = None,
    *,
    eps: float = 1e-5,
    noise: Tensor | None = None,
    position: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """`layer_norm_noise` of the named tokens: x [B, N, D], index [B, K] -> [B, K, D].

    `alpha` is [], [B] or [B, K], `row_key` [B, K], `noise` [B, K, D]; `position` is a table [N, D], read at the same
    index. `index` is int32 or int64 with numbers from 0 to N - 1, and a clip names no token twice. The rest is as for
    `layer_norm_noise`.

    Forward moves what `layer_norm_noise` moves for the kept rows, and the index. Backward writes every row of dx once,
    zeros where no row was kept, from an inverse index of 4 bytes a token: no zero-filling pass, no atomics, bitwise
    repeatable. It replaces a gather of rows and one of positions besides. To write the rows straight into a predictor's
    input beside those of the context, call `assemble_tokens` with `gather_targets=True`. Not where rows were gathered
    before a projection to a narrow width, which is less work: `layer_norm_noise` then.

    Errors: ValueError as for `layer_norm_noise`. Numbers out of range are not checked on a GPU.
    """
    name = "gather_norm_noise"
    if x.ndim != 3 or index.ndim != 2 or index.shape[0] != x.shape[0] or x.shape[2] == 0:
        raise ValueError(f"{name}: expected x [B, N, D] and index [B, K], got {list(x.shape)} and {list(index.shape)}")
    check_index(name, index, x)
    start = check_draw(name, (*index.shape, x.shape[2]), x, alpha, row_key, seed, noise, eps)
    if position is not None:
        if position.shape != x.shape[1:]:
            raise ValueError(f"{name}: position must be a table {list(x.shape[1:])}, got {list(position.shape)}")
        check_constant(name, "position", position, x)
    out_dtype = check_out_dtype(name, out_dtype, x)
    given = [t.dtype for t in (alpha, noise, position) if t is not None]
    chosen = choose(name, impl, x, out_dtype, *given, channels=x.shape[2])
    return operation(name, chosen)(x, index, alpha, row_key, start, noise, position, float(eps), out_dtype)[0]


def check_draw(
    name: str,
    shape: tuple[int, ...],
    x: Tensor,
    alpha: Tensor | None,
    row_key: Tensor | None,
    seed: Tensor | int | None,
    noise: Tensor | None,
    eps: float,
) -> Tensor | None:
    """The seed as a tensor, or None beside recorded noise; `shape` is that of the noised rows [..., D].

    An alpha of another form is the caller's to check, and None here.

    Errors: ValueError where anything does not fit beside x.
    """
    if eps < 0:
        raise ValueError(f"{name}: eps must not be negative, got {eps}")
    if alpha is not None:
        if alpha.ndim >= len(shape) or alpha.shape != shape[: alpha.ndim]:
            raise ValueError(f"{name}: alpha must have leading dims of {list(shape)}, got {list(alpha.shape)}")
        check_constant(name, "alpha", alpha, x)
    if noise is not None:
        if row_key is not None or seed is not None:
            raise ValueError(f"{name}: give noise, or row_key and seed to draw it from, not both")
        if noise.shape != shape:
            raise ValueError(f"{name}: noise must be {list(shape)}, got {list(noise.shape)}")
        check_constant(name, "noise", noise, x)
        return None
    if row_key is None or seed is None:
        raise ValueError(f"{name}: without noise, row_key and seed are needed to draw it from")
    if row_key.shape != shape[:-1] or row_key.dtype != torch.int64 or row_key.device != x.device:
        raise ValueError(
            f"{name}: expected row_key int64 {list(shape[:-1])} on {x.device}, got {list(row_key.shape)}, "
            f"{row_key.dtype} on {row_key.device}"
        )
    return _seed(name, seed, x.device)


def check_constant(name: str, what: str, given: Tensor, x: Tensor) -> None:
    """Errors: ValueError where `given` is not floating, elsewhere than x, or would need a gradient."""
    if not given.dtype.is_floating_point or given.device != x.device:
        raise ValueError(f"{name}: {what} must be floating on {x.device}, got {given.dtype} on {given.device}")
    if given.requires_grad:
        raise ValueError(f"{name}: {what} is a constant here and gets no gradient, but it requires one")


def check_out_dtype(name: str, out_dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    """The dtype of the result, that of x where none is asked for. Errors: ValueError where it is not floating."""
    if out_dtype is None:
        return x.dtype
    if not out_dtype.is_floating_point:
        raise ValueError(f"{name}: out_dtype must be a floating dtype, got {out_dtype}")
    return out_dtype


def _seed(name: str, seed: Tensor | int, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.ndim or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(
                f"{name}: seed must be an int64 tensor of no dims on {device}, got {list(seed.shape)}, {seed.dtype} on "
                f"{seed.device}"
            )
        return seed
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name}: seed must be from 0 to 2 ** 63 - 1, got {seed}")
    # Filled on the device: a copy from the host would wait for it.
    return torch.full((), seed, dtype=torch.int64, device=device)
