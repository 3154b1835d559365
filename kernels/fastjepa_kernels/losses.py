"""Losses, one function each. B clips, M masks of a clip, N tokens, K kept tokens, D width."""

import math

from torch import Tensor

from fastjepa_kernels.checks import check_index
from fastjepa_kernels.dispatch import Impl, choose
from fastjepa_kernels.ops import target_loss as _target_loss_ops  # noqa: F401  (registers the operators)
from fastjepa_kernels.registry import operation


def target_loss(
    prediction: Tensor,
    target: Tensor,
    index: Tensor,
    *,
    exponent: float = 1.0,
    eps: float = 1e-5,
    impl: Impl = "auto",
) -> Tensor:
    """Mean of |p - t| ** q / q between predictions and the normalised target features of the kept tokens: a scalar.

    `prediction` [M * B, K, D], mask after mask as `gather_tokens` gives them; `target` [B, N, D], features as the
    target encoder leaves them: the named rows are normalised here (LayerNorm without affine); `index` int32 or int64,
    [M, B, K] or [B, K], numbers from 0 to N - 1, any of them repeated. q is `exponent`, above 0. Floating dtypes may
    differ, any strides with neighbouring channels are read in place. Statistics, sums and the loss are float32
    (float64 in the reference where an input is); the gradient has the dtype of `prediction` and is 0 where p = t, for
    every q. `target` is a constant and gets no gradient; there is no second derivative.

    Masks of one length in one call: their mean is the mean over masks of each mask's mean. Masks of different lengths
    take one call each (index [B, K]), and the caller averages: one mean over all rows would weigh long masks more.

    Moves 2 D values in for each kept token in either pass and D out in the backward pass, besides the index and three
    float32 a token; about 10 FLOPs a value. Sums of rows are added in a fixed order without atomics, so results repeat
    bit for bit. `prediction` and the whole `target` are kept for the backward pass. It replaces `F.layer_norm` of all N
    tokens, the gather of each mask, and the loop over masks. Not where normalised targets are needed elsewhere anyway
    (a predictor that noises them), nor for weights of tokens or smooth L1.

    Errors: ValueError for shapes, dtypes, devices, an exponent or eps that is not above 0, nothing to compare, or an
    implementation that cannot run (Triton takes no float64 and up to 8192 channels). Numbers out of range are not
    checked on a GPU.
    """
    if prediction.ndim != 3 or target.ndim != 3 or index.ndim not in (2, 3):
        raise ValueError(
            "target_loss: expected prediction [M * B, K, D], target [B, N, D] and index [B, K] or [M, B, K], got "
            f"{list(prediction.shape)}, {list(target.shape)} and {list(index.shape)}"
        )
    masks = index if index.ndim == 3 else index.unsqueeze(0)
    expected = (masks.shape[0] * masks.shape[1], masks.shape[2], target.shape[2])
    if masks.shape[1] != target.shape[0] or prediction.shape != expected:
        raise ValueError(
            f"target_loss: index {list(index.shape)} and target {list(target.shape)} do not fit prediction "
            f"{list(prediction.shape)}: expected [M * B, K, D] with index [B, K] or [M, B, K] and target [B, N, D]"
        )
    check_index("target_loss", index, prediction)
    if not target.dtype.is_floating_point or target.device != prediction.device:
        raise ValueError(
            f"target_loss: target must be of a floating dtype on {prediction.device}, got {target.dtype} on "
            f"{target.device}"
        )
    for name, number in (("exponent", exponent), ("eps", eps)):
        if not 0 < number < math.inf:
            raise ValueError(f"target_loss: {name} must be above 0 and finite, got {number}")
    if prediction.numel() == 0:
        raise ValueError(f"target_loss: nothing to compare, prediction is {list(prediction.shape)}")
    chosen = choose("target_loss", impl, prediction, target.dtype, channels=target.shape[2])
    return operation("target_loss", chosen)(prediction, target.detach(), masks, float(exponent), float(eps))[0]
