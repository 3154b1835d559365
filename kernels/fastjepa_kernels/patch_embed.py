"""Embedding of video patches: what to call. B clips, M masks of a clip, N tokens, K kept tokens, D width."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastjepa_kernels.checks import check_form, check_index
from fastjepa_kernels.dispatch import Impl, choose
from fastjepa_kernels.ops import patch_embed as _patch_embed_ops  # noqa: F401  (registers the operators)
from fastjepa_kernels.precision import autocast_dtype
from fastjepa_kernels.registry import operation

Form = Literal["auto", "fused", "cut"]


def patch_embed_gather(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    *,
    tubelet: int,
    patch: int,
    position: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
    form: Form = "auto",
) -> Tensor:
    """Embed the kept patches of a clip and no others: video [B, C, T, H, W] -> [B, K, D].

    `video` is uint8 or floating, any strides with neighbouring pixels are read in place; T, H and W are multiples of
    `tubelet` and `patch`. `weight` is that of Conv3d [D, C, t, p, p] or [D, C * t * p * p], values of a patch in the
    order (c, t, p, q); `bias` [D]. `index` int32 or int64 [B, K] names kept tokens from 0 to N - 1 in time, row, column
    order; [M, B, K] gives [M * B, K, D], mask after mask; None keeps all. `position` [N, D] is a constant table, added
    by token number. uint8 pixels are divided by 255; `mean` and `std`, C numbers each and given together, normalise
    both kinds as (x - mean) / std. Pixels are normalised in float32 and rounded to the weight's dtype, products are
    summed in float32, and the result is of `out_dtype`, or the weight's dtype. Autocast casts weight and result as it
    does for Conv3d.

    The weight and bias get gradients, video and position none. The backward pass cuts the patches again, nothing but
    the video and the index is kept: the weight's gradient is one product of the library, the bias' a column sum of
    float32. Repeatable where the library's products are.

    `form` "cut" writes kept patches (P = C * t * p * p values each) for a product of the library, and adds position in
    a further pass; "fused" cuts in a product of its own: P pixels a kept token in for every 128 columns, D out. "auto"
    is "cut", source: static, not measured yet. 2 * P * D FLOPs a kept token forward, and backward again. A form asked
    for by name runs in Triton or raises.

    It replaces normalisation of the whole clip, Conv3d on all tokens, the addition of positions and the gather. Not for
    overlapping or padded patches, nor for a video or a position table that needs a gradient.

    Errors: ValueError for shapes, dtypes, devices, a form or an implementation that cannot run (Triton takes no
    float64). Token numbers out of range are not checked on a GPU.
    """
    size = video.shape[1] * tubelet * patch * patch if video.ndim == 5 else 0
    if min(tubelet, patch) < 1 or not size or any(n % s for n, s in zip(video.shape[2:], (tubelet, patch, patch))):
        raise ValueError(
            f"patch_embed_gather: expected video [B, C, T, H, W] with T a multiple of tubelet {tubelet}, H and W of "
            f"patch {patch}, got {list(video.shape)}"
        )
    if not video.dtype.is_floating_point and video.dtype != torch.uint8:
        raise ValueError(f"patch_embed_gather: video must be uint8 or of a floating dtype, got {video.dtype}")
    whole = (video.shape[1], tubelet, patch, patch)
    if weight.ndim not in (2, 5) or weight.shape[1:] not in ((size,), whole) or not weight.dtype.is_floating_point:
        raise ValueError(
            f"patch_embed_gather: expected a floating weight [D, {size}] or [D, {', '.join(map(str, whole))}], got "
            f"{list(weight.shape)}, {weight.dtype}"
        )
    tokens = video.shape[2] // tubelet * (video.shape[3] // patch) * (video.shape[4] // patch)
    for what, given, shape in (("bias", bias, weight.shape[:1]), ("position", position, (tokens, weight.shape[0]))):
        if given is not None and (given.shape != shape or not given.dtype.is_floating_point):
            raise ValueError(
                f"patch_embed_gather: expected a floating {what} {list(shape)}, got {list(given.shape)}, {given.dtype}"
            )
    for what, given in (("weight", weight), ("bias", bias), ("position", position), ("index", index)):
        if given is not None and given.device != video.device:
            raise ValueError(f"patch_embed_gather: video is on {video.device}, {what} on {given.device}")
    if index is not None:
        check_index("patch_embed_gather", index, weight)
        if index.ndim not in (2, 3) or index.shape[-2] != video.shape[0]:
            raise ValueError(
                f"patch_embed_gather: expected index [B, K] or [M, B, K] for {video.shape[0]} clips, got "
                f"{list(index.shape)}"
            )
        index = index if index.ndim == 3 else index.unsqueeze(0)
    level, spread = [] if mean is None else [float(x) for x in mean], [] if std is None else [float(x) for x in std]
    if len(level) != len(spread) or len(level) not in (0, video.shape[1]) or min(spread, default=1.0) <= 0:
        raise ValueError(
            f"patch_embed_gather: expected mean and std together, {video.shape[1]} numbers each and std above 0, got "
            f"{mean} and {std}"
        )
    if torch.is_grad_enabled() and (video.requires_grad or (position is not None and position.requires_grad)):
        raise ValueError("patch_embed_gather: video and position get no gradient here: detach them, or add outside")
    weight = weight.flatten(1).to(autocast_dtype(weight) or weight.dtype)
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    if not out_dtype.is_floating_point:
        raise ValueError(f"patch_embed_gather: out_dtype must be a floating dtype, got {out_dtype}")
    dtypes = [x.dtype for x in (video, bias, position) if x is not None]
    chosen = choose("patch_embed_gather", impl, weight, out_dtype, *dtypes)
    check_form("patch_embed_gather", form, get_args(Form), chosen)
    run = operation("patch_embed_gather", chosen)
    return run(video, weight, bias, index, position, level, spread, tubelet, patch, out_dtype, form == "fused")
