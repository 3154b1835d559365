"""The transformer block and its two halves.

B batch, N tokens, D width, H heads, d = D // H channels of one head.
Parameter names are those of the published V-JEPA checkpoints, so weights load by name.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class MLP(nn.Module):
    """Two linear layers with an exact (erf) GELU between them: [B, N, D] -> [B, N, out_features].

    Source: V-JEPA (arXiv 2404.08471), the standard ViT feed-forward layer.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        out_features = out_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], dtype of `x` (or of the autocast region)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection: [B, N, D] -> [B, N, D].

    The scale of the scores is `qk_scale`, or d ** -0.5 where it is None. `use_sdpa=False` computes the softmax
    explicitly. The published code ignores a custom scale on its fused path; `sdpa_ignores_scale=True` does the same.
    Source: V-JEPA (arXiv 2404.08471); `torch.nn.functional.scaled_dot_product_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_sdpa: bool = True,
        sdpa_ignores_scale: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim {dim} and num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.use_sdpa = use_sdpa
        self.sdpa_ignores_scale = sdpa_ignores_scale
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, N, D] -> [B, N, D]; with `return_attention` also the softmax probabilities [B, H, N, N]."""
        qkv = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        # Taken one by one, as published: the gradient of each is that of all three, zeros elsewhere. The packed pass
        # does neither.
        q, k, v = qkv[0], qkv[1], qkv[2]
        if not return_attention:
            return self._out(self.mix(q, k, v))
        attention = self.attn_drop(self.probabilities(q, k))
        return self._out(attention @ v), attention

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Values averaged by the attention of the queries: q [B, H, M, d], k and v [B, H, N, d] -> [B, H, M, d]."""
        if not self.use_sdpa:
            return self.attn_drop(self.probabilities(q, k)) @ v
        dropout = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.sdpa_scale)

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        """The softmax of the scores, computed explicitly: [B, H, M, d] and [B, H, N, d] -> [B, H, M, N]."""
        return torch.softmax(q @ k.transpose(-2, -1) * self.sdpa_scale, dim=-1)

    @property
    def sdpa_scale(self) -> float:
        """The scale of the scores that is really used."""
        return self.head_dim**-0.5 if self.use_sdpa and self.sdpa_ignores_scale else self.scale

    def _out(self, mixed: Tensor) -> Tensor:
        return self.proj_drop(self.proj(rearrange(mixed, "b h n d -> b n (h d)")))


class Block(nn.Module):
    """Pre-norm transformer block: [B, N, D] -> [B, N, D].

    Source: V-JEPA (arXiv 2404.08471), spec of the published checkpoints: norm1, attn, norm2, mlp.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        use_sdpa: bool = True,
        sdpa_ignores_scale: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=drop,
            use_sdpa=use_sdpa,
            sdpa_ignores_scale=sdpa_ignores_scale,
        )
        self.norm2 = norm_layer(dim)
        self.mlp = MLP(dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
        """[B, N, D] -> [B, N, D]; with `return_attention` the softmax probabilities [B, H, N, N] instead."""
        if return_attention:
            return self.attn(self.norm1(x), return_attention=True)[1]
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Queries attend to tokens: q [B, M, D], x [B, N, D] -> [B, M, D], without an output projection.

    The published checkpoints of the first generation carry a projection that their forward pass never applies;
    `unused_proj=True` makes that parameter, so that they load strictly. Source: V-JEPA (arXiv 2404.08471).
    """

    def __init__(
        self, dim: int, num_heads: int = 12, qkv_bias: bool = False, use_sdpa: bool = True, unused_proj: bool = False
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim {dim} and num_heads {num_heads}")
        self.num_heads = num_heads
        self.use_sdpa = use_sdpa
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias)
        if unused_proj:
            self.proj = nn.Linear(dim, dim)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """Queries [B, M, D] and tokens [B, N, D] -> [B, M, D]."""
        queries = rearrange(self.q(q), "b m (h d) -> b h m d", h=self.num_heads)
        k, v = rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        if self.use_sdpa:
            mixed = F.scaled_dot_product_attention(queries, k, v)
        else:
            mixed = torch.softmax(queries @ k.transpose(-2, -1) * queries.shape[-1] ** -0.5, dim=-1) @ v
        return rearrange(mixed, "b h m d -> b m (h d)")


class CrossAttentionBlock(nn.Module):
    """Queries read normalised tokens, then pass an MLP: q [B, M, D], x [B, N, D] -> [B, M, D].

    The queries themselves are not normalised before they attend, as published. Source: V-JEPA (arXiv 2404.08471).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        unused_proj: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.xattn = CrossAttention(dim, num_heads=num_heads, qkv_bias=qkv_bias, unused_proj=unused_proj)
        self.norm2 = norm_layer(dim)
        self.mlp = MLP(dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """Queries [B, M, D] and tokens [B, N, D] -> [B, M, D]."""
        q = q + self.xattn(q, self.norm1(x))
        return q + self.mlp(self.norm2(q))
