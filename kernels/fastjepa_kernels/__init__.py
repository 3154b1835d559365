"""Kernels for masked video transformers: a plain PyTorch reference and a Triton form of each operation.

Import needs torch alone. Triton is loaded at the first launch on a GPU; without either, every operation runs through
its reference.
"""

from fastjepa_kernels.dispatch import explain, use
from fastjepa_kernels.functional import gather_tokens, scatter_tokens
from fastjepa_kernels.losses import target_loss
from fastjepa_kernels.norms import add_layer_norm, layer_norm
from fastjepa_kernels.updates import adamw_ema_, ema_update_

__version__ = "0.1.0"
__all__ = [
    "adamw_ema_",
    "add_layer_norm",
    "ema_update_",
    "explain",
    "gather_tokens",
    "layer_norm",
    "scatter_tokens",
    "target_loss",
    "use",
]
