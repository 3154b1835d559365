"""The V-JEPA predictor: a narrow ViT that guesses target features from context features.

B clips, Nc context tokens, Kt target tokens, E encoder width, P predictor width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.masks.tokens import apply_masks
from fastjepa.models.initialise import initialise, normal_, rescale_blocks
from fastjepa.models.layers import Block, run_block
from fastjepa.models.pos_embed import position_table
from fastjepa.models.rotary import Places, RopeStyle
from fastjepa.models.vision_transformer import size_pair

NOISE_STEPS = 1000
Noise = Literal["published", "linear"]


@dataclass(frozen=True)
class RowNoise:
    """Noise that is made where it is used: `keys` int64 [B, Kt], or [R] where lengths differ, and a 0-dim `seed`.

    Source of the numbers: `fastjepa_kernels.philox_normal`.
    """

    keys: Tensor
    seed: Tensor


# Timesteps int64 [B] and noise: float32 of the embedded targets' shape, or how to make it.
Draw = tuple[Tensor, Tensor | RowNoise]


def signal_left(noise: Noise) -> Tensor:
    """[1000] float32 products of (1 - beta): the share of the signal's variance left after each noise step.

    `published` uses betas from 0.5 to 1 and reaches exactly 0 after a few steps, so that most draws are pure noise
    (the public code's schedule); `linear` uses the usual 1e-4 to 0.02 (DDPM, arXiv 2006.11239, section 4).
    """
    # The product in float64, rounded once: bit for bit the recorded table of the public code.
    if noise == "published":
        betas = 0.5 + torch.arange(NOISE_STEPS, dtype=torch.float64) * (0.5 / NOISE_STEPS)
    else:
        betas = torch.linspace(1e-4, 0.02, NOISE_STEPS, dtype=torch.float64)
    return torch.cumprod(1.0 - betas, dim=0).float()


class VisionTransformerPredictor(nn.Module):
    """Predict target features [B, Kt, E] from context features [B, Nc, E].

    With `use_mask_tokens` the targets enter as learned mask tokens, one for each mask set; without, as the embedded
    target features themselves, normalised and diffused with noise. Constructor arguments and state-dict keys are the
    published ones; `noise` chooses the schedule of the noised path. With `use_rope` there is no position table
    (`predictor_pos_embed` is None): attention turns queries and keys by the places of the tokens in frames of the
    constructor's size. `return_all_tokens` gives context tokens too, all of a clip in the order of their numbers: [B,
    Nc + Kt, E]. The attribute `recomputed` is as in the encoder. Source: V-JEPA (arXiv 2404.08471, section 3.2), V-JEPA
    2 (arXiv 2506.09985).
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        num_frames: int = 1,
        tubelet_size: int = 2,
        embed_dim: int = 768,
        predictor_embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: float = 0.02,
        uniform_power: bool = False,
        use_mask_tokens: bool = False,
        num_mask_tokens: int = 2,
        zero_init_mask_tokens: bool = True,
        noise: Noise = "published",
        use_sdpa: bool = True,
        sdpa_ignores_scale: bool = False,
        use_rope: bool = False,
        rope_style: RopeStyle = "v2",
        use_silu: bool = False,
        wide_silu: bool = True,
        drop_path_rate: float = 0.0,
        return_all_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.return_all_tokens, self.recomputed = return_all_tokens, 0
        height, width = size_pair(img_size)
        grid: tuple[int, ...] = (height // patch_size, width // patch_size)
        if num_frames > 1:
            grid = (num_frames // tubelet_size, *grid)
        self.grid = grid
        self.predictor_embed = nn.Linear(embed_dim, predictor_embed_dim)
        self.mask_tokens = None
        if use_mask_tokens:
            self.mask_tokens = nn.ParameterList(
                nn.Parameter(torch.zeros(1, 1, predictor_embed_dim)) for _ in range(num_mask_tokens)
            )
        self.predictor_pos_embed = None
        if not use_rope:
            table = position_table(predictor_embed_dim, grid, uniform_power)  # type: ignore[arg-type]
            self.predictor_pos_embed = nn.Parameter(table, requires_grad=False)
        self.predictor_blocks = nn.ModuleList(
            Block(
                predictor_embed_dim,
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
        self.predictor_norm = norm_layer(predictor_embed_dim)
        self.predictor_proj = nn.Linear(predictor_embed_dim, embed_dim)
        # Not part of the state dict: the schedule is a setting, and published checkpoints do not carry it.
        self.register_buffer("signal_left", signal_left(noise), persistent=False)
        initialise(self, init_std)
        rescale_blocks(self.predictor_blocks)
        if self.mask_tokens is not None and not zero_init_mask_tokens:
            for token in self.mask_tokens:
                normal_(token.data, init_std)

    def forward(
        self,
        ctxt: Tensor,
        tgt: Tensor | None,
        masks_ctxt: Tensor | Sequence[Tensor],
        masks_tgt: Tensor | Sequence[Tensor],
        mask_index: int = 1,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Context features [B, Nc, E] with their token numbers [B, Nc] to predictions [B, Kt, E] at `masks_tgt`.

        `tgt` [B, Kt, E] are the target features that the noised path starts from; mask tokens do not read them.
        `mask_index` counts mask sets and wraps around the mask tokens. `timesteps` int64 [B] and `noise` [B, Kt, P]
        hand in the draws of the noised path. Masks may be one-element lists; a context paired with several target
        sets is one call for each. Errors: ValueError for longer lists or missing targets.
        """
        context_index, target_index = _single_mask(masks_ctxt), _single_mask(masks_tgt)
        if self.mask_tokens is not None:
            targets = self.mask_token(mask_index).expand(*target_index.shape, -1)
        else:
            if tgt is None:
                raise ValueError("a predictor without mask tokens needs target features")
            targets = self.diffuse(self.predictor_embed(tgt), timesteps, noise)
        context = self.predictor_embed(ctxt)
        x = torch.cat([self._placed(context, context_index), self._placed(targets, target_index)], dim=1)
        order = places = None
        if self.predictor_pos_embed is None or self.return_all_tokens:
            # In the order of their numbers, as the second generation runs them; attention does not mind.
            numbers = torch.cat([context_index, target_index], dim=1)
            order = numbers.argsort(dim=1)
            x, places = _gathered(x, order), self.places(numbers.gather(1, order))
        for number, block in enumerate(self.predictor_blocks):
            x = run_block(block, number, self.recomputed, x, places)
        if not self.return_all_tokens:
            if order is not None:
                x = _gathered(x, order.argsort(dim=1))
            x = x[:, ctxt.shape[1] :]
        return self.predictor_proj(self.predictor_norm(x))

    def places(self, token: Tensor) -> Places | None:
        """Where these tokens lie, for rotary attention; None with a position table."""
        return Places(token, *self.grid[-2:]) if self.predictor_pos_embed is None else None

    def _placed(self, x: Tensor, index: Tensor) -> Tensor:
        """[B, K, P] with the positions of the tokens [B, K] added, where they are a table."""
        if self.predictor_pos_embed is None:
            return x
        return x + apply_masks(self.predictor_pos_embed.expand(len(x), -1, -1), index)

    def mask_token(self, mask_index: int) -> Tensor:
        """The learned token of a mask set, counted around: [1, 1, P]."""
        assert self.mask_tokens is not None, "a noised predictor has no mask tokens"
        return self.mask_tokens[mask_index % len(self.mask_tokens)]

    def diffuse(self, targets: Tensor, timesteps: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Normalise embedded targets [B, Kt, P] and mix them with noise: sqrt(a) y + sqrt(1 - a) e, one step a clip."""
        y = F.layer_norm(targets, targets.shape[-1:], eps=1e-5)
        if timesteps is None:
            timesteps = torch.randint(0, NOISE_STEPS, (len(y),), device=y.device)
        if noise is None:
            noise = torch.randn_like(y)
        alpha = self.signal_left[timesteps].view(-1, 1, 1)  # type: ignore[index]
        return alpha.sqrt() * y + (1.0 - alpha).sqrt() * noise


def _single_mask(masks: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(masks, Tensor):
        return masks
    if len(masks) != 1:
        raise ValueError(f"the predictor pairs one context mask with one target mask, got a list of {len(masks)}")
    return masks[0]


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


def draw_of_run(draw: Draw, rows: slice, start: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The part of a mask set's (timesteps [B], noise) that belongs to some of its clips.

    `noise` is [B, Kt, P], or [R, P] where lengths differ; the clips are `rows` of the batch, their noise begins at row
    `start` of R, and `shape` is their (number, Kt).
    """
    timesteps, noise = draw
    if isinstance(noise, RowNoise):
        raise ValueError("noise by key is made by kernels: hand in the noise itself, or run through fastjepa.fused")
    part = noise[rows] if noise.ndim == 3 else noise[start : start + shape[0] * shape[1]].unflatten(0, tuple(shape))
    return timesteps[rows], part


def vit_predictor(**arguments: Any) -> VisionTransformerPredictor:
    """The published predictor: MLP ratio 4, qkv biases, LayerNorm eps 1e-6; `arguments` go to the constructor."""
    settings = {"mlp_ratio": 4.0, "qkv_bias": True, "norm_layer": partial(nn.LayerNorm, eps=1e-6), **arguments}
    return VisionTransformerPredictor(**settings)
