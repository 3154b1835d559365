"""The packed pass through `fastjepa_kernels`, in one of their implementations.

Matrix products stay the library's; everything between them is one pass over memory each. Under autocast the kernels
are given what autocast would cast, and write what the next matrix product reads.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjepa_kernels as kernels
from fastjepa.attending import Indexed, flat_layout
from fastjepa.masks.tokens import TokenSet, flat_tokens, gather_tokens, number_of_clips, split_runs
from fastjepa.models.layers import MLP, Block, SwiGLU
from fastjepa.models.operations import Patches, Targets, product_dtype
from fastjepa.models.predictor import NOISE_STEPS, Draw, RowNoise, VisionTransformerPredictor
from fastjepa.models.rows import split, stretches_of
from fastjepa.models.vision_transformer import VisionTransformer
from fastjepa.pixels import MEAN, STD


class FusedTargets(Targets):
    """Features as the target encoder leaves them; the loss normalises the rows it compares.

    Levels are rows of their own to the kernels: [B, N, L * E] is [B, N * L, E] without a copy.
    """

    def __init__(self, features: Tensor, impl: kernels.Impl, levels: int = 1) -> None:
        self.raw = features
        self.levels = levels
        self.impl: kernels.Impl = impl

    def every(self) -> Tensor:
        """All of them, normalised now."""
        return self._normalised(self.raw)

    def rows(self, token_set: TokenSet) -> Tensor:
        """The normalised features of a mask set; only those are normalised."""
        return self._normalised(gather_tokens(self.raw, token_set))

    def error(self, prediction: Tensor, token_set: TokenSet, exponent: float) -> Tensor:
        """One pass for each stretch of clips with equally many rows."""
        if isinstance(token_set, Tensor):
            return self._error(prediction, self.raw, token_set, exponent)
        # A clip that is asked for nothing has no error.
        parts = [
            self._error(rows, self.raw[clips], index, exponent) * len(index)
            for rows, (clips, index) in zip(split(prediction, stretches_of(token_set)), token_set.runs())
            if index.numel()
        ]
        return torch.stack(parts).sum() / len(token_set.lengths)

    def _error(self, prediction: Tensor, features: Tensor, index: Tensor, exponent: float) -> Tensor:
        if self.levels > 1:
            prediction, features = self._apart(prediction).flatten(1, 2), self._apart(features).flatten(1, 2)
            level = torch.arange(self.levels, device=index.device)
            index = (index.unsqueeze(-1) * self.levels + level).flatten(1)
        return kernels.target_loss(prediction, features, index, exponent=exponent, impl=self.impl)

    def _normalised(self, rows: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        normalised = kernels.layer_norm(self._apart(rows), eps=1e-5, out_dtype=wide, impl=self.impl)
        return normalised.view(rows.shape)

    def _apart(self, rows: Tensor) -> Tensor:
        """[..., L * E] as [..., L, E]; as it is where there is one level."""
        return rows if self.levels == 1 else rows.unflatten(-1, (self.levels, -1))


class Fused(Indexed):
    """Every piece through one implementation of `fastjepa_kernels`, attention as `Indexed`.

    `with_product` takes the forms that compute the matrix product too, of the patch embedding and the feed-forward
    layer, in place of a product of the library with a pass beside it.
    """

    keyed_noise = True

    def __init__(self, impl: kernels.Impl, *, with_product: bool = False) -> None:
        super().__init__(impl)
        self.with_product = with_product

    def check(self, network: nn.Module) -> None:
        """Attention as `Indexed`, and the layers."""
        super().check(network)
        self.check_layers(network)

    def check_layers(self, network: nn.Module) -> None:
        """The kernels compute layer norms and the exact GELU."""
        for name, module in network.named_modules():
            wrong = (
                (isinstance(module, MLP) and not _exact_gelu(module.act), "the exact GELU"),
                (isinstance(module, Block) and not isinstance(module.norm1, nn.LayerNorm), "layer norms"),
            )
            for found, expected in wrong:
                if found:
                    raise ValueError(f"fastjepa_kernels: expected {expected} in {name}: use runtime.kernels=library")

    def cut(self, encoder: VisionTransformer, clips: Tensor) -> Patches:
        """The clips as they are: patches are cut where they are embedded, those that are kept alone."""
        return Patches(clips if encoder.is_video else clips.unsqueeze(2), encoder.token_grid(clips))

    def embed_all(self, encoder: VisionTransformer, patches: Patches) -> Tensor:
        """One pass from pixels to embedded tokens with their positions."""
        return self._embed(encoder, patches, patches.pixels, None)

    def embed_sets(self, encoder: VisionTransformer, patches: Patches, sets: Sequence[TokenSet]) -> Tensor:
        """One call for each stretch of clips with equally many kept tokens."""
        parts = [
            self._embed(encoder, patches, patches.pixels[rows], index)
            for token_set in sets
            for rows, (index,) in split_runs([token_set])
        ]
        return torch.cat(parts)

    def _embed(self, encoder: VisionTransformer, patches: Patches, clips: Tensor, index: Tensor | None) -> Tensor:
        projection = encoder.patch_embed.proj
        assert isinstance(projection, nn.Conv2d | nn.Conv3d)
        table = encoder.positions(patches.grid)
        bytes_given = clips.dtype == torch.uint8
        return kernels.patch_embed_gather(
            clips, projection.weight.flatten(1), projection.bias, index,
            tubelet=encoder.tubelet_size if encoder.is_video else 1, patch=encoder.patch_size,
            position=None if table is None else table[0], impl=self.impl,
            mean=MEAN if bytes_given else None, std=STD if bytes_given else None,
            form="fused" if self.with_product and self.impl == "triton" else "auto",
        ).flatten(0, 1)  # fmt: skip

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
        """One launch for all clips of all sets, every row written once."""
        table = None if predictor.predictor_pos_embed is None else predictor.predictor_pos_embed[0]
        indices, lengths = [], []
        for sets in (masks_context, masks_target):
            indices.append(torch.cat([flat_tokens(s) for s in sets]))
            lengths.append(flat_layout([stretch for s in sets for stretch in stretches_of(s)], embedded.device).starts)
        token: Tensor | None = None
        asked: dict[str, Any] = {}
        if goal is None:
            tokens = [
                predictor.mask_token(n).view(1, -1).expand(number_of_clips(token_set), -1)
                for n, token_set in zip(numbers or range(len(masks_target)), masks_target)
            ]
            token = torch.cat(tokens)
        else:
            asked = {"targets": goal, **self._drawn(predictor, goal, masks_target, draws)}
        return kernels.assemble_tokens(
            embedded, indices[0], indices[1], table, token, **asked,
            context_lengths=lengths[0], target_lengths=lengths[1],
            out_dtype=torch.promote_types(embedded.dtype, _kept_dtype(table, token)), impl=self.impl,
        )  # fmt: skip

    def _drawn(
        self,
        predictor: VisionTransformerPredictor,
        goal: Tensor,
        masks_target: Sequence[TokenSet],
        draws: Sequence[Draw] | None,
    ) -> dict[str, Tensor]:
        """The share of the signal of every clip, and the noise or what to make it from."""
        if draws is None:
            clips = sum(number_of_clips(token_set) for token_set in masks_target)
            steps = torch.randint(NOISE_STEPS, (clips,), device=goal.device)
            noise: dict[str, Tensor] = {"noise": torch.randn_like(goal)}
        else:
            steps, made = torch.cat([draw[0] for draw in draws]), [draw[1] for draw in draws]
            keyed = [noise for noise in made if isinstance(noise, RowNoise)]
            given = [noise.flatten(0, -2) for noise in made if isinstance(noise, Tensor)]
            if (keyed and given) or any(noise.seed is not keyed[0].seed for noise in keyed):
                raise ValueError("draws come with their noise, or all of them with keys to make it from and one seed")
            if keyed:
                noise = {"row_key": torch.cat([noise.keys.flatten() for noise in keyed]), "seed": keyed[0].seed}
            else:
                noise = {"noise": torch.cat(given)}
        return {"alpha": predictor.signal_left[steps], **noise}  # type: ignore[index]

    def targets(self, features: Tensor, levels: int = 1) -> Targets:
        """The features themselves: they are normalised where they are read."""
        return FusedTargets(features, self.impl, levels)

    def norm(self, norm: nn.Module, x: Tensor, *, kept: bool = False) -> Tensor:
        """One pass, written in the dtype of the next matrix product, or in float32 at least where it is kept."""
        assert isinstance(norm, nn.LayerNorm)
        return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps, out_dtype=_written(x, kept), impl=self.impl)

    def norm_through(self, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the rows themselves is added in the backward pass of the norm."""
        assert isinstance(norm, nn.LayerNorm)
        out_dtype = _written(x, kept=False)
        return kernels.layer_norm_through(x, norm.weight, norm.bias, norm.eps, out_dtype=out_dtype, impl=self.impl)

    def project(self, projection: nn.Linear, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product without its bias, which `add_norm` adds and gives its gradient."""
        return F.linear(y, projection.weight), projection.bias

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
        """Bias, residual and norm in one pass, which gives the bias its gradient too."""
        assert isinstance(norm, nn.LayerNorm)
        if drop.p and drop.training:  # what is dropped includes the bias
            y, bias = drop(y if bias is None else y + bias.to(y.dtype)), None
        return kernels.add_layer_norm(
            y, x, norm.weight, norm.bias, norm.eps, x_bias=bias, row_scale=scale, out_dtype=_written(x, kept),
            impl=self.impl,
        )  # fmt: skip

    def hidden(self, mlp: MLP | SwiGLU, x: Tensor) -> Tensor:
        """Bias and GELU in one pass after the product; a gated layer is the library's."""
        if isinstance(mlp, SwiGLU):
            return mlp.hidden(x)
        return mlp.drop(kernels.linear_gelu(x, mlp.fc1.weight, mlp.fc1.bias, impl=self.impl))

    def feed_forward(self, mlp: MLP | SwiGLU, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """With products, GELU and its gradient are part of them."""
        if not self.with_product or isinstance(mlp, SwiGLU) or (mlp.drop.p and mlp.drop.training):
            return super().feed_forward(mlp, x)
        product = kernels.mlp(x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, impl=self.impl)
        return product, mlp.fc2.bias

    def move_(self, targets: list[Tensor], onlines: list[Tensor], momentum: float | Tensor) -> None:
        """Target, online weight and result in one pass."""
        kernels.ema_update_(targets, onlines, momentum, impl=self.impl)


def _exact_gelu(act: nn.Module) -> bool:
    return isinstance(act, nn.GELU) and act.approximate == "none"


def _kept_dtype(table: Tensor | None, token: Tensor | None) -> torch.dtype:
    """What positions, mask tokens or noise make of the rows that they are added to or stand beside."""
    given = table if table is not None else token
    return torch.float32 if given is None else given.dtype


def _written(x: Tensor, kept: bool) -> torch.dtype:
    """The dtype of a norm's result: what follows is a matrix product, unless the result is kept."""
    if kept:
        return torch.promote_types(x.dtype, torch.float32)
    return product_dtype(x)
