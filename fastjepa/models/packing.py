"""The packed pass: the same numbers as one forward pass a mask set, with the work that the mathematics needs.

Kept patches alone are embedded, by a matrix product; the rows of all mask sets, and of clips of every length, run
through the linear layers as one [R, D] matrix, and attention stays inside each clip; the last blocks of predictor and
target encoder finish target rows alone. How each piece is computed is up to `Operations`.

B clips, N tokens, R rows, D width, E encoder width, P predictor width. Clips of one length are a group with its own
`Patches`; lists of patches, sets and features go group by group.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastjepa.masks.tokens import Ragged, TokenSet, flat_rows, flat_tokens
from fastjepa.models.layers import Block
from fastjepa.models.operations import LIBRARY, Operations, Patches
from fastjepa.models.predictor import Draw, VisionTransformerPredictor
from fastjepa.models.rotary import Places
from fastjepa.models.rows import Dropped, Rotary, Stretch, Wanted, beside, joined, run_shapes, split, stretches_of
from fastjepa.models.vision_transformer import VisionTransformer


def encode_all(
    encoder: VisionTransformer,
    patches: Sequence[Patches],
    operations: Operations = LIBRARY,
    index: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Features of every token of each group, like `encoder(clips)`: [B, N, E] each.

    With `index` int64 [B, U], one a group, those tokens alone: [B, U, E]. All are keys to the end, so that only the
    last block is spared something.
    """
    return _encode(encoder, patches, operations, index, every=False)[0]


