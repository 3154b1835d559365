"""The seam between the packed pass and kernels: what the pass asks for, here in torch's own functions.

`Operations` is complete by itself; `fastjepa.fused` overrides its methods with those of `fastjepa_kernels`, which
compute the same numbers in fewer passes over memory. R rows of D channels, clips one after another; `Stretch` says how
rows fall into clips.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastjepa.masks.tokens import TokenSet, flat_rows, flat_tokens, gather_tokens, split_runs
from fastjepa.models.layers import MLP, Attention, Block, SwiGLU
from fastjepa.models.predictor import Draw, VisionTransformerPredictor, draw_of_run
from fastjepa.models.rows import (
    Dropped,
    Layout,
    Rotary,
    Stretch,
    Wanted,
    cross_parts,
    joined,
    self_parts,
    split,
    turn_of_rows,
)
from fastjepa.models.vision_transformer import VisionTransformer
from fastjepa.pixels import as_floats


@dataclass(frozen=True)
class Patches:
    """A batch made ready for all passes of a step: the token grid, and `pixels` in the form `Operations.cut` gives."""

    pixels: Tensor
    grid: tuple[int, ...]


class Targets:
    """Target features of every token [B, N, E], normalised without affine, and what is asked of them.

    Of several levels side by side each is normalised by itself.
    """

    def __init__(self, features: Tensor, levels: int = 1) -> None:
        wide = widened(features)
        if levels > 1:
            wide = wide.unflatten(-1, (levels, -1))
        self._features = F.layer_norm(wide, wide.shape[-1:], eps=1e-5)
        if levels > 1:
            self._features = self._features.flatten(-2)

    def every(self) -> Tensor:
        """The features of all tokens: [B, N, E]."""
        return self._features

    def rows(self, token_set: TokenSet) -> Tensor:
        """The features of a mask set: [B, K, E], or [R, E] rows where lengths differ."""
        return gather_tokens(self._features, token_set)

    def error(self, prediction: Tensor, token_set: TokenSet, exponent: float) -> Tensor:
        """Mean over clips of each clip's mean of |p - t| ** q / q, q the exponent; `prediction` has the form of `rows`.

        The result is 0-dim, float32 at least.
        """
        difference = self._difference(prediction, token_set, exponent)
        if isinstance(token_set, Tensor):
            return difference.mean() / exponent
        return (difference.mean(dim=-1) * token_set.weights().to(difference.dtype)).sum() / exponent

    def weighed_error(self, prediction: Tensor, token_set: TokenSet, exponent: float, weight: Tensor | None) -> Tensor:
        """`error` with each token's part multiplied by its `weight`, [B, K] or [R]; the weights are not normalised."""
        if weight is None:
            return self.error(prediction, token_set, exponent)
        tokens = self._difference(prediction, token_set, exponent).mean(dim=-1) * weight
        if isinstance(token_set, Tensor):
            return tokens.mean() / exponent
        return (tokens * token_set.weights().to(tokens.dtype)).sum() / exponent

    def _difference(self, prediction: Tensor, token_set: TokenSet, exponent: float) -> Tensor:
        difference = (widened(prediction) - self.rows(token_set)).abs()
        return difference if exponent == 1.0 else difference**exponent


