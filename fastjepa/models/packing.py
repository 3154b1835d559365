"""The packed pass: the same numbers as one forward pass a mask set, with the work that the mathematics needs.

Kept patches alone are embedded, by a matrix product; the rows of all mask sets run through the linear layers as one
[R, D] matrix, and attention stays inside each clip; the predictor's last block computes queries and MLP for target rows
only. How each piece is computed is up to `Operations`.

B clips, N tokens, R rows, D width, E encoder width, P predictor width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.masks.tokens import Ragged, TokenSet, flat_tokens
from fastjepa.models.layers import Block
from fastjepa.models.operations import LIBRARY, Operations, Patches, Stretch, run_shapes, split, stretches_of
from fastjepa.models.predictor import Draw, VisionTransformerPredictor
from fastjepa.models.vision_transformer import VisionTransformer


def encode_all(encoder: VisionTransformer, patches: Patches, operations: Operations = LIBRARY) -> Tensor:
    """Features of every token, like `encoder(clips)`: [B, N, E]."""
    assert encoder.out_layers is None, "the packed pass takes no out_layers"
    x = operations.embed_all(encoder, patches)
    clips = len(patches.pixels)
    stretches = [Stretch(clips, len(x) // clips)]
    features, _ = _run_blocks(operations, list(encoder.blocks), encoder.norm, x, stretches, kept=True)
    return features.unflatten(0, (clips, -1))


def encode_sets(
    encoder: VisionTransformer, patches: Patches, sets: Sequence[TokenSet], operations: Operations = LIBRARY
) -> list[Tensor]:
    """Features of the kept tokens, one tensor a mask set: [B, K, E], or [R, E] rows where lengths differ."""
    x = operations.embed_sets(encoder, patches, sets)
    stretches = [stretch for token_set in sets for stretch in stretches_of(token_set)]
    return _unpack(_run_blocks(operations, list(encoder.blocks), encoder.norm, x, stretches)[0], sets)


def predict_sets(
    predictor: VisionTransformerPredictor,
    contexts: Sequence[Tensor],
    goals: Sequence[Tensor] | None,
    masks_context: Sequence[TokenSet],
    masks_target: Sequence[TokenSet],
    draws: Sequence[Draw] | None = None,
    operations: Operations = LIBRARY,
) -> list[Tensor]:
    """Predictions at the target tokens, one tensor a mask set in the form of `masks_target`.

    `contexts` are the features of `masks_context` ([B, K, E] or [R, E]), `goals` those of `masks_target`, which only a
    noised predictor reads; `draws` hands in its (timesteps, noise), a pair a set.
    """
    embedded = predictor.predictor_embed(torch.cat([context.flatten(0, -2) for context in contexts]))
    goal = None
    if predictor.mask_tokens is None:
        assert goals is not None, "a noised predictor starts from the target features"
        goal = predictor.predictor_embed(torch.cat([g.flatten(0, -2) for g in goals]))
    x = operations.assemble(predictor, embedded, masks_context, masks_target, goal, draws)
    runs = [shapes for pair in zip(masks_context, masks_target) for shapes in run_shapes(*pair)]
    stretches, targets = [Stretch(c[0], c[1] + t[1]) for c, t in runs], [t[1] for _, t in runs]
    *blocks, last = predictor.predictor_blocks
    assert isinstance(last, Block)
    normed, x = _run_blocks(operations, blocks, last.norm1, x, stretches)
    y = _target_rows_of_last_block(operations, last, predictor.predictor_norm, normed, x, stretches, targets)
    return _unpack(predictor.predictor_proj(y), masks_target)


def _run_blocks(
    operations: Operations,
    blocks: list[nn.Module],
    after: nn.Module,
    x: Tensor,
    stretches: list[Stretch],
    kept: bool = False,
) -> tuple[Tensor, Tensor]:
    """Blocks and the norm `after` them over a packed [R, D] matrix: (normalised rows, rows).

    Each residual addition is one step with the norm that follows it, also across blocks. `kept` where no matrix
    product reads the normalised rows next.
    """
    norms = [*(block.norm1 for block in blocks), after]
    normed = operations.norm(norms[0], x, kept=kept and not blocks)  # type: ignore[arg-type]
    layout = operations.layout(stretches, x.device)
    for block, following in zip(blocks, norms[1:]):
        last = kept and following is after
        assert isinstance(block, Block)
        attention, mlp = block.attn, block.mlp
        mixed = operations.attend(attention, normed, layout)
        normed, x = operations.add_norm(block.norm2, attention.proj, mixed, x, attention.proj_drop)
        hidden = operations.hidden(mlp, normed)
        normed, x = operations.add_norm(following, mlp.fc2, hidden, x, mlp.drop, kept=last)  # type: ignore[arg-type]
    return normed, x


def _target_rows_of_last_block(
    operations: Operations,
    block: Block,
    after: nn.Module,
    normed: Tensor,
    x: Tensor,
    stretches: list[Stretch],
    targets: list[int],
) -> Tensor:
    """The last block and the norm after it, for target rows alone: nothing reads what context rows would become."""
    attention, mlp, width = block.attn, block.mlp, x.shape[1]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    wanted = [rows[:, -count:] for rows, count in zip(split(normed, stretches), targets)]
    shapes = [rows.shape[:2] for rows in wanted]
    query = F.linear(
        torch.cat([r.flatten(0, 1) for r in wanted]), weight[:width], None if bias is None else bias[:width]
    )
    key_value = F.linear(normed, weight[width:], None if bias is None else bias[width:])
    mixed = []
    for q, kv in zip(split(query, shapes), split(key_value, stretches)):
        mixed.append(operations.mix(attention, q, *kv.chunk(2, dim=-1)))
    y = torch.cat([rows[:, -count:].flatten(0, 1) for rows, count in zip(split(x, stretches), targets)])
    normed, y = operations.add_norm(block.norm2, attention.proj, torch.cat(mixed), y, attention.proj_drop)
    return operations.add_norm(after, mlp.fc2, operations.hidden(mlp, normed), y, mlp.drop)[0]


def _unpack(rows: Tensor, sets: Sequence[TokenSet]) -> list[Tensor]:
    parts = rows.split([len(flat_tokens(token_set)) for token_set in sets])
    return [
        part if isinstance(token_set, Ragged) else part.unflatten(0, tuple(token_set.shape))
        for part, token_set in zip(parts, sets)
    ]
