"""The packed pass: the same numbers as one forward pass a mask set, with the work that the mathematics needs.

Kept patches alone are embedded, by a matrix product; the rows of all mask sets run through the linear layers as one
[R, D] matrix, and attention is one dense call for each stretch of equally long clips; the predictor's last block
computes queries and MLP for target rows only.

R rows, D width, E encoder width, P predictor width, H heads, d channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastjepa.masks.tokens import Ragged, TokenSet, flat_rows, flat_tokens, split_runs
from fastjepa.models.layers import Attention, Block
from fastjepa.models.predictor import VisionTransformerPredictor, draw_of_run
from fastjepa.models.vision_transformer import VisionTransformer


class Stretch(NamedTuple):
    """Neighbouring clips that keep equally many rows."""

    clips: int
    length: int


@dataclass(frozen=True)
class Patches:
    """A batch cut into tokens once for all passes: pixels [B, N, C * tubelet * patch * patch] and the token grid."""

    pixels: Tensor
    grid: tuple[int, ...]


def cut_patches(encoder: VisionTransformer, clips: Tensor) -> Patches:
    """[B, C, T, H, W] (or [B, C, H, W]) into the pixels of every token, in the order of the embedding's weights."""
    grid = encoder.token_grid(clips)
    video = clips if encoder.is_video else clips.unsqueeze(2)
    frames, side = (encoder.tubelet_size if encoder.is_video else 1), encoder.patch_size
    pattern = "b c (t f) (h p) (w q) -> b (t h w) (c f p q)"
    return Patches(rearrange(video, pattern, f=frames, p=side, q=side), grid)


def encode_all(encoder: VisionTransformer, patches: Patches) -> Tensor:
    """Features of every token, like `encoder(clips)`: [B, N, E]."""
    tokens = _embed(encoder, patches.pixels, encoder.positions(patches.grid))
    features = encoder.encode(tokens)
    assert isinstance(features, Tensor), "the packed pass takes no out_layers"
    return features


def encode_sets(encoder: VisionTransformer, patches: Patches, sets: Sequence[TokenSet]) -> list[Tensor]:
    """Features of the kept tokens, one tensor a mask set: [B, K, E], or [R, E] rows where lengths differ."""
    index = torch.cat([flat_rows(token_set, patches.pixels.shape[1]) for token_set in sets])
    token = torch.cat([flat_tokens(token_set) for token_set in sets])
    kept = patches.pixels.flatten(0, 1).index_select(0, index)
    x = _embed(encoder, kept, encoder.positions(patches.grid)[0].index_select(0, token))
    stretches = [stretch for token_set in sets for stretch in _stretches(token_set)]
    for block in encoder.blocks:
        assert isinstance(block, Block)
        x = x + _attend(block.attn, block.norm1(x), stretches)
        x = x + block.mlp(block.norm2(x))
    return _unpack(encoder.norm(x), sets)


