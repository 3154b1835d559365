"""The operations, one function each: what to call.

B clips, M masks of a clip, N tokens, K kept tokens, D width. Bytes and FLOPs are of the Triton form.
"""

from torch import Tensor

from fastjepa_kernels.checks import check_index
from fastjepa_kernels.dispatch import Impl, choose
from fastjepa_kernels.ops import gather as _gather_ops  # noqa: F401  (registers the operators)
from fastjepa_kernels.registry import operation


def gather_tokens(x: Tensor, index: Tensor, *, assume_unique: bool = True, impl: Impl = "auto") -> Tensor:
    """Keep the named tokens: x [B, N, D] and index [B, K] -> [B, K, D]; index [M, B, K] -> [M * B, K, D].

    Order of the index is kept; several masks come one after another, as the public `apply_masks` stacks them. `x` is of
    any floating dtype and any strides with neighbouring channels, `index` int32 or int64 with numbers from 0 to N - 1.
    `assume_unique=False` allows a mask to name a token twice.

    Moves D values in and out for each kept token (and one index); no FLOPs. The backward pass writes every token once,
    sums over masks in float32 in the order of the masks and is bitwise repeatable: no expanded index, no zero-filling
    pass, no atomics. It replaces `torch.gather` with an expanded index (which writes 8 bytes of index for every value),
    timm's patch dropout and MAE's random masking. Not for columns or single values: `torch.gather` does those.

    Errors: ValueError for shapes, dtypes or an implementation that cannot run. Numbers out of range are not checked on
    a GPU.
    """
    if x.ndim != 3 or index.ndim not in (2, 3) or index.shape[-2] != x.shape[0]:
        raise ValueError(
            f"gather_tokens: expected x [B, N, D] and index [B, K] or [M, B, K], got {list(x.shape)} and "
            f"{list(index.shape)}"
        )
    check_index("gather_tokens", index, x)
    run = operation("gather_tokens", choose("gather_tokens", impl, x))
    return run(x, index if index.ndim == 3 else index.unsqueeze(0), assume_unique)


def scatter_tokens(x: Tensor, index: Tensor, tokens: int, fill: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """Put kept tokens back: x [B, K, D], index [B, K] -> [B, tokens, D]; elsewhere `fill` [D], or zeros.

    A clip names no token twice. Every row of the result is written once; D values in for each kept token, D out for
    each token; no FLOPs. Repeatable, no atomics. It replaces a zero-filled `scatter_`, and the insertion of mask tokens
    of MAE-like decoders. Not where most tokens are kept already in order: `torch.where` on the whole tensor is as fast.

    Errors: ValueError as for `gather_tokens`, and for a `fill` of another width or dtype.
    """
    if x.ndim != 3 or index.ndim != 2 or index.shape != x.shape[:2]:
        raise ValueError(
            f"scatter_tokens: expected x [B, K, D] and index [B, K], got {list(x.shape)} and {list(index.shape)}"
        )
    if index.shape[1] > tokens:
        raise ValueError(f"scatter_tokens: {index.shape[1]} kept tokens do not fit into {tokens}")
    if fill is not None and (fill.shape != x.shape[2:] or fill.device != x.device):
        raise ValueError(f"scatter_tokens: expected fill [{x.shape[2]}] on {x.device}, got {list(fill.shape)}")
    check_index("scatter_tokens", index, x)
    return operation("scatter_tokens", choose("scatter_tokens", impl, x))(x, index, tokens, fill)
