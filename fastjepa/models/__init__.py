"""The networks. They know nothing of machines, data or logs."""

from fastjepa.models.attentive_pooler import AttentiveClassifier, AttentivePooler
from fastjepa.models.clip_aggregation import ClipAggregation, FrameAggregation, mean_probabilities
from fastjepa.models.layers import MLP, Attention, Block, CrossAttention, CrossAttentionBlock, SwiGLU
from fastjepa.models.patch_embed import PatchEmbed, PatchEmbed3D
from fastjepa.models.predictor import VisionTransformerPredictor, vit_predictor
from fastjepa.models.vision_transformer import (
    VisionTransformer,
    build_vit,
    vit_base,
    vit_giant,
    vit_giant_xformers,
    vit_gigantic,
    vit_gigantic_xformers,
    vit_huge,
    vit_large,
    vit_nano,
    vit_small,
    vit_tiny,
)

__all__ = [
    "MLP",
    "Attention",
    "AttentiveClassifier",
    "AttentivePooler",
    "Block",
    "ClipAggregation",
    "CrossAttention",
    "CrossAttentionBlock",
    "FrameAggregation",
    "PatchEmbed",
    "PatchEmbed3D",
    "SwiGLU",
    "VisionTransformer",
    "VisionTransformerPredictor",
    "build_vit",
    "mean_probabilities",
    "vit_base",
    "vit_giant",
    "vit_giant_xformers",
    "vit_gigantic",
    "vit_gigantic_xformers",
    "vit_huge",
    "vit_large",
    "vit_nano",
    "vit_predictor",
    "vit_small",
    "vit_tiny",
]
