"""The V-JEPA objective: predict, in feature space, what the masked tokens of a clip would look like.

B clips, N tokens, M mask sets, Kc context and Kt target tokens, E encoder width. Source: arXiv 2404.08471, section 3.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastjepa.masks.tokens import TokenSet, apply_masks, number_of_clips, split_runs
from fastjepa.masks.union import TargetUnion
from fastjepa.models import VisionTransformer, VisionTransformerPredictor, packing
from fastjepa.models.operations import LIBRARY, Operations, Targets, widened
from fastjepa.models.predictor import Draw, draw_of_run
from fastjepa.pixels import as_floats

Execution = Literal["packed", "reference"]


@dataclass
class JEPAOutput:
    """What one forward pass gives: `loss_reg` is None at weight 0, and so is what follows unless it is asked for.

    `every_target` [B, N, E] are the target features of all tokens.
    """

    loss: Tensor
    loss_jepa: Tensor
    loss_reg: Tensor | None = None
    predictions: list[Tensor] | None = None
    targets: list[Tensor] | None = None
    every_target: Tensor | None = None


class JEPA(nn.Module):
    """Context encoder, predictor and the target encoder that follows the encoder as a moving average.

    The target encoder is a copy of `encoder` made here, without gradients. `loss_exp` q gives mean |p - t| ** q / q;
    `reg_coeff` weighs the variance regulariser. `execution` chooses how the same numbers are computed: "reference" runs
    one pass a mask set, the way the public code does, and takes any encoder and predictor with the same calls; "packed"
    does the work that the mathematics needs and takes this library's networks (`fastjepa.models.packing`), and runs
    its pieces through `operations`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        *,
        loss_exp: float = 1.0,
        reg_coeff: float = 0.0,
        execution: Execution = "packed",
        operations: Operations = LIBRARY,
    ) -> None:
        super().__init__()
        if execution not in ("packed", "reference"):
            raise ValueError(f"execution must be 'packed' or 'reference', got {execution!r}")
        ours = isinstance(encoder, VisionTransformer) and isinstance(predictor, VisionTransformerPredictor)
        if execution == "packed" and not ours:
            raise ValueError("packed execution takes a VisionTransformer and its predictor: use execution='reference'")
        if execution == "reference" and operations is not LIBRARY:
            raise ValueError("only packed execution runs through other operations: use execution='packed'")
        for network in (encoder, predictor):
            operations.check(network)
        self.encoder = encoder
        self.predictor = predictor
        self.target_encoder = deepcopy(encoder).requires_grad_(False)
        self.loss_exp = loss_exp
        self.reg_coeff = reg_coeff
        self.execution = execution
        self.operations = operations

    @torch.no_grad()
    def target_features(self, clips: Tensor) -> Tensor:
        """Target features of every token, normalised without affine, at least float32: [B, C, T, H, W] -> [B, N, E].

        `clips` as for `forward`.
        """
        if self.execution == "reference":
            return Targets(self.target_encoder(self._floats(clips))).every()
        encoder = self.target_encoder
        assert isinstance(encoder, VisionTransformer)
        patches = self.operations.cut(encoder, clips)
        return self.operations.targets(packing.encode_all(encoder, patches, self.operations)).every()

    def forward(
        self,
        clips: Tensor,
        masks_context: Sequence[TokenSet],
        masks_target: Sequence[TokenSet],
        draws: Sequence[Draw] | None = None,
        collect: bool = False,
        union: TargetUnion | None = None,
        look: bool = False,
    ) -> JEPAOutput:
        """The loss of one batch: the mean over mask sets of the mean over clips of each clip's own mean.

        `clips` [B, C, T, H, W]: uint8, or floats that are normalised (`fastjepa.pixels`). `masks_context` and
        `masks_target`: M mask sets each, [B, K] int64 or `Ragged`. `draws` hands in (timesteps [B], noise [B, Kt, P]) a
        mask set for the noised predictor. `collect` keeps predictions and targets: [B, Kt, E] a set, or [R, E] rows
        where lengths differ. `union` is that of `masks_target` (see `target_union`): packed execution then finishes
        those tokens alone; the reference way needs none. `look` keeps predictions and the target features of all
        tokens, for figures of health: it costs a block at most and changes no bit of the loss.
        Errors: ValueError where the numbers of mask sets, or of their clips, differ, and for clips of other integers.
        """
        if len(masks_context) != len(masks_target) or not masks_context:
            raise ValueError(
                f"context and target mask sets come in pairs, got {len(masks_context)} and {len(masks_target)}"
            )
        if draws is not None and len(draws) != len(masks_context):
            raise ValueError(f"draws come one a mask set, got {len(draws)} for {len(masks_context)} sets")
        for token_set in (*masks_context, *masks_target):
            described = number_of_clips(token_set)
            if described != len(clips):
                raise ValueError(f"a mask set describes {described} clips, the batch has {len(clips)}")
        if self.execution == "packed":
            predictions, targets, every = self._packed(clips, masks_context, masks_target, draws, union, look)
        else:
            predictions, targets = self._reference(clips, masks_context, masks_target, draws)
            every = targets.every() if look else None
        # Where the targets stand in what the target encoder has finished.
        asked = masks_target if union is None or self.execution == "reference" else union.places
        errors = [targets.error(p, token_set, self.loss_exp) for p, token_set in zip(predictions, asked)]
        loss_jepa = torch.stack(errors).mean()
        loss, loss_reg = loss_jepa, None
        if self.reg_coeff:
            spread = torch.stack([_spread(p, token_set) for p, token_set in zip(predictions, masks_target)]).mean(dim=0)
            loss_reg = torch.relu(1.0 - spread).mean()
            loss = loss_jepa + self.reg_coeff * loss_reg
        output = JEPAOutput(loss, loss_jepa, loss_reg, every_target=every)
        if collect or look:
            output.predictions = [p.detach() for p in predictions]
        if collect:
            output.targets = [targets.rows(token_set) for token_set in asked]
        return output

    def _reference(
        self, clips: Tensor, context: Sequence[TokenSet], target: Sequence[TokenSet], draws: Sequence[Draw] | None
    ) -> tuple[list[Tensor], Targets]:
        """Predictions a mask set, and targets, the way the public code runs: every patch embedded in every pass."""
        clips = self._floats(clips)
        with torch.no_grad():
            targets = Targets(self.target_encoder(clips))
        predictions = []
        for number, (c_set, t_set) in enumerate(zip(context, target)):
            parts, start = [], 0
            for rows, (kept, wanted) in split_runs([c_set, t_set]):
                goal = apply_masks(targets.every()[rows], wanted)
                seen = self.encoder(clips[rows], kept)
                draw = (None, None) if draws is None else draw_of_run(draws[number], rows, start, wanted.shape)
                parts.append(self.predictor(seen, goal, kept, wanted, number, *draw))
                start += wanted.numel()
            dense = isinstance(t_set, Tensor)
            predictions.append(torch.cat(parts) if dense else torch.cat([part.flatten(0, 1) for part in parts]))
        return predictions, targets

    def _packed(
        self,
        clips: Tensor,
        context: Sequence[TokenSet],
        target: Sequence[TokenSet],
        draws: Sequence[Draw] | None,
        union: TargetUnion | None,
        look: bool,
    ) -> tuple[list[Tensor], Targets, Tensor | None]:
        """The same numbers: patches cut once, both sets in one encoder pass and in one predictor pass.

        And with `look` the target features of all tokens.
        """
        encoder, target_encoder, predictor = self.encoder, self.target_encoder, self.predictor
        assert isinstance(encoder, VisionTransformer) and isinstance(target_encoder, VisionTransformer)  # noqa: PT018
        assert isinstance(predictor, VisionTransformerPredictor)
        operations = self.operations
        patches = operations.cut(encoder, clips)
        index, asked = (None, target) if union is None else (union.index, union.places)
        with torch.no_grad():
            every = None
            if look:
                features, whole = packing.encode_both(target_encoder, patches, operations, index)
                every = operations.targets(whole).every()
            else:
                features = packing.encode_all(target_encoder, patches, operations, index)
            targets = operations.targets(features)
            goals = None if predictor.mask_tokens is not None else [targets.rows(token_set) for token_set in asked]
        features = packing.encode_sets(encoder, patches, context, operations)
        predictions = packing.predict_sets(predictor, features, goals, context, target, draws, operations)
        return predictions, targets, every

    def _floats(self, clips: Tensor) -> Tensor:
        """Clips as an encoder takes them: bytes are normalised in the dtype of its weights."""
        return as_floats(clips, next(self.target_encoder.parameters()).dtype, channel=1)

    @torch.no_grad()
    def update_target(self, momentum: float | Tensor, *, every_parameter: bool = False) -> None:
        """Move the target encoder: target <- m * target + (1 - m) * encoder.

        `momentum` may be a 0-dim tensor on the device, so that a skipped step (m = 1) needs no host decision. Frozen
        parameters (position tables) are left alone; `every_parameter` averages them too, as the public code does.
        """
        pairs = [
            (target.data, online.data)
            for target, online in zip(self.target_encoder.parameters(), self.encoder.parameters())
            if online.requires_grad or every_parameter
        ]
        self.operations.move_([target for target, _ in pairs], [online for _, online in pairs], momentum)


def _spread(prediction: Tensor, token_set: TokenSet) -> Tensor:
    """Standard deviation over the target tokens of each clip and channel: [B, E].

    Unbiased, as published; a single token has no spread, and no division by zero either.
    """
    runs = [prediction]
    if not isinstance(token_set, Tensor):
        shapes = [index.shape for _, index in token_set.runs()]
        runs = [p.unflatten(0, tuple(s)) for p, s in zip(prediction.split([s.numel() for s in shapes]), shapes)]
    deviations = [widened(run).var(dim=1, correction=min(1, run.shape[1] - 1)).add(1e-4).sqrt() for run in runs]
    return torch.cat(deviations)
