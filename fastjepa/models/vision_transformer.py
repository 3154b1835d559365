"""The V-JEPA encoder: a plain ViT over video tokens that can be asked for some of the tokens only.

B clips, C channels, T frames, H x W pixels; N = t*h*w tokens, K kept tokens, E width. Token order is time, row, column.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastjepa.masks.tokens import TokenSet, apply_masks
from fastjepa.models.initialise import initialise, rescale_blocks
from fastjepa.models.layers import Block, run_block
from fastjepa.models.patch_embed import PatchEmbed, PatchEmbed3D
from fastjepa.models.pos_embed import interpolate_pos_embed, position_table
from fastjepa.models.rotary import Places, RopeStyle

ShortClips = Literal["interpolate", "cut"]


def size_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """An int is a square; a pair is (height, width)."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


class VisionTransformer(nn.Module):
    """Clips [B, C, T, H, W] (or images [B, C, H, W] when `num_frames` is 1) to token features [B, N, E].

    Constructor arguments and state-dict keys are the published ones; an unknown argument raises. Inputs of another
    size than the constructor's get an interpolated position table; with `short_clips="cut"` a clip that is shorter but
    no smaller takes the first rows of it, as in the second generation. `use_rope` has no table (`pos_embed` is None):
    attention turns queries and keys by the places of the tokens in the clip's own grid. `drop_path_rate` is that of the
    last block, growing evenly from 0 in the first. The attribute `recomputed` is the number of blocks that the backward
    pass computes again. `out_layers` makes the forward pass return a list of the normalised
    outputs of these blocks instead. Source: V-JEPA (arXiv 2404.08471, section 3), V-JEPA 2 (arXiv 2506.09985).
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        num_frames: int = 1,
        tubelet_size: int = 2,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: float = 0.02,
        out_layers: Sequence[int] | None = None,
        uniform_power: bool = False,
        use_sdpa: bool = True,
        sdpa_ignores_scale: bool = False,
        use_rope: bool = False,
        rope_style: RopeStyle = "v2",
        use_silu: bool = False,
        wide_silu: bool = True,
        drop_path_rate: float = 0.0,
        short_clips: ShortClips = "interpolate",
    ) -> None:
        super().__init__()
        if short_clips not in ("interpolate", "cut"):
            raise ValueError(f"short_clips must be 'interpolate' or 'cut', got {short_clips!r}")
        self.embed_dim, self.num_heads, self.short_clips = embed_dim, num_heads, short_clips
        self.recomputed = 0
        self.patch_size, self.tubelet_size, self.num_frames = patch_size, tubelet_size, num_frames
        self.is_video = num_frames > 1
        if out_layers is not None and not all(0 <= layer < depth for layer in out_layers):
            raise ValueError(f"out_layers must be block numbers from 0 to {depth - 1}, got {list(out_layers)}")
        self.out_layers = None if out_layers is None else sorted(out_layers)
        height, width = size_pair(img_size)
        self.grid: tuple[int, ...] = (height // patch_size, width // patch_size)
        if self.is_video:
            self.grid = (num_frames // tubelet_size, *self.grid)
            self.patch_embed: nn.Module = PatchEmbed3D(patch_size, tubelet_size, in_chans, embed_dim)
        else:
            self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.num_patches = prod(self.grid)
        self.pos_embed = None
        if not use_rope:
            self.pos_embed = nn.Parameter(position_table(embed_dim, self.grid, uniform_power), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                norm_layer=norm_layer,
                use_sdpa=use_sdpa,
                sdpa_ignores_scale=sdpa_ignores_scale,
                use_rope=use_rope,
                rope_style=rope_style,
                use_silu=use_silu,
                wide_silu=wide_silu,
                drop_path=drop_path_rate * block / max(1, depth - 1),
            )
            for block in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        initialise(self, init_std)
        rescale_blocks(self.blocks)

    def get_num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def token_grid(self, x: Tensor) -> tuple[int, ...]:
        """The (t, h, w) or (h, w) token grid of an input of this shape."""
        plane = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        return (x.shape[-3] // self.tubelet_size, *plane) if self.is_video else plane

    def interpolate_pos_encoding(self, x: Tensor, pos_embed: Tensor) -> Tensor:
        """The [1, N, E] table `pos_embed` resampled to the token grid of the input `x`."""
        return self._resampled(pos_embed, self.token_grid(x))

    def positions(self, grid: tuple[int, ...]) -> Tensor | None:
        """The position table for a (t, h, w) or (h, w) token grid: [1, N, E]; None with rotary positions."""
        return None if self.pos_embed is None else self._resampled(self.pos_embed, grid)

    def _resampled(self, table: Tensor, grid: tuple[int, ...]) -> Tensor:
        if self.short_clips == "cut" and len(grid) == 3 and grid[1:] == self.grid[1:] and grid[0] < self.grid[0]:
            return table[:, : prod(grid)]
        return interpolate_pos_embed(table, self.grid, grid)

    def places(self, grid: tuple[int, ...], token: Tensor) -> Places | None:
        """Where these tokens of a clip with this grid lie, for rotary attention; None with a position table."""
        return Places(token, *grid[-2:]) if self.pos_embed is None else None

    def embed(self, x: Tensor) -> Tensor:
        """Every token of the input with its position added: [B, C, T, H, W] -> [B, N, E].

        Errors: ValueError for pixels that are no floats.
        """
        if not x.is_floating_point():
            raise ValueError(
                f"VisionTransformer: expected normalised floats, given {x.dtype} (fastjepa.pixels.as_floats makes them "
                "of uint8 clips)"
            )
        tokens = self.patch_embed(x)
        if self.pos_embed is None:
            return tokens
        # Summed in fp32, kept in the dtype of the patches: under autocast the residual stream stays in half precision.
        return (tokens + self.interpolate_pos_encoding(x, self.pos_embed)).to(tokens.dtype)

    def encode(self, tokens: Tensor, places: Places | None = None) -> Tensor | list[Tensor]:
        """Blocks and final norm over embedded tokens [B, K, E] at their places; a list with `out_layers`."""
        collected = []
        for number, block in enumerate(self.blocks):
            tokens = run_block(block, number, self.recomputed, tokens, places)
            if self.out_layers is not None and number in self.out_layers:
                collected.append(self.norm(tokens))
        return self.norm(tokens) if self.out_layers is None else collected

    def forward(self, clips: Tensor, masks: Tensor | Sequence[Tensor] | None = None) -> Tensor | list[Tensor]:
        """Features of all tokens, or of the kept ones.

        `masks`: None -> [B, N, E]; one int64 tensor [B, K] of kept token numbers -> [B, K, E]; a list of such tensors
        with equal K -> [len(masks) * B, K, E], in the order of the list. Errors: ValueError for unequal K
        (`forward_sets` takes those).
        """
        tokens, grid = self.embed(clips), self.token_grid(clips)
        kept = tokens if masks is None else apply_masks(tokens, masks)
        if self.pos_embed is not None:
            return self.encode(kept)
        if masks is None:
            index = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            index = masks if isinstance(masks, Tensor) else torch.cat(list(masks))
        return self.encode(kept, self.places(grid, index))

    def forward_sets(self, clips: Tensor, sets: Sequence[TokenSet]) -> list[Tensor]:
        """One feature tensor a mask set: [B, K, E] for a tensor set, [R, E] rows for a `Ragged` one."""
        tokens, grid = self.embed(clips), self.token_grid(clips)
        return [self._encode_set(tokens, token_set, grid) for token_set in sets]

    def _encode_set(self, tokens: Tensor, token_set: TokenSet, grid: tuple[int, ...]) -> Tensor:
        if isinstance(token_set, Tensor):
            return self._single(self.encode(apply_masks(tokens, token_set), self.places(grid, token_set)))
        runs = [
            self._single(self.encode(apply_masks(tokens[rows], index), self.places(grid, index)))
            for rows, index in token_set.runs()
        ]
        return torch.cat([run.flatten(0, 1) for run in runs])

    @staticmethod
    def _single(features: Tensor | list[Tensor]) -> Tensor:
        if isinstance(features, list):
            raise ValueError("forward_sets returns one tensor a mask set and does not take out_layers")
        return features


# width, depth, heads, MLP ratio. vit_nano is ours, for demonstrations on a CPU; the others are published sizes.
# vit_giant_xformers is the ViT-g of V-JEPA 2, vit_gigantic_xformers the ViT-G of its successor. The published
# vit_gigantic asks for 64/13 under a misspelt name, and so gets 4; here it gets what it asks for.
SIZES: dict[str, dict[str, Any]] = {
    "vit_nano": {"embed_dim": 64, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0},
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0},
    "vit_huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4.0},
    "vit_giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "vit_gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13, "patch_size": 14},
    "vit_giant_xformers": {"embed_dim": 1408, "depth": 40, "num_heads": 22, "mlp_ratio": 48 / 11},
    "vit_gigantic_xformers": {"embed_dim": 1664, "depth": 48, "num_heads": 26, "mlp_ratio": 64 / 13},
}


def build_vit(name: str, **overrides: Any) -> VisionTransformer:
    """A named encoder with LayerNorm eps 1e-6 and qkv biases; `overrides` are constructor arguments.

    Errors: ValueError for an unknown name, TypeError for an unknown argument.
    """
    if name not in SIZES:
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(SIZES)}")
    settings = {"qkv_bias": True, "norm_layer": partial(nn.LayerNorm, eps=1e-6), **SIZES[name], **overrides}
    return VisionTransformer(**settings)


vit_nano = partial(build_vit, "vit_nano")
vit_tiny = partial(build_vit, "vit_tiny")
vit_small = partial(build_vit, "vit_small")
vit_base = partial(build_vit, "vit_base")
vit_large = partial(build_vit, "vit_large")
vit_huge = partial(build_vit, "vit_huge")
vit_giant = partial(build_vit, "vit_giant")
vit_gigantic = partial(build_vit, "vit_gigantic")
vit_giant_xformers = partial(build_vit, "vit_giant_xformers")
vit_gigantic_xformers = partial(build_vit, "vit_gigantic_xformers")