class Operations:
    """Every piece of the packed pass that has a kernel.

    `keyed_noise` says whether `assemble` takes `RowNoise` in its draws and makes the noise where it is used,
    `with_product` whether `feed_forward` is more than `hidden` and a product.
    """

    keyed_noise = False
    with_product = False

    def check(self, network: nn.Module) -> None:
        """Errors: ValueError where a network has pieces that these operations would not compute as it does."""

    def check_layers(self, network: nn.Module) -> None:
        """`check` of everything but attention."""

    def cut(self, encoder: VisionTransformer, clips: Tensor) -> Patches:
        """[B, C, T, H, W] (or [B, C, H, W]), uint8 or normalised: ready to be embedded, in the dtype that is given.

        Here they become the pixels of every token, [B, N, C * tubelet * patch ** 2].
        """
        grid = encoder.token_grid(clips)
        video = clips if encoder.is_video else clips.unsqueeze(2)
        frames, side = (encoder.tubelet_size if encoder.is_video else 1), encoder.patch_size
        pattern = "b c (t f) (h p) (w q) -> b (t h w) (c f p q)"
        return Patches(rearrange(video, pattern, f=frames, p=side, q=side), grid)

    def embed_all(self, encoder: VisionTransformer, patches: Patches) -> Tensor:
        """Embedded tokens of whole clips, positions added: [B * N, E]."""
        return _embed(encoder, patches.pixels, encoder.positions(patches.grid)).flatten(0, 1)

    def embed_sets(self, encoder: VisionTransformer, patches: Patches, sets: Sequence[TokenSet]) -> Tensor:
        """Embedded kept tokens of all sets, positions added: [R, E], set after set."""
        index = torch.cat([flat_rows(token_set, patches.pixels.shape[1]) for token_set in sets])
        token = torch.cat([flat_tokens(token_set) for token_set in sets])
        kept = patches.pixels.flatten(0, 1).index_select(0, index)
        table = encoder.positions(patches.grid)
        return _embed(encoder, kept, None if table is None else table[0].index_select(0, token))

    def assemble(
        self,
        predictor: VisionTransformerPredictor,
        embedded: Tensor,
        masks_context: Sequence[TokenSet],
        masks_target: Sequence[TokenSet],
        goal: Tensor | None,
        draws: Sequence[Draw] | None,
        numbers: Sequence[int] | None = None,
    ) -> Tensor:
        """What the predictor's blocks read, clip by clip its context rows and then its target rows: [R, P].

        `embedded` [Rc, P] are the projected context features of all sets, `goal` [Rt, P] those of the targets where the
        predictor has no mask tokens. Each row gets the position of its token, where there is a table. `numbers` are
        those of the mask tokens of the sets; without them a set has its own.
        """
        table = None if predictor.predictor_pos_embed is None else predictor.predictor_pos_embed[0]

        def placed(x: Tensor, index: Tensor) -> Tensor:
            return x if table is None else x + table[index]

        runs = [
            (number, rows, c_index, t_index)
            for number, pair in enumerate(zip(masks_context, masks_target))
            for rows, (c_index, t_index) in split_runs(pair)
        ]
        seen = split(embedded, [c_index.shape for *_, c_index, _ in runs])
        goals = [None] * len(runs) if goal is None else split(goal, [t_index.shape for *_, t_index in runs])
        parts, start, before = [], 0, 0
        for context, features, (number, rows, c_index, t_index) in zip(seen, goals, runs):
            start, before = (start if number == before else 0), number
            if features is None:
                token = predictor.mask_token(number if numbers is None else numbers[number])
                asked = token.expand(*t_index.shape, -1)
            else:
                draw = None if draws is None else draw_of_run(draws[number], rows, start, t_index.shape)
                asked = predictor.diffuse(features, *(draw or (None, None)))
            start += t_index.numel()
            both = [placed(context, c_index), placed(asked, t_index)]
            parts.append(torch.cat(both, dim=1).flatten(0, 1))
        return torch.cat(parts)

    def targets(self, features: Tensor, levels: int = 1) -> Targets:
        """What the target encoder gives [B, N, E], of so many levels side by side, made ready for the loss."""
        return Targets(features, levels)

    def norm(self, norm: nn.Module, x: Tensor, *, kept: bool = False) -> Tensor:
        """Layer normalisation: [..., D] -> [..., D]; `kept` where no matrix product reads the result next."""
        return norm(x)

    def norm_through(self, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm before the first block, and the rows themselves for the residual stream: (norm(x), x)."""
        return self.norm(norm, x), x

    def project(self, projection: nn.Linear, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """A product whose result `add_norm` reads: (rows, the bias that is left for it to add, or None)."""
        return projection(y), None

    def add_norm(
        self,
        norm: nn.Module,
        y: Tensor,
        bias: Tensor | None,
        x: Tensor,
        drop: nn.Dropout,
        *,
        kept: bool = False,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What ends one half of a block and begins the next: (norm(total), total = x + scale * drop(y + bias)).

        `kept` as for `norm`, `scale` [R] is one for each row, float32 at least (see `Dropped`).
        """
        # Rounded like the product, so that the residual stream keeps its precision.
        branch = drop(y if bias is None else y + bias.to(y.dtype))
        if scale is not None:  # in the precision of the scale, rounded once
            branch = (branch * scale.unsqueeze(-1)).to(branch.dtype)
        total = x + branch
        return norm(total), total

    def feed_forward(self, mlp: MLP | SwiGLU, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The feed-forward layer: (rows, bias) as `project`."""
        return self.project(mlp.last, self.hidden(mlp, x))

    def hidden(self, mlp: MLP | SwiGLU, x: Tensor) -> Tensor:
        """The first half of the feed-forward layer: [R, D] -> [R, hidden features]."""
        return mlp.hidden(x)

    def block(
        self,
        number: int,
        block: Block,
        after: nn.Module,
        normed: Tensor,
        x: Tensor,
        layout: Any,
        kept: bool,
        dropped: Dropped | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block over packed rows, from the norm before it to the norm `after` it: (normalised rows, rows), [R, D].

        `number` is its place in the network; `kept` as for `norm`; `dropped` is drawn before, so that a block that is
        computed again is the same.
        """
        return self._end(block, after, self.attend(block.attn, normed, layout), x, kept, dropped)

    def attend_wanted(self, attention: Attention, normed: Tensor, layout: Any, wanted: Wanted) -> Tensor:
        """Attention of the wanted rows to all rows of their clips, before the output projection: [R wanted, D].

        `normed` [R, D] are all rows, normalised. Nobody reads what the others would become.
        """
        width, weight, bias = normed.shape[1], attention.qkv.weight, attention.qkv.bias
        query = F.linear(self.take(normed, wanted.place), weight[:width], None if bias is None else bias[:width])
        key_value = F.linear(normed, weight[width:], None if bias is None else bias[width:])
        return self.cross(attention, query, key_value, wanted.layout, layout)

    def last_block(
        self,
        block: Block,
        after: nn.Module,
        normed: Tensor,
        x: Tensor,
        layout: Any,
        wanted: Wanted,
        kept: bool,
        dropped: Dropped | None = None,
    ) -> Tensor:
        """The last block of a network, which finishes the wanted rows alone, and the norm `after` it: [R wanted, D].

        `dropped` is that of the wanted rows, the other arguments as for `block`.
        """
        mixed = self.attend_wanted(block.attn, normed, layout, wanted)
        return self.finish(block, after, mixed, self.take(x, wanted.place), kept, dropped)

    def take(self, rows: Tensor, place: Tensor) -> Tensor:
        """Some rows, each at most once: [R, D] and int64 [K] -> [K, D]."""
        return rows.index_select(0, place)

    def finish(
        self, block: Block, after: nn.Module, mixed: Tensor, x: Tensor, kept: bool, dropped: Dropped | None = None
    ) -> Tensor:
        """What follows attention in the last block of a network, and the norm `after` it: [R, D]."""
        return self._end(block, after, mixed, x, kept, dropped)[0]

    def _end(
        self, block: Block, after: nn.Module, mixed: Tensor, x: Tensor, kept: bool, dropped: Dropped | None
    ) -> tuple[Tensor, Tensor]:
        """What follows attention in a block."""
        first, second = (None, None) if dropped is None else dropped
        attended = self.project(block.attn.proj, mixed)
        normed, x = self.add_norm(block.norm2, *attended, x, block.attn.proj_drop, scale=first)
        fed = self.feed_forward(block.mlp, normed)
        return self.add_norm(after, *fed, x, block.mlp.drop, kept=kept, scale=second)

    def layout(self, stretches: list[Stretch], device: torch.device, rotary: Rotary | None = None) -> Any:
        """What `attend` and `cross` need to know of how rows fall into clips and where they lie, made once a pass."""
        return Layout(stretches, turn_of_rows(rotary))

    def cross(self, attention: Attention, query: Tensor, key_value: Tensor, layout: Any, kv_layout: Any) -> Tensor:
        """Attention of some rows of each clip to all of them: query [Rq, D], key_value [R, 2 D] -> [Rq, D]."""
        parts = cross_parts(attention, query, key_value, layout, kv_layout)
        return joined([self.mix(attention, *part) for part in parts])

    def attend(self, attention: Attention, x: Tensor, layout: Any) -> Tensor:
        """Self-attention inside each clip, before the output projection: [R, D] -> [R, D]."""
        return joined([self.mix(attention, *part) for part in self_parts(attention, attention.qkv(x), layout)])

    def mix(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, M, H, d] queries over [b, N, H, d] keys and values -> [b * M, D]."""
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return attention.mix(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)

    @torch.no_grad()
    def move_(self, targets: list[Tensor], onlines: list[Tensor], momentum: float | Tensor) -> None:
        """target <- m * target + (1 - m) * online, in place, pair by pair."""
        # 1 - m in double precision: momenta come within 1e-5 of 1, where float32 would lose most of its digits.
        if not isinstance(momentum, Tensor):
            # A fill: a copy from the host would wait for the device.
            momentum = torch.full((), momentum, dtype=torch.float64, device=targets[0].device)
        move = (1.0 - momentum.double()).float()
        # In slices, so that the temporary differences stay small beside a large encoder.
        for start in range(0, len(targets), 32):
            part = targets[start : start + 32]
            differences = torch._foreach_sub(onlines[start : start + 32], part)
            torch._foreach_mul_(differences, move)
            torch._foreach_add_(part, differences)


LIBRARY = Operations()


def widened(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays, so that a float64 model is float64 throughout."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product reads in place of `x`: autocast's dtype where it is on, which leaves float64 alone."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _embed(encoder: VisionTransformer, pixels: Tensor, positions: Tensor | None) -> Tensor:
    """The patch embedding as a matrix product, positions added where there is a table: [..., pixels] -> [..., E]."""
    projection = encoder.patch_embed.proj
    assert isinstance(projection, nn.Conv2d | nn.Conv3d)
    # Bytes become floats here, in the dtype that the product reads, and only those that are embedded.
    channels = pixels.unflatten(-1, (projection.in_channels, -1))
    rows = as_floats(channels, product_dtype(projection.weight), channel=-2).flatten(-2)
    tokens = F.linear(rows, projection.weight.flatten(1), projection.bias)
    return tokens if positions is None else (tokens + positions).to(tokens.dtype)
