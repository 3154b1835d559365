"""Pooling by learned queries, and the classifier that probes frozen features with it.

B clips, N tokens, M queries, E width. State-dict keys are those of the published probes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastjepa.models.initialise import initialise, normal_
from fastjepa.models.layers import Block, CrossAttention, CrossAttentionBlock


class AttentivePooler(nn.Module):
    """Learned queries attend to the tokens, then `depth - 1` blocks act on the queries: [B, N, E] -> [B, M, E].

    With `blocks_first` the blocks act on the tokens before the queries read them, as in the second generation.
    `complete_block=False` leaves out residual, norms and MLP of the cross-attention. `unused_proj` makes the projection
    that published probes carry and never apply. Source: V-JEPA (arXiv 2404.08471, section 4 and appendix), V-JEPA 2
    (arXiv 2506.09985).
    """

    def __init__(
        self,
        num_queries: int = 1,
        embed_dim: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        depth: int = 1,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: float = 0.02,
        qkv_bias: bool = True,
        complete_block: bool = True,
        unused_proj: bool = False,
        blocks_first: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a pooler has at least one layer, got depth {depth}")
        self.blocks_first = blocks_first
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, embed_dim))
        if complete_block:
            self.cross_attention_block: nn.Module = CrossAttentionBlock(
                embed_dim, num_heads, mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm_layer, unused_proj=unused_proj
            )
        else:
            self.cross_attention_block = CrossAttention(
                embed_dim, num_heads, qkv_bias=qkv_bias, unused_proj=unused_proj
            )
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm_layer) for _ in range(depth - 1)
        )
        initialise(self, init_std)
        normal_(self.query_tokens.data, init_std)
        self._rescale()

    @torch.no_grad()
    def _rescale(self) -> None:
        """Output projections of layer l = 1, 2, ... are divided by sqrt(2 l), in the order in which layers run.

        The public code counts the cross-attention as the last of its own blocks, not as the one after them.
        """
        first, cross = (1, max(1, len(self.blocks))) if self.blocks_first else (2, 1)
        if isinstance(self.cross_attention_block, CrossAttentionBlock):
            self.cross_attention_block.mlp.fc2.weight.div_((2.0 * cross) ** 0.5)
        for layer, block in enumerate(self.blocks, start=first):
            assert isinstance(block, Block)
            block.attn.proj.weight.div_((2.0 * layer) ** 0.5)
            block.mlp.last.weight.div_((2.0 * layer) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, E] -> pooled queries [B, M, E]."""
        if self.blocks_first:
            for block in self.blocks:
                x = block(x)
        q = self.cross_attention_block(self.query_tokens.expand(len(x), -1, -1), x)
        if not self.blocks_first:
            for block in self.blocks:
                q = block(q)
        return q


class AttentiveClassifier(nn.Module):
    """A pooler with one query and a linear layer: tokens [B, N, E] -> logits [B, num_classes]."""

    def __init__(
        self,
        embed_dim: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        depth: int = 1,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: float = 0.02,
        qkv_bias: bool = True,
        num_classes: int = 1000,
        complete_block: bool = True,
        unused_proj: bool = False,
        blocks_first: bool = False,
    ) -> None:
        super().__init__()
        self.pooler = AttentivePooler(
            1, embed_dim, num_heads, mlp_ratio, depth, norm_layer, init_std, qkv_bias, complete_block, unused_proj,
            blocks_first,
        )  # fmt: skip
        self.linear = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, E] -> logits [B, num_classes]."""
        return self.linear(self.pooler(x).squeeze(1))
