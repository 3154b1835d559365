"""The packed pass: the same numbers as one forward pass a mask set, with the work that the mathematics needs.

Kept patches alone are embedded, by a matrix product; the rows of all mask sets run through the linear layers as one
[R, D] matrix, and attention stays inside each clip; the last blocks of predictor and target encoder finish target rows
alone. How each piece is computed is up to `Operations`.

B clips, N tokens, R rows, D width, E encoder width, P predictor width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.masks.tokens import Ragged, TokenSet, flat_rows, flat_tokens
from fastjepa.models.layers import Block
from fastjepa.models.operations import LIBRARY, Operations, Patches, Stretch, Wanted, run_shapes, stretches_of
from fastjepa.models.predictor import Draw, VisionTransformerPredictor
from fastjepa.models.vision_transformer import VisionTransformer


def encode_all(
    encoder: VisionTransformer, patches: Patches, operations: Operations = LIBRARY, index: Tensor | None = None
) -> Tensor:
    """Features of every token, like `encoder(clips)`: [B, N, E].

    With `index` int64 [B, U] those tokens alone: [B, U, E]. All are keys to the end, so that only the last block is
    spared something.
    """
    return _encode(encoder, patches, operations, index, every=False)[0]


def encode_both(
    encoder: VisionTransformer, patches: Patches, operations: Operations = LIBRARY, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `encode_all` gives, to the last bit, and the features of all tokens too, [B, N, E].

    The last block then finishes the tokens that `index` does not name as well.
    """
    asked, every = _encode(encoder, patches, operations, index, every=True)
    assert every is not None
    return asked, every


def _encode(
    encoder: VisionTransformer, patches: Patches, operations: Operations, index: Tensor | None, *, every: bool
) -> tuple[Tensor, Tensor | None]:
    assert encoder.out_layers is None, "the packed pass takes no out_layers"
    x = operations.embed_all(encoder, patches)
    clips = len(patches.pixels)
    layout = operations.layout([Stretch(clips, len(x) // clips)], x.device)
    *blocks, last = encoder.blocks
    if index is None:
        features = _run_blocks(operations, [*blocks, last], encoder.norm, x, layout, kept=True)[0]
        features = features.unflatten(0, (clips, -1))
        return features, features
    assert isinstance(last, Block)
    normed, x = _run_blocks(operations, blocks, last.norm1, x, layout)
    tokens = len(x) // clips

    def finished(some: Tensor) -> Tensor:
        wanted = Wanted(flat_rows(some, tokens), operations.layout([Stretch(*some.shape)], x.device))
        return operations.last_block(last, encoder.norm, normed, x, layout, wanted, True).unflatten(0, (clips, -1))

    asked = finished(index)
    if not every or index.shape[1] == tokens:
        return asked, _in_order(asked, index) if every else None
    others = _others(index, tokens)
    return asked, _in_order(torch.cat([asked, finished(others)], dim=1), torch.cat([index, others], dim=1))


def _others(index: Tensor, tokens: int) -> Tensor:
    """The tokens of each clip that [B, U] does not name: [B, tokens - U], without asking the device."""
    named = torch.zeros(len(index), tokens, dtype=torch.uint8, device=index.device).scatter_(1, index, 1)
    return named.argsort(dim=1, stable=True)[:, : tokens - index.shape[1]]


def _in_order(features: Tensor, place: Tensor) -> Tensor:
    """[B, N, E] features of all tokens, sorted by the places [B, N] at which they stand."""
    return torch.empty_like(features).scatter_(1, place.unsqueeze(-1).expand_as(features), features)


def encode_sets(
    encoder: VisionTransformer, patches: Patches, sets: Sequence[TokenSet], operations: Operations = LIBRARY
) -> Tensor:
    """Features of the kept tokens, set after set and clip after clip: [R, E]."""
    x = operations.embed_sets(encoder, patches, sets)
    layout = operations.layout([stretch for token_set in sets for stretch in stretches_of(token_set)], x.device)
    return _run_blocks(operations, list(encoder.blocks), encoder.norm, x, layout)[0]


def predict_sets(
    predictor: VisionTransformerPredictor,
    context: Tensor,
    goals: Sequence[Tensor] | None,
    masks_context: Sequence[TokenSet],
    masks_target: Sequence[TokenSet],
    draws: Sequence[Draw] | None = None,
    operations: Operations = LIBRARY,
) -> list[Tensor]:
    """Predictions at the target tokens, one tensor a mask set in the form of `masks_target`.

    `context` [R, E] are the features of `masks_context`, set after set; `goals` those of `masks_target` ([B, K, E] or
    [R, E] each), which only a noised predictor reads; `draws` hands in its (timesteps, noise), a pair a set.
    """
    embedded = predictor.predictor_embed(context)
    goal = None
    if predictor.mask_tokens is None:
        assert goals is not None, "a noised predictor starts from the target features"
        goal = predictor.predictor_embed(torch.cat([g.flatten(0, -2) for g in goals]))
    x = operations.assemble(predictor, embedded, masks_context, masks_target, goal, draws)
    runs = [shapes for pair in zip(masks_context, masks_target) for shapes in run_shapes(*pair)]
    stretches, targets = [Stretch(c[0], c[1] + t[1]) for c, t in runs], [t[1] for _, t in runs]
    *blocks, last = predictor.predictor_blocks
    assert isinstance(last, Block)
    layout = operations.layout(stretches, x.device)
    normed, x = _run_blocks(operations, blocks, last.norm1, x, layout)
    place = _places_of_tails(stretches, targets, x.device)
    wanted = Wanted(place, operations.layout([Stretch(*t) for _, t in runs], x.device))
    y = operations.last_block(last, predictor.predictor_norm, normed, x, layout, wanted, False)
    return _unpack(predictor.predictor_proj(y), masks_target)


def _places_of_tails(stretches: list[Stretch], counts: list[int], device: torch.device) -> Tensor:
    """Where the last rows of every clip stand, so many of each stretch: int64 [R], made on the device."""
    places, start = [], 0
    for (clips, length), count in zip(stretches, counts):
        end = start + clips * length
        first = torch.arange(start + length - count, end, length, device=device)[:clips]
        places.append((first.unsqueeze(1) + torch.arange(count, device=device)).flatten())
        start = end
    return torch.cat(places)


def _run_blocks(
    operations: Operations,
    blocks: list[nn.Module],
    after: nn.Module,
    x: Tensor,
    layout: Any,
    kept: bool = False,
) -> tuple[Tensor, Tensor]:
    """Blocks and the norm `after` them over a packed [R, D] matrix: (normalised rows, rows).

    Each residual addition is one step with the norm that follows it, also across blocks. `kept` where no matrix
    product reads the normalised rows next.
    """
    norms = [*(block.norm1 for block in blocks), after]
    first = norms[0]
    assert isinstance(first, nn.Module)
    if not blocks:
        return operations.norm(first, x, kept=kept), x
    normed, x = operations.norm_through(first, x)
    for number, (block, following) in enumerate(zip(blocks, norms[1:])):
        assert isinstance(block, Block)
        assert isinstance(following, nn.Module)
        last = kept and following is after
        normed, x = operations.block(number, block, following, normed, x, layout, last)
    return normed, x


def _unpack(rows: Tensor, sets: Sequence[TokenSet]) -> list[Tensor]:
    parts = rows.split([len(flat_tokens(token_set)) for token_set in sets])
    return [
        part if isinstance(token_set, Ragged) else part.unflatten(0, tuple(token_set.shape))
        for part, token_set in zip(parts, sets)
    ]