def encode_both(
    encoder: VisionTransformer,
    patches: Sequence[Patches],
    operations: Operations = LIBRARY,
    index: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """What `encode_all` gives, to the last bit, and the features of all tokens too, [B, N, E] a group.

    The last block then finishes the tokens that `index` does not name as well.
    """
    asked, every = _encode(encoder, patches, operations, index, every=True)
    assert every is not None
    return asked, every


def _encode(
    encoder: VisionTransformer,
    patches: Sequence[Patches],
    operations: Operations,
    index: Sequence[Tensor] | None,
    *,
    every: bool,
) -> tuple[list[Tensor], list[Tensor] | None]:
    assert encoder.out_layers is None, "the packed pass takes no out_layers"
    embedded = [operations.embed_all(encoder, group) for group in patches]
    stretches = [Stretch(len(group.pixels), len(rows) // len(group.pixels)) for group, rows in zip(patches, embedded)]
    x = joined(embedded)
    everywhere = (torch.arange(length, device=x.device).expand(clips, -1) for clips, length in stretches)
    layout = operations.layout(stretches, x.device, _rotary(encoder, patches, everywhere))
    *blocks, last = encoder.blocks
    assert isinstance(last, Block)
    norms = encoder.lower_norms
    if index is None:
        normed, x, lower = _run_blocks(
            operations, [*blocks, last], encoder.last_norm, x, layout, stretches, True, tuple(norms)
        )
        below = [operations.norm(norms[number], rows, kept=True) for number, rows in lower.items()]
        features = split(beside([*below, normed]), stretches)
        return features, features
    normed, x, lower = _run_blocks(operations, blocks, last.norm1, x, layout, stretches, levels=tuple(norms))

    def finished(some: Sequence[Tensor]) -> list[Tensor]:
        shapes = [Stretch(*one.shape) for one in some]
        wanted = Wanted(
            joined(_rows_of(some, stretches)), operations.layout(shapes, x.device, _rotary(encoder, patches, some))
        )
        dropped = _dropped(last, shapes, x)
        top = operations.last_block(last, encoder.last_norm, normed, x, layout, wanted, True, dropped)
        below = [
            operations.norm(norms[number], operations.take(rows, wanted.place), kept=True)
            for number, rows in lower.items()
        ]
        return split(beside([*below, top]), shapes)

    asked = finished(index)
    if not every:
        return asked, None
    others = [_others(named, length) for named, (_, length) in zip(index, stretches)]
    if sum(one.numel() for one in others):
        places = [torch.cat(pair, dim=1) for pair in zip(index, others)]
        whole = [torch.cat(pair, dim=1) for pair in zip(asked, finished(others))]
    else:
        places, whole = list(index), asked
    return asked, [_in_order(features, place) for features, place in zip(whole, places)]


def _rows_of(index: Sequence[Tensor], stretches: Sequence[Stretch]) -> list[Tensor]:
    """Row numbers in the packed matrix of all groups: int64, one tensor a group."""
    rows, start = [], 0
    for some, (clips, length) in zip(index, stretches):
        number = flat_rows(some, length)
        rows.append(number + start if start else number)
        start += clips * length
    return rows


def _others(index: Tensor, tokens: int) -> Tensor:
    """The tokens of each clip that [B, U] does not name: [B, tokens - U], without asking the device."""
    named = torch.zeros(len(index), tokens, dtype=torch.uint8, device=index.device).scatter_(1, index, 1)
    return named.argsort(dim=1, stable=True)[:, : tokens - index.shape[1]]


def _in_order(features: Tensor, place: Tensor) -> Tensor:
    """[B, N, E] features of all tokens, sorted by the places [B, N] at which they stand."""
    return torch.empty_like(features).scatter_(1, place.unsqueeze(-1).expand_as(features), features)


def encode_sets(
    encoder: VisionTransformer,
    patches: Sequence[Patches],
    sets: Sequence[Sequence[TokenSet]],
    operations: Operations = LIBRARY,
) -> Tensor:
    """Features of the kept tokens, of every level, group after group, set after set and clip after clip: [R, E]."""
    x = joined([operations.embed_sets(encoder, group, kept) for group, kept in zip(patches, sets)])
    every = [token_set for kept in sets for token_set in kept]
    stretches = [stretch for token_set in every for stretch in stretches_of(token_set)]
    layout = operations.layout(stretches, x.device, _rotary(encoder, patches, every))
    norms = encoder.lower_norms
    normed, _, lower = _run_blocks(
        operations, list(encoder.blocks), encoder.last_norm, x, layout, stretches, levels=tuple(norms)
    )
    return beside([*(operations.norm(norms[number], rows) for number, rows in lower.items()), normed])


def predict_sets(
    predictor: VisionTransformerPredictor,
    context: Tensor,
    goals: Sequence[Tensor] | None,
    masks_context: Sequence[TokenSet],
    masks_target: Sequence[TokenSet],
    draws: Sequence[Draw] | None = None,
    operations: Operations = LIBRARY,
    numbers: Sequence[int] | None = None,
) -> list[Tensor]:
    """Predictions at the target tokens, one tensor a mask set in the form of `masks_target`.

    Sets are those of all groups, one after another. `context` [R, E] are the features of `masks_context`, set after
    set; `goals` those of `masks_target` ([B, K, E] or [R, E] each), which only a noised predictor reads; `draws` hands
    in its (timesteps, noise), a pair a set. `numbers` of the sets' mask tokens; without them a set has its own.
    """
    x, rows = _assembled(predictor, context, goals, masks_context, masks_target, draws, operations, numbers)
    *blocks, last = predictor.predictor_blocks
    assert isinstance(last, Block)
    layout = operations.layout(rows.stretches, x.device, _turned(last, predictor, rows.token))
    normed, x, _ = _run_blocks(operations, blocks, last.norm1, x, layout, rows.stretches)
    shapes = [Stretch(*t) for _, t in rows.runs]
    wanted = Wanted(rows.tails, operations.layout(shapes, x.device, _turned(last, predictor, rows.asked)))
    dropped = _dropped(last, shapes, x)
    y = operations.last_block(last, predictor.predictor_norm, normed, x, layout, wanted, False, dropped)
    return _unpack(predictor.predictor_proj(y), masks_target)


def predict_all_sets(
    predictor: VisionTransformerPredictor,
    context: Tensor,
    goals: Sequence[Tensor] | None,
    masks_context: Sequence[TokenSet],
    masks_target: Sequence[TokenSet],
    draws: Sequence[Draw] | None = None,
    operations: Operations = LIBRARY,
    numbers: Sequence[int] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Predictions at the target tokens and at the context tokens: every block finishes all rows.

    Arguments as for `predict_sets`; the predictor has a projection for context tokens.
    """
    assert predictor.predictor_proj_context is not None, "this predictor predicts nothing at context tokens"
    x, rows = _assembled(predictor, context, goals, masks_context, masks_target, draws, operations, numbers)
    blocks = list(predictor.predictor_blocks)
    layout = operations.layout(rows.stretches, x.device, _turned(blocks[0], predictor, rows.token))
    normed, _, _ = _run_blocks(operations, blocks, predictor.predictor_norm, x, layout, rows.stretches)
    heads = rows.heads if rows.heads is not None else _heads(rows.stretches, rows.runs, x.device)
    asked = predictor.predictor_proj(operations.take(normed, rows.tails))
    seen = predictor.predictor_proj_context(operations.take(normed, heads))
    return _unpack(asked, masks_target), _unpack(seen, masks_context)


class _Assembled(NamedTuple):
    """How assembled rows fall into clips: context rows (heads), then target rows (tails), and their token numbers."""

    stretches: list[Stretch]
    runs: list[tuple[Sequence[int], Sequence[int]]]
    tails: Tensor
    heads: Tensor | None
    token: Tensor | None
    asked: Tensor | None


def _assembled(
    predictor: VisionTransformerPredictor,
    context: Tensor,
    goals: Sequence[Tensor] | None,
    masks_context: Sequence[TokenSet],
    masks_target: Sequence[TokenSet],
    draws: Sequence[Draw] | None,
    operations: Operations,
    numbers: Sequence[int] | None,
) -> tuple[Tensor, _Assembled]:
    """The rows that the predictor's blocks read, [R, P]."""
    embedded = predictor.predictor_embed(context)
    goal = None
    if predictor.mask_tokens is None:
        assert goals is not None, "a noised predictor starts from the target features"
        goal = predictor.predictor_embed(torch.cat([g.flatten(0, -2) for g in goals]))
    x = operations.assemble(predictor, embedded, masks_context, masks_target, goal, draws, numbers)
    runs = [shapes for pair in zip(masks_context, masks_target) for shapes in run_shapes(*pair)]
    stretches = [Stretch(c[0], c[1] + t[1]) for c, t in runs]
    place = _places_of_tails(stretches, [t[1] for _, t in runs], x.device)
    if predictor.predictor_pos_embed is not None:
        return x, _Assembled(stretches, runs, place, None, None, None)
    # Token numbers, which rotary attention reads.
    asked = torch.cat([flat_tokens(token_set) for token_set in masks_target])
    heads = _heads(stretches, runs, x.device)
    token = asked.new_empty(len(x))
    token[heads] = torch.cat([flat_tokens(token_set) for token_set in masks_context])
    token[place] = asked
    return x, _Assembled(stretches, runs, place, heads, token, asked)


def _rotary(encoder: VisionTransformer, patches: Sequence[Patches], sets: Iterable[TokenSet]) -> Rotary | None:
    """Where the rows of these sets lie, for an encoder with rotary positions.

    Groups differ in the number of frames alone, so that token numbers of all of them count in frames of one size.
    """
    if encoder.pos_embed is not None:
        return None
    frames = {group.grid[-2:] for group in patches}
    if len(frames) > 1:
        raise ValueError(f"clips of one step have frames of one size, got grids of {sorted(frames)} tokens")
    token = joined([flat_tokens(token_set) for token_set in sets])
    return _rotary_of(encoder.blocks[0], encoder.places(patches[0].grid, token))


def _turned(block: nn.Module, predictor: VisionTransformerPredictor, token: Tensor | None) -> Rotary | None:
    return None if token is None else _rotary_of(block, predictor.places(token))


def _rotary_of(block: nn.Module, places: Places | None) -> Rotary | None:
    assert isinstance(block, Block)
    attention = block.attn
    if places is None or attention.rope_style is None:
        return None
    dtype = torch.promote_types(attention.qkv.weight.dtype, torch.float32)
    return Rotary(places, attention.head_dim, attention.rope_style, dtype)


def _places_of_tails(stretches: list[Stretch], counts: list[int], device: torch.device) -> Tensor:
    """Where the last rows of every clip stand, so many of each stretch: int64 [R], made on the device."""
    return _places(stretches, [(length - count, count) for (_, length), count in zip(stretches, counts)], device)


def _heads(
    stretches: list[Stretch], runs: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device
) -> Tensor:
    """The same of the context rows, the first of every clip."""
    return _places(stretches, [(0, context[1]) for context, _ in runs], device)


def _places(stretches: list[Stretch], parts: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Rows (first, how many) of every clip of a stretch."""
    places, start = [], 0
    for (clips, length), (first, count) in zip(stretches, parts):
        end = start + clips * length
        begin = torch.arange(start + first, end, length, device=device)[:clips]
        places.append((begin.unsqueeze(1) + torch.arange(count, device=device)).flatten())
        start = end
    return torch.cat(places)


def _run_blocks(
    operations: Operations,
    blocks: list[nn.Module],
    after: nn.Module,
    x: Tensor,
    layout: Any,
    stretches: list[Stretch],
    kept: bool = False,
    levels: Sequence[int] = (),
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Blocks and the norm `after` them over a packed [R, D] matrix: (normalised rows, rows, those after `levels`).

    Each residual addition is one step with the norm that follows it, also across blocks. `kept` where no matrix
    product reads the normalised rows next.
    """
    lower: dict[int, Tensor] = {}
    norms = [*(block.norm1 for block in blocks), after]
    first = norms[0]
    assert isinstance(first, nn.Module)
    if not blocks:
        return operations.norm(first, x, kept=kept), x, lower
    normed, x = operations.norm_through(first, x)
    for number, (block, following) in enumerate(zip(blocks, norms[1:])):
        assert isinstance(block, Block)
        assert isinstance(following, nn.Module)
        last = kept and following is after
        dropped = _dropped(block, stretches, x)
        normed, x = operations.block(number, block, following, normed, x, layout, last, dropped)
        if number in levels:
            lower[number] = x
    return normed, x, lower


def _dropped(block: Block, stretches: Sequence[Stretch], x: Tensor) -> Dropped | None:
    """A draw for each clip and half of a block, told to its rows; None where nothing is left out."""
    if not block.drop_path.active:
        return None
    clips = sum(one.clips for one in stretches)

    def told() -> Tensor:
        scales = block.drop_path.scales(clips, x).split([one.clips for one in stretches])
        parts = [part.unsqueeze(1).expand(-1, one.length).flatten() for part, one in zip(scales, stretches)]
        return joined(parts)

    return Dropped(told(), told())


def _unpack(rows: Tensor, sets: Sequence[TokenSet]) -> list[Tensor]:
    parts = rows.split([len(flat_tokens(token_set)) for token_set in sets])
    return [
        part if isinstance(token_set, Ragged) else part.unflatten(0, tuple(token_set.shape))
        for part, token_set in zip(parts, sets)
    ]
