"""Kernels for masked video transformers: a plain PyTorch reference and a Triton form of each operation.

Import needs torch alone. Triton is loaded at the first launch on a GPU; without either, every operation runs through
its reference.
"""

from fastjepa_kernels.assemble import assemble_tokens
from fastjepa_kernels.attention_dispatch import attention, explain_attention
from fastjepa_kernels.dispatch import Impl, explain, use, why_not_triton
from fastjepa_kernels.functional import gather_tokens, scatter_tokens
from fastjepa_kernels.indexed import indexed_attention
from fastjepa_kernels.integrations.patcher import patch
from fastjepa_kernels.losses import target_loss
from fastjepa_kernels.mlp import linear_gelu, mlp
from fastjepa_kernels.noise import gather_norm_noise, layer_norm_noise, philox_normal, row_keys
from fastjepa_kernels.norms import add_layer_norm, layer_norm, layer_norm_through
from fastjepa_kernels.patch_embed import patch_embed_gather
from fastjepa_kernels.positions import Rope
from fastjepa_kernels.rope import rope3d
from fastjepa_kernels.updates import adamw_ema_, ema_update_

__version__ = "0.1.0"
__all__ = [
    "Impl",
    "Rope",
    "adamw_ema_",
    "add_layer_norm",
    "assemble_tokens",
    "attention",
    "ema_update_",
    "explain",
    "explain_attention",
    "gather_norm_noise",
    "gather_tokens",
    "indexed_attention",
    "layer_norm",
    "layer_norm_noise",
    "layer_norm_through",
    "linear_gelu",
    "mlp",
    "patch",
    "patch_embed_gather",
    "philox_normal",
    "rope3d",
    "row_keys",
    "scatter_tokens",
    "target_loss",
    "use",
    "why_not_triton",
]
