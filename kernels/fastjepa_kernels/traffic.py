"""What each registered operation launches, and the bytes it moves in device memory, declared in one table.

A figure is that of the Triton form on the shapes and dtypes of one call; nothing is run and no number is read. Every
tensor is read once and written once, except where a function here says otherwise; a matrix product reads each operand
once, as counters of the library's products do; rows taken by an index are those that are taken. Copies that a launcher
makes of what is not contiguous are counted. Only hardware counters can confirm these figures.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjepa_kernels.attention_inputs import Inputs
from fastjepa_kernels.config import lookup

# Channels up to which the gradient of `add_layer_norm` is one pass, as in `_triton.norms`.
ONE_PASS = 4096


class Traffic(NamedTuple):
    """Kernels launched, and bytes in and out."""

    launches: int
    bytes: int


def traffic(name: str, arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    """Of one call of the operation `name` of the namespace, with all its arguments in order and its results.

    Errors: ValueError for a name that is not in the table, such as that of a reference form.
    """
    if name not in TABLE:
        raise ValueError(f"{name}: no declared launches and bytes; there are those of {', '.join(sorted(TABLE))}")
    return TABLE[name](arguments, results)


def real_bytes(x: Tensor) -> int:
    """Bytes of the values that a tensor has; those of an expanded dim are one."""
    return math.prod(size if stride else min(size, 1) for size, stride in zip(x.shape, x.stride())) * x.itemsize


def attention_bytes(q: Tensor, k: Tensor, *, backward: bool) -> int:
    """8 bytes a token and channel forward, 24 backward, in half precision; q and k in any shape.

    The rule of every census here, for the library's kernels and ours: q, k, v and the result once; backward three
    times that, which covers them, four gradients, and sums that some kernels keep in float32.
    """
    return (12 if backward else 4) * (q.numel() + k.numel()) * q.itemsize // 2


def _size(*given: Tensor | None) -> int:
    return sum(real_bytes(x) for x in given if x is not None)


def _copies(*given: Tensor | None) -> Traffic:
    """Of those that are not contiguous, each read and written once more."""
    copied = [x for x in given if x is not None and not x.is_contiguous()]
    return Traffic(len(copied), sum(real_bytes(x) + x.numel() * x.itemsize for x in copied))


def _sum(*parts: Traffic) -> Traffic:
    return Traffic(sum(part.launches for part in parts), sum(part.bytes for part in parts))


def _once(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    """One launch that reads every tensor and writes every result."""
    return Traffic(1, _size(*(x for x in arguments if isinstance(x, Tensor)), *results))


def _partial_sums(setting: str, rows: int, width: int, dtype: torch.dtype, wanted: int) -> int:
    """Bytes of the float32 rows that programs leave and a second kernel adds up: written and read."""
    tile = lookup(setting, dtype=dtype, width=width, length=rows)
    tiles = math.ceil(math.ceil(rows / tile["ROWS"]) / tile["PROGRAMS"])
    return 2 * 4 * wanted * width * math.ceil(rows / (tile["ROWS"] * max(tiles, 1)))


def _norm_backward(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    x, wanted = arguments[2], sum(arguments[6:8])
    partial = _partial_sums("layer_norm_backward", arguments[4].numel(), x.shape[-1], x.dtype, wanted)
    read = Traffic(1 + wanted, _size(*arguments[:6], *results) + partial)
    return _sum(read, _copies(arguments[0], arguments[1]))


def _add_norm_backward(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    gradient, extra, total, *rest = arguments[:10]
    of_norm, of_branch = sum(arguments[11:13]), sum(arguments[14:16])
    width, rows = total.shape[-1], arguments[4].numel()
    partial = _partial_sums("layer_norm_backward", rows, width, total.dtype, of_norm + of_branch)
    factors = _size(*rest[3:]) if arguments[15] else _size(*rest[5:])
    # Without a gradient of the normalised rows neither they nor their statistics are read.
    norm = 0 if gradient is None else _size(gradient, total, *rest[:3])
    found = Traffic(1 + bool(of_norm + of_branch), norm + factors + _size(extra, *results) + partial)
    if gradient is not None and width > ONE_PASS and (arguments[13] or of_branch):
        # Two passes with float32 rows between them, and their cast.
        wide = 4 * total.numel()
        found = _sum(found, Traffic(1 + bool(of_norm and of_branch) + (total.dtype != torch.float32), 3 * wide))
    return _sum(found, _copies(gradient, extra))


def _gelu_backward(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    gradient, product, bias, wanted = arguments
    rows, width = product.shape
    partial = _partial_sums("bias_gelu_backward", rows, width, product.dtype, int(wanted))
    found = Traffic(1 + wanted, _size(gradient, product, bias, *results) + partial)
    return _sum(found, _copies(gradient, product))


def _mlp(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    """The first product with its epilogue, then the library's, which reads what the GELU gave."""
    x, w1, b1, w2, _ = arguments
    out, before, _ = results
    activation = out.shape[0] * w1.shape[0] * out.itemsize
    return _sum(Traffic(2, _size(x, w1, b1, w2, out, before) + 2 * activation), _copies(x, w1))


