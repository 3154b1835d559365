"""The input of a predictor, one function: what to call.

B clips, N tokens, Kc context and Kt target tokens of a clip, P width; Rc and Rt rows of all clips where lengths differ.
Bytes and FLOPs are of the Triton form.
"""

import torch
from torch import Tensor

from fastjepa_kernels.checks import check_index
from fastjepa_kernels.dispatch import Impl, choose
from fastjepa_kernels.noise import check_constant, check_draw, check_out_dtype
from fastjepa_kernels.ops import assemble as _assemble_ops  # noqa: F401  (registers the operators)
from fastjepa_kernels.registry import operation

NAME = "assemble_tokens"


def assemble_tokens(
    context: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    table: Tensor | None,
    mask_token: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    alpha: Tensor | None = None,
    row_key: Tensor | None = None,
    seed: Tensor | int | None = None,
    noise: Tensor | None = None,
    eps: float = 1e-5,
    gather_targets: bool = False,
    context_lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The rows that enter a predictor, each written once: context + positions, then targets + positions, of each clip.

    `context` [B, Kc, P] (projected) with `context_index` [B, Kc], and targets at `target_index` [B, Kt]
    -> [B, Kc + Kt, P]. `table` [N, P] holds the positions of all tokens and is read at both indices (int32 or int64,
    0 to N - 1); None adds no positions, for rotary attention. At the targets stands one of

    - `mask_token` [P], or [B, P], a row a clip (for clips of several mask sets, each set with its token);
    - `targets` [B, Kt, P], rows as they are;
    - `targets` with `alpha` [], [B] or [B, Kt]: normalised and mixed with noise as `layer_norm_noise` does, from
      `row_key` [B, Kt] and `seed`, or from recorded `noise` [B, Kt, P].

    `gather_targets=True` reads `targets` [B, N, P] at `target_index`, where a clip names no token twice.

    Where lengths differ, rows of all clips one after another: context [Rc, P], indices [Rc] and [Rt], targets and noise
    [Rt, P], row_key [Rt], alpha [B], and `context_lengths`, `target_lengths` int32 or int64 [B + 1], cumulative from 0
    to Rc and to Rt, on the device -> [Rc + Rt, P], clip by clip, whose cumulative lengths are the sum of both. Not with
    `gather_targets`.

    Floating dtypes may all differ; sums are float32 and rounded once to `out_dtype`, or to that of `context`. Context
    and targets are read in place where channels are neighbours; the result is contiguous.

    Moves P values in (of the context or target) and P out a row, the position where there is one, and an index; noise
    and statistics as for `layer_norm_noise`; one launch. 1 FLOP a value, about 12 for noised ones; counters see none.
    Backward: the gradient of the context is cut out (a view where dtypes agree), and so is that of ready rows; noised
    rows take one pass, as for `layer_norm_noise`; the gradient of a mask token is the sum over its rows, float32, 8
    partial sums a clip added in a fixed order. Bitwise repeatable, no atomics. `table`, `alpha` and `noise` are
    constants without a gradient; there is no second derivative. Where lengths differ, backward copies the gradient of
    context and of targets once.

    It replaces two gathers of positions, two additions, the noising and a concatenation. Not for learned positions.

    Errors: ValueError for shapes, dtypes, devices, constants that require a gradient, targets given in two ways or
    none, or an implementation that cannot run (Triton takes no float64 and up to 8192 channels). Numbers out of range
    are not checked on a GPU.
    """
    ragged = context_lengths is not None or target_lengths is not None
    _check_rows(context, context_index, target_index, table, ragged)
    clips = _check_lengths(context, context_lengths, target_lengths, gather_targets) if ragged else len(context)
    start = None
    if (mask_token is None) == (targets is None):
        raise ValueError(f"{NAME}: give either mask_token or targets")
    if mask_token is not None:
        _check_token(context, mask_token, clips)
        if alpha is not None or row_key is not None or seed is not None or noise is not None or gather_targets:
            raise ValueError(f"{NAME}: alpha, row_key, seed, noise and gather_targets need targets, not mask_token")
    if targets is not None:
        _check_targets(context, target_index, table, targets, gather_targets)
        if alpha is None and (row_key is not None or seed is not None or noise is not None):
            raise ValueError(f"{NAME}: row_key, seed and noise need alpha, the share of the signal")
        if alpha is not None:
            if ragged and alpha.shape != (clips,):
                raise ValueError(f"{NAME}: where lengths differ alpha must be [{clips}], got {list(alpha.shape)}")
            check_constant(NAME, "alpha", alpha, context)
            shape = (*target_index.shape, context.shape[-1])
            start = check_draw(NAME, shape, context, None if ragged else alpha, row_key, seed, noise, eps)
    out_dtype = check_out_dtype(NAME, out_dtype, context)
    given = [t.dtype for t in (table, mask_token, targets, alpha, noise) if t is not None]
    chosen = choose(NAME, impl, context, out_dtype, *given, channels=context.shape[-1])
    return operation(NAME, chosen)(
        context, context_index, target_index, table, mask_token, targets, alpha, row_key, start, noise,
        context_lengths, target_lengths, float(eps), gather_targets, out_dtype,
    )[0]  # fmt: skip


def _check_rows(
    context: Tensor, context_index: Tensor, target_index: Tensor, table: Tensor | None, ragged: bool
) -> None:
    dims = 1 if ragged else 2
    names = "[R, P], [R] and [R]" if ragged else "[B, Kc, P], [B, Kc] and [B, Kt]"
    if (
        context.ndim != dims + 1
        or context.shape[-1] == 0
        or context_index.shape != context.shape[:-1]
        or target_index.ndim != dims
        or target_index.shape[:-1] != context_index.shape[:-1]
    ):
        raise ValueError(
            f"{NAME}: expected context, context_index and target_index {names}, got {list(context.shape)}, "
            f"{list(context_index.shape)} and {list(target_index.shape)}"
        )
    check_index(NAME, context_index, context)
    check_index(NAME, target_index, context)
    if table is None:
        return
    if table.ndim != 2 or table.shape[1] != context.shape[-1]:
        raise ValueError(f"{NAME}: expected table [N, {context.shape[-1]}], got {list(table.shape)}")
    check_constant(NAME, "table", table, context)


def _check_lengths(
    context: Tensor, context_lengths: Tensor | None, target_lengths: Tensor | None, gather_targets: bool
) -> int:
    if context_lengths is None or target_lengths is None:
        raise ValueError(f"{NAME}: context_lengths and target_lengths go together")
    if gather_targets:
        raise ValueError(f"{NAME}: gather_targets needs clips of one length, without context_lengths")
    for name, lengths in (("context_lengths", context_lengths), ("target_lengths", target_lengths)):
        if lengths.ndim != 1 or lengths.shape != context_lengths.shape or len(lengths) < 2:
            raise ValueError(f"{NAME}: {name} must be cumulative, [B + 1], got {list(lengths.shape)}")
        if lengths.dtype not in (torch.int32, torch.int64) or lengths.device != context.device:
            raise ValueError(
                f"{NAME}: {name} must be int32 or int64 on {context.device}, got {lengths.dtype} on {lengths.device}"
            )
    return len(context_lengths) - 1


def _check_token(context: Tensor, mask_token: Tensor, clips: int) -> None:
    width = context.shape[-1]
    if mask_token.shape != (width,) and mask_token.shape != (clips, width):
        raise ValueError(f"{NAME}: mask_token must be [{width}] or [{clips}, {width}], got {list(mask_token.shape)}")
    if not mask_token.dtype.is_floating_point or mask_token.device != context.device:
        raise ValueError(
            f"{NAME}: mask_token must be floating on {context.device}, got {mask_token.dtype} on {mask_token.device}"
        )


def _check_targets(
    context: Tensor, target_index: Tensor, table: Tensor | None, targets: Tensor, gather_targets: bool
) -> None:
    tokens = targets.shape[1:2] if table is None else table.shape[:1]
    rows = (len(context), *tokens) if gather_targets else tuple(target_index.shape)
    if targets.shape != (*rows, context.shape[-1]):
        raise ValueError(f"{NAME}: targets must be {[*rows, context.shape[-1]]}, got {list(targets.shape)}")
    if not targets.dtype.is_floating_point or targets.device != context.device:
        raise ValueError(
            f"{NAME}: targets must be floating on {context.device}, got {targets.dtype} on {targets.device}"
        )
