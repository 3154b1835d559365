"""Normalised rows mixed with noise in plain PyTorch. B clips, N tokens, K kept tokens, D width."""

import torch
from torch import Tensor

from fastjepa_kernels.reference import philox
from fastjepa_kernels.reference.gather import gather, scatter
from fastjepa_kernels.reference.norms import layer_norm, layer_norm_backward


def philox_normal(row_key: Tensor, width: int, seed: Tensor) -> Tensor:
    """row_key int64 [...] -> float32 [..., width]."""
    return philox.noise(row_key, width, seed)


def _share(alpha: Tensor, ndim: int, dtype: torch.dtype) -> Tensor:
    """alpha of some leading dims, ready to multiply [..., D]."""
    return alpha.to(dtype).reshape(*alpha.shape, *([1] * (ndim - alpha.ndim)))


def layer_norm_noise(
    x: Tensor,
    alpha: Tensor,
    row_key: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    position: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] -> mixed [..., D], mean [...], 1 / standard deviation [...]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normal, mean, rstd = layer_norm(x, None, None, eps, wide)
    if noise is None:
        assert row_key is not None, "without noise there is a row key"
        assert seed is not None, "without noise there is a seed"
        noise = philox.noise(row_key, x.shape[-1], seed, wide)
    share = _share(alpha, x.ndim, wide)
    out = share.sqrt() * normal + (1.0 - share).sqrt() * noise.to(wide)
    if position is not None:
        out = out + position.to(wide)
    return out.to(out_dtype).contiguous(), mean, rstd


def gather_norm_noise(
    x: Tensor,
    index: Tensor,
    alpha: Tensor,
    row_key: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    position: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, N, D], index [B, K], position [N, D] -> mixed [B, K, D], mean [B, K], 1 / standard deviation [B, K]."""
    places = None if position is None else position[index.long()]
    return layer_norm_noise(gather(x, index.unsqueeze(0)), alpha, row_key, seed, noise, places, eps, out_dtype)


def noise_backward(
    gradient: Tensor, x: Tensor, index: Tensor | None, alpha: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Gradient [..., D] of the mixed rows -> that of x, of its shape and dtype; zero where `index` leaves one out."""
    rows = x if index is None else gather(x, index.unsqueeze(0))
    scaled = gradient.to(mean.dtype) * _share(alpha, rows.ndim, mean.dtype).sqrt()
    dx, _, _ = layer_norm_backward(scaled, None, rows, None, mean, rstd, False, False)
    return dx.contiguous() if index is None else scatter(dx, index, x.shape[1], None)