def _gelu_product(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    gradient, weight, before, wanted = arguments
    (rows, inner), outer = gradient.shape, weight.shape[1]
    block = lookup("gelu_product_backward", dtype=before.dtype, width=inner, length=rows)["BLOCK_M"]
    partial = 2 * 4 * wanted * outer * math.ceil(rows / block)
    found = Traffic(1 + wanted, _size(gradient, weight, before, *results) + partial)
    return _sum(found, _copies(gradient, weight, before))


def _with_copies(*places: int) -> Callable[[Sequence[Any], Sequence[Tensor]], Traffic]:
    """`_once`, and copies of the arguments at these places where they are not contiguous."""
    return lambda arguments, results: _sum(_once(arguments, results), _copies(*(arguments[n] for n in places)))


def _patches(video: Tensor, index: Tensor | None, tubelet: int, patch: int) -> tuple[int, int]:
    """Kept patches, and values of one."""
    clips, channels, frames, height, width = video.shape
    every = clips * (frames // tubelet) * (height // patch) * (width // patch)
    return every if index is None else index.numel(), channels * tubelet * patch * patch


def _patch_embed(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    video, weight, bias, index, position, _, _, tubelet, patch, out_dtype, fused = arguments
    rows, values = _patches(video, index, tubelet, patch)
    pixels = rows * values * video.itemsize
    last = _size(bias, position, index, *results)
    if fused:
        return Traffic(1, pixels + _size(weight) + last)
    cut = Traffic(1, pixels + _size(index) + rows * values * weight.itemsize)
    made = rows * weight.shape[0] * weight.itemsize
    product = rows * values * weight.itemsize + _size(weight)
    if position is None and out_dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype):
        return _sum(cut, Traffic(1, product + _size(bias, *results)))
    return _sum(cut, Traffic(1, product + made), Traffic(1, made + last))


def _patch_embed_backward(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    gradient, video, index, _, _, tubelet, patch, dtype, for_weight, for_bias = arguments
    rows, values = _patches(video, index, tubelet, patch)
    parts = [_copies(gradient)]
    if for_weight:
        cut = rows * values * dtype.itemsize
        cast = gradient.numel() * (gradient.itemsize + dtype.itemsize) if dtype != gradient.dtype else 0
        parts.append(Traffic(1, rows * values * video.itemsize + _size(index) + cut))
        parts.append(Traffic(1 + bool(cast), cast + cut + gradient.numel() * dtype.itemsize + _size(results[0])))
    if for_bias:
        parts.append(Traffic(1, _size(gradient, results[1])))
    return _sum(*parts)


def _row_numbers(lengths: Tensor | None, rows: int) -> Traffic:
    """The clip of each row where lengths differ: numbers counted up, then looked up as int64."""
    return Traffic(0, 0) if lengths is None else Traffic(2, rows * (2 * lengths.itemsize + 2 * 8))


def _assemble(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    context, context_index, target_index, table, token, targets = arguments[:6]
    context_lengths, target_lengths, _, gather = arguments[10:14]
    seen, asked = context_index.numel(), target_index.numel()
    goal = asked * targets.shape[-1] * targets.itemsize if gather else _size(targets)
    # Without positions no index is read, unless targets are gathered.
    positions = 0 if table is None else (seen + asked) * table.shape[-1] * table.itemsize
    indices = [] if table is None and not gather else [target_index] if table is None else [context_index, target_index]
    moved = _size(context, *indices, token, *arguments[6:12], *results) + goal + positions
    numbers = [_row_numbers(context_lengths, seen), _row_numbers(target_lengths, asked)]
    return _sum(Traffic(1, moved), *numbers)


def _sum_of_targets(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    gradient, context, clips, context_lengths, target_lengths = arguments
    width = gradient.shape[-1]
    sums = lookup("assemble_sum", dtype=gradient.dtype, width=width)
    asked = (gradient.shape[-2] - context) * math.prod(gradient.shape[:-2]) * width * gradient.itemsize
    partial = 2 * 4 * clips * sums["SPLITS"] * width
    found = Traffic(2, asked + partial + _size(context_lengths, target_lengths, *results))
    return _sum(found, _copies(gradient))


def _attention_rows(case: Inputs) -> tuple[int, int]:
    """Values of all queries and of all keys that may take part."""
    if case.starts is not None:
        rows = case.q.shape[0] * case.heads * case.head
        return rows, rows
    row = case.clips * case.heads * case.head
    return row * case.queries, row * case.keys


def _ready(case: Inputs) -> Traffic:
    """Rows that are turned are written out before, one launch each for queries, keys and values."""
    if not case.grid:
        return Traffic(0, 0)
    queries, keys = _attention_rows(case)
    return Traffic(3, 2 * (queries + 2 * keys) * case.q.itemsize)


def _attention(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    """One launch, by the rule; ours is one."""
    case = Inputs(*arguments)
    queries, keys = _attention_rows(case)
    found = Traffic(1, 4 * (queries + keys) * case.q.itemsize // 2 + _size(*case[3:11]))
    return _sum(found, _ready(case))


def _bias_sums(case: Inputs) -> int:
    """Float32 values of the rows of sums that programs leave for the gradient of a bias."""
    where: dict[str, Any] = {"dtype": case.q.dtype, "width": case.head}
    if case.grid:
        asking = seen = lookup("indexed_attention_ready", **where)["BLOCK"]
    else:
        asking = lookup("indexed_attention_query_biased", length=case.queries, **where)["BLOCK_M"]
        seen = lookup("indexed_attention_key_biased", length=case.queries, **where)["BLOCK_N"]
    rows = math.ceil(case.queries / asking) + 2 * math.ceil(case.keys / seen)
    return rows * case.clips * case.heads * case.head


def _attention_backward(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    """One launch, by the rule that counts the library's kernels so; ours are two, after zeros where an index is."""
    gradient, out, lse, *given, bias_wanted = arguments
    case = Inputs(*given)
    queries, keys = _attention_rows(case)
    found = Traffic(1, 12 * (queries + keys) * case.q.itemsize // 2 + _size(*case[3:11]))
    if case.q_index is not None or case.kv_index is not None:
        found = _sum(found, Traffic(1 if case.packed else 3, _size(*results[:3])))
    if case.grid:
        # Written out again, and their gradients written back.
        found = _sum(found, _ready(case), Traffic(3, 2 * (queries + 2 * keys) * case.q.itemsize))
    if bias_wanted:
        # Partial sums of the bias: written, and read by one launch, or by one each for queries, keys and values.
        found = _sum(found, Traffic(3 if case.grid else 1, 8 * _bias_sums(case) + _size(results[3])))
    return _sum(found, _copies(gradient, out, lse))


def _gather(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    return Traffic(1, _size(arguments[1]) + 2 * _size(results[0]))


def _inverse(index: Tensor, tokens: int) -> Traffic:
    """The place of every token in its mask, int32: filled, written by the kept ones, read again."""
    every = 4 * math.prod(index.shape[:-1]) * tokens
    return Traffic(2, 2 * every + _size(index) + 4 * index.numel())


def _gather_backward(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    gradient, index, tokens, unique = arguments
    found = Traffic(1, _size(gradient, *results))
    if unique:
        return _sum(found, _inverse(index, tokens), _copies(gradient))
    # A cast where the index is int32, the sort (numbers and places, in and out), the borders, and their search.
    bounds = 8 * math.prod(index.shape[:-1]) * (tokens + 1)
    sort = Traffic(4 + (index.dtype != torch.int64), _size(index) + 8 * 6 * index.numel() + 5 * bounds)
    return _sum(found, sort, _copies(gradient))


def _scatter(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    x, index, tokens, fill = arguments
    return _sum(Traffic(1, _size(x, fill, *results)), _inverse(index, tokens))


def _gather_noise(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    x, index, *rest = arguments
    taken = index.numel() * x.shape[-1] * x.itemsize
    position = rest[4]
    places = 0 if position is None else index.numel() * x.shape[-1] * position.itemsize
    return Traffic(1, taken + places + _size(index, *rest[:4], *results))


def _noise_backward(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    gradient, x, index, *rest = arguments
    if index is None:
        return _once(arguments, results)
    taken = index.numel() * x.shape[-1] * x.itemsize
    return _sum(Traffic(1, taken + _size(gradient, *rest, *results)), _inverse(index, x.shape[1]))


def _loss(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    prediction, target, index = arguments[:3]
    taken = index.numel() * target.shape[-1] * target.itemsize
    # A float32 sum a row is written and read by a second kernel.
    return Traffic(2, _size(prediction, index, *results) + taken + 8 * index.numel())


def _loss_backward(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    upstream, prediction, target, index, mean, rstd = arguments[:6]
    taken = index.numel() * target.shape[-1] * target.itemsize
    return Traffic(1, _size(upstream, prediction, index, mean, rstd, *results) + taken)


def _groups(*lists: Sequence[Tensor]) -> int:
    """Launches over lists of tensors: one for all of a kind, one for each not contiguous.

    A kind has the same dtypes, alignment, and empty tensors in place of what is not there.
    """
    groups, alone = set(), 0
    for tensors in zip(*lists):
        if not tensors[0].numel():
            continue
        if all(x.is_contiguous() for x in tensors):
            kind = tuple(x.dtype if x.numel() else None for x in tensors)
            groups.add((kind, tensors[0].numel() % 16 == 0))
        else:
            alone += 1
    return len(groups) + alone


def _ema(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    targets, onlines, move = arguments
    return Traffic(_groups(targets, onlines), 2 * _size(*targets) + _size(*onlines, move))


def _adamw(arguments: Sequence[Any], results: Sequence[Tensor]) -> Traffic:
    parameters, gradients, means, squares, targets, copies, target_copies, scalars = arguments[:8]
    lists = [one for one in (parameters, gradients, means, squares, targets, copies, target_copies) if one]
    both = 2 * _size(*parameters, *means, *squares, *targets)
    return Traffic(_groups(*lists), both + _size(*gradients, *copies, *target_copies, scalars))


TABLE: dict[str, Callable[[Sequence[Any], Sequence[Tensor]], Traffic]] = {
    "adamw_ema_": _adamw,
    "add_layer_norm": _once,
    "add_layer_norm_backward": _add_norm_backward,
    "assemble_tokens": _assemble,
    "bias_gelu": _with_copies(0),
    "bias_gelu_backward": _gelu_backward,
    "ema_update_": _ema,
    "gather_norm_noise": _gather_noise,
    "gather_tokens": _gather,
    "gather_tokens_backward": _gather_backward,
    "gelu_product_backward": _gelu_product,
    "indexed_attention": _attention,
    "indexed_attention_backward": _attention_backward,
    "layer_norm": _once,
    "layer_norm_backward": _norm_backward,
    "layer_norm_noise": _once,
    "linear_gelu": _with_copies(0, 1),
    "mlp": _mlp,
    "noise_backward": _noise_backward,
    "patch_embed_gather": _patch_embed,
    "patch_embed_gather_backward": _patch_embed_backward,
    "philox_normal": _once,
    "rope3d": _once,
    "scatter_tokens": _scatter,
    "sum_of_targets": _sum_of_targets,
    "target_loss": _loss,
    "target_loss_backward": _loss_backward,
}
