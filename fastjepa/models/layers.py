"""The transformer block and its two halves.

B batch, N tokens, D width, H heads, d = D // H channels of one head.
Parameter names are those of the published V-JEPA checkpoints, so weights load by name.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjepa.models.rotary import STYLES, Places, RopeStyle, axis_channels, rotated


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
        return self.drop(self.last(self.hidden(x)))

    def hidden(self, x: Tensor) -> Tensor:
        """What the last product reads: [..., in_features] -> [..., hidden_features]."""
        return self.drop(self.act(self.fc1(x)))

    @property
    def last(self) -> nn.Linear:
        """The projection back to the residual stream."""
        return self.fc2


class SwiGLU(nn.Module):
    """The gated feed-forward layer, fc3(silu(fc1 x) * fc2 x): [B, N, D] -> [B, N, out_features].

    `wide_silu` takes two thirds of `hidden_features`, rounded up to a multiple of 8, so that three matrices have as
    many weights as two. `drop` is applied as in `MLP`; the public code takes and ignores it. Source: V-JEPA 2 (arXiv
    2506.09985), after GLU variants (arXiv 2002.05202).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        wide_silu: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        width = hidden_features or in_features
        if wide_silu:
            width = -(-(2 * width // 3) // 8) * 8
        self.fc1 = nn.Linear(in_features, width)
        self.fc2 = nn.Linear(in_features, width)
        self.fc3 = nn.Linear(width, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], dtype of `x` (or of the autocast region)."""
        return self.drop(self.last(self.hidden(x)))

    def hidden(self, x: Tensor) -> Tensor:
        """What the last product reads: [..., in_features] -> [..., width]."""
        return self.drop(F.silu(self.fc1(x)) * self.fc2(x))

    @property
    def last(self) -> nn.Linear:
        """The projection back to the residual stream."""
        return self.fc3


class DropPath(nn.Module):
    """Stochastic depth: in training a clip's branch is left out with chance `rate`, and those kept are 1 / (1 - rate).

    [B, ...] -> [B, ...]; in evaluation nothing changes. Source: arXiv 1603.09382, each sample by itself as in timm.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...], dtype of `x`."""
        if not self.active:
            return x
        return (x * self.scales(len(x), x).view(-1, *[1] * (x.ndim - 1))).to(x.dtype)

    @property
    def active(self) -> bool:
        """Does it leave anything out now?"""
        return self.training and self.rate > 0

    def scales(self, clips: int, like: Tensor) -> Tensor:
        """A draw for each clip, 0 or 1 / (1 - rate): [clips], on the device of `like`, in float32 at least.

        Half precision would round the factor, and every branch by the same.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        return like.new_empty(clips, dtype=dtype).bernoulli_(1 - self.rate).div_(1 - self.rate)


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection: [B, N, D] -> [B, N, D].

    The scale of the scores is `qk_scale`, or d ** -0.5 where it is None. `use_sdpa=False` computes the softmax
    explicitly. The published code ignores a custom scale on its fused path; `sdpa_ignores_scale=True` does the same.
    `use_rope` turns queries and keys by the places of their tokens, in one of the styles of `fastjepa.models.rotary`.
    Source: V-JEPA (arXiv 2404.08471), V-JEPA 2 (arXiv 2506.09985); `torch.nn.functional.scaled_dot_product_attention`.
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
        use_rope: bool = False,
        rope_style: RopeStyle = "v2",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim {dim} and num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        if rope_style not in STYLES:
            raise ValueError(f"rope_style must be one of {', '.join(STYLES)}, got {rope_style!r}")
        if use_rope and not axis_channels(self.head_dim):
            raise ValueError(f"rotary positions need heads of at least 6 channels, got {self.head_dim}")
        self.rope_style: RopeStyle | None = rope_style if use_rope else None
        self.scale = qk_scale or self.head_dim**-0.5
        self.use_sdpa = use_sdpa
        self.sdpa_ignores_scale = sdpa_ignores_scale
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, return_attention: bool = False, places: Places | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, N, D] -> [B, N, D]; with `return_attention` also the softmax probabilities [B, H, N, N].

        `places` of the tokens, which rotary attention reads. Errors: ValueError where it has none.
        """
        qkv = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        # Taken one by one, as published: the gradient of each is that of all three, zeros elsewhere. The packed pass
        # does neither.
        q, k, v = qkv[0], qkv[1], qkv[2]
        if self.rope_style is not None:
            if places is None:
                raise ValueError("rotary attention needs the places of its tokens")
            q, k = rotated(q, places, self.rope_style), rotated(k, places, self.rope_style)
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

    `use_silu` takes the gated feed-forward layer, `drop_path` is the rate of stochastic depth. Source: V-JEPA (arXiv
    2404.08471), V-JEPA 2 (arXiv 2506.09985), spec of the published checkpoints: norm1, attn, norm2, mlp.
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
        use_rope: bool = False,
        rope_style: RopeStyle = "v2",
        use_silu: bool = False,
        wide_silu: bool = True,
        drop_path: float = 0.0,
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
            use_rope=use_rope,
            rope_style=rope_style,
        )
        self.norm2 = norm_layer(dim)
        hidden = int(dim * mlp_ratio)
        if use_silu:
            self.mlp: MLP | SwiGLU = SwiGLU(dim, hidden, wide_silu=wide_silu, drop=drop)
        else:
            self.mlp = MLP(dim, hidden, act_layer=act_layer, drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, return_attention: bool = False, places: Places | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; with `return_attention` the softmax probabilities [B, H, N, N] instead.

        `places` as for `Attention`.
        """
        if return_attention:
            return self.attn(self.norm1(x), return_attention=True, places=places)[1]
        x = x + self.drop_path(self.attn(self.norm1(x), places=places))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def recomputed(self, x: Tensor, places: Places | None = None) -> Tensor:
        """The same, keeping `x` alone: the backward pass computes the rest again, with the same draws."""
        drawn = any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in self.modules())
        state = drawn or self.drop_path.active
        return checkpoint(self, x, places=places, use_reentrant=False, preserve_rng_state=state)


def run_block(block: nn.Module, number: int, recomputed: int, x: Tensor, places: Places | None) -> Tensor:
    """Block `number` of a network; of the first `recomputed` their input alone is kept where gradients are wanted."""
    if number < recomputed and torch.is_grad_enabled():
        assert isinstance(block, Block)
        return block.recomputed(x, places)
    return block(x, places=places)


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
