"""First-generation V-JEPA for transformers: after this import AutoConfig and AutoModel take exported folders.

transformers has no class for these networks itself: its VJEPA2Model has rotary positions. Needs the package
transformers, which nothing else here does.
"""

from typing import Any

from torch import Tensor

try:
    from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput
except ImportError as error:
    raise ImportError("fastjepa.transformers_model needs transformers: pip install transformers") from error

from functools import partial

from torch import nn

from fastjepa.interop.folder import MODEL_TYPE
from fastjepa.models import VisionTransformer


class VJEPAConfig(PretrainedConfig):
    """config.json of an exported folder; names and meanings are those of `fastjepa.interop.folder.architecture_of`."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        layer_norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        sdpa_ignores_scale: bool = False,
        in_chans: int = 3,
        crop_size: int = 224,
        patch_size: int = 16,
        tubelet_size: int = 2,
        frames_per_clip: int = 16,
        uniform_power: bool = True,
        **more: Any,
    ) -> None:
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = (
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
        )
        self.mlp_ratio, self.layer_norm_eps, self.qkv_bias, self.qk_scale = (
            mlp_ratio,
            layer_norm_eps,
            qkv_bias,
            qk_scale,
        )
        self.sdpa_ignores_scale = sdpa_ignores_scale
        self.in_chans, self.crop_size, self.patch_size = in_chans, crop_size, patch_size
        self.tubelet_size, self.frames_per_clip, self.uniform_power = tubelet_size, frames_per_clip, uniform_power
        super().__init__(**more)


class VJEPAModel(PreTrainedModel):
    """The encoder: normalised clips float32 [B, T, C, H, W], as transformers has videos, to tokens [B, N, E]."""

    config_class = VJEPAConfig
    base_model_prefix = "encoder"  # files have the published names, without it
    main_input_name = "pixel_values_videos"

    def __init__(self, config: VJEPAConfig) -> None:
        super().__init__(config)
        self.encoder = VisionTransformer(
            img_size=config.crop_size,
            patch_size=config.patch_size,
            num_frames=config.frames_per_clip,
            tubelet_size=config.tubelet_size,
            in_chans=config.in_chans,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=config.qkv_bias,
            qk_scale=config.qk_scale,
            sdpa_ignores_scale=config.sdpa_ignores_scale,
            norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
            uniform_power=config.uniform_power,
        )
        self.post_init()

    def forward(self, pixel_values_videos: Tensor, return_dict: bool | None = None) -> BaseModelOutput | tuple[Tensor]:
        """`last_hidden_state` [B, N, E], or a tuple with it where `return_dict` is False."""
        tokens = self.encoder(pixel_values_videos.transpose(1, 2))
        return (tokens,) if return_dict is False else BaseModelOutput(last_hidden_state=tokens)

    def _init_weights(self, module: nn.Module) -> None:
        """The encoder has initialised itself."""


AutoConfig.register(MODEL_TYPE, VJEPAConfig, exist_ok=True)
AutoModel.register(VJEPAConfig, VJEPAModel, exist_ok=True)