def predict_sets(
    predictor: VisionTransformerPredictor,
    contexts: Sequence[Tensor],
    goals: Sequence[Tensor],
    masks_context: Sequence[TokenSet],
    masks_target: Sequence[TokenSet],
    draws: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> list[Tensor]:
    """Predictions at the target tokens, one tensor a mask set in the form of `masks_target`.

    `contexts` are the features of `masks_context` ([B, K, E] or [R, E]), `goals` those of `masks_target`, which only a
    noised predictor reads; `draws` hands in its (timesteps, noise), a pair a set.
    """
    x, stretches, targets = _predictor_rows(predictor, contexts, goals, masks_context, masks_target, draws)
    *blocks, last = predictor.predictor_blocks
    for block in blocks:
        assert isinstance(block, Block)
        x = x + _attend(block.attn, block.norm1(x), stretches)
        x = x + block.mlp(block.norm2(x))
    assert isinstance(last, Block)
    y = _target_rows_of_last_block(last, x, stretches, targets)
    return _unpack(predictor.predictor_proj(predictor.predictor_norm(y)), masks_target)


def _predictor_rows(
    predictor: VisionTransformerPredictor,
    contexts: Sequence[Tensor],
    goals: Sequence[Tensor],
    masks_context: Sequence[TokenSet],
    masks_target: Sequence[TokenSet],
    draws: Sequence[tuple[Tensor, Tensor]] | None,
) -> tuple[Tensor, list[Stretch], list[int]]:
    """What enters the predictor's blocks [R, P], its stretches of context and target rows, and their target counts."""
    table = predictor.predictor_pos_embed[0]
    runs = [
        (number, rows, c_index.shape, t_index.shape)
        for number, pair in enumerate(zip(masks_context, masks_target))
        for rows, (c_index, t_index) in split_runs(pair)
    ]
    c_shapes, t_shapes = [run[2] for run in runs], [run[3] for run in runs]
    embedded = predictor.predictor_embed(torch.cat([context.flatten(0, -2) for context in contexts]))
    seen = embedded + table.index_select(0, torch.cat([flat_tokens(s) for s in masks_context]))
    places = _split(table.index_select(0, torch.cat([flat_tokens(s) for s in masks_target])), t_shapes)
    if predictor.mask_tokens is not None:
        asked = [predictor.mask_token(number) + place for (number, *_), place in zip(runs, places)]
    else:
        goal = _split(predictor.predictor_embed(torch.cat([g.flatten(0, -2) for g in goals])), t_shapes)
        asked, start, before = [], 0, 0
        for (number, rows, _, shape), features, place in zip(runs, goal, places):
            start, before = (start if number == before else 0), number
            draw = (None, None) if draws is None else draw_of_run(draws[number], rows, start, shape)
            asked.append(predictor.diffuse(features, *draw) + place)
            start += shape.numel()
    rows_of_runs = [torch.cat(pair, dim=1).flatten(0, 1) for pair in zip(_split(seen, c_shapes), asked)]
    stretches = [Stretch(c[0], c[1] + t[1]) for c, t in zip(c_shapes, t_shapes)]
    return torch.cat(rows_of_runs), stretches, [t[1] for t in t_shapes]


def _target_rows_of_last_block(block: Block, x: Tensor, stretches: list[Stretch], targets: list[int]) -> Tensor:
    """The last block for target rows alone: context rows give keys and values, and nothing reads their output."""
    attention, width = block.attn, x.shape[1]
    normed = block.norm1(x)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    wanted = [rows[:, -count:] for rows, count in zip(_split(normed, stretches), targets)]
    shapes = [rows.shape[:2] for rows in wanted]
    query = F.linear(
        torch.cat([r.flatten(0, 1) for r in wanted]), weight[:width], None if bias is None else bias[:width]
    )
    key_value = F.linear(normed, weight[width:], None if bias is None else bias[width:])
    mixed = []
    for q, kv in zip(_split(query, shapes), _split(key_value, stretches)):
        key, value = kv.chunk(2, dim=-1)
        mixed.append(_mix(attention, q, key, value))
    y = torch.cat([rows[:, -count:].flatten(0, 1) for rows, count in zip(_split(x, stretches), targets)])
    y = y + attention.proj_drop(attention.proj(torch.cat(mixed)))
    return y + block.mlp(block.norm2(y))


def _attend(attention: Attention, x: Tensor, stretches: list[Stretch]) -> Tensor:
    """Self-attention inside each clip of a packed [R, D] matrix."""
    mixed = [_mix(attention, *rows.chunk(3, dim=-1)) for rows in _split(attention.qkv(x), stretches)]
    return attention.proj_drop(attention.proj(torch.cat(mixed)))


def _mix(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[b, M, D] queries over [b, N, D] keys and values -> [b * M, D]."""
    q, k, v = (t.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2) for t in (query, key, value))
    return attention.mix(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)


def _split(rows: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """[R, D] as one [clips, length, D] for each stretch. One split: its gradient is one concatenation, no zeros."""
    return [
        part.unflatten(0, (clips, length))
        for part, (clips, length) in zip(rows.split([clips * length for clips, length in shapes]), shapes)
    ]


def _embed(encoder: VisionTransformer, pixels: Tensor, positions: Tensor) -> Tensor:
    """The patch embedding as a matrix product, positions added: [..., pixels] -> [..., E]."""
    projection = encoder.patch_embed.proj
    assert isinstance(projection, nn.Conv2d | nn.Conv3d)
    tokens = F.linear(pixels, projection.weight.flatten(1), projection.bias)
    return (tokens + positions).to(tokens.dtype)


def _stretches(token_set: TokenSet) -> list[Stretch]:
    if isinstance(token_set, Tensor):
        return [Stretch(*token_set.shape)]
    return [Stretch(*index.shape) for _, index in token_set.runs()]


def _unpack(rows: Tensor, sets: Sequence[TokenSet]) -> list[Tensor]:
    parts = rows.split([len(flat_tokens(token_set)) for token_set in sets])
    return [
        part if isinstance(token_set, Ragged) else part.unflatten(0, tuple(token_set.shape))
        for part, token_set in zip(parts, sets)
    ]
