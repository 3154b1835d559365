"""The V-JEPA objective: predict, in feature space, what the masked tokens of a clip would look like.

B clips, N tokens, M mask sets, Kc context and Kt target tokens, E encoder width. Source: arXiv 2404.08471, section 3.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.masks.tokens import TokenSet, apply_masks, split_runs

Execution = Literal["packed", "reference"]
Draw = tuple[Tensor, Tensor]


@dataclass
class JEPAOutput:
    """What one forward pass gives: `loss_reg` is None at weight 0, and so are the lists unless they are collected."""

    loss: Tensor
    loss_jepa: Tensor
    loss_reg: Tensor | None = None
    predictions: list[Tensor] | None = None
    targets: list[Tensor] | None = None


class JEPA(nn.Module):
    """Context encoder, predictor and the target encoder that follows the encoder as a moving average.

    The target encoder is a copy of `encoder` made here, without gradients. `loss_exp` q gives mean |p - t| ** q / q;
    `reg_coeff` weighs the variance regulariser. `execution` chooses how the same numbers are computed: "reference" runs
    one pass a mask set, the way the public code does; "packed" runs the reference pass as well until its own exists.
    """

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        *,
        loss_exp: float = 1.0,
        reg_coeff: float = 0.0,
        execution: Execution = "packed",
    ) -> None:
        super().__init__()
        if execution not in ("packed", "reference"):
            raise ValueError(f"execution must be 'packed' or 'reference', got {execution!r}")
        self.encoder = encoder
        self.predictor = predictor
        self.target_encoder = deepcopy(encoder).requires_grad_(False)
        self.loss_exp = loss_exp
        self.reg_coeff = reg_coeff
        self.execution = execution

    @torch.no_grad()
    def target_features(self, clips: Tensor) -> Tensor:
        """Target features of every token, normalised without affine, at least float32: [B, C, T, H, W] -> [B, N, E]."""
        features = _wide(self.target_encoder(clips))
        return F.layer_norm(features, features.shape[-1:], eps=1e-5)

    def forward(
        self,
        clips: Tensor,
        masks_context: Sequence[TokenSet],
        masks_target: Sequence[TokenSet],
        draws: Sequence[Draw] | None = None,
        collect: bool = False,
    ) -> JEPAOutput:
        """The loss of one batch: the mean over mask sets of the mean over clips of each clip's own mean.

        `clips` float [B, C, T, H, W], normalised. `masks_context` and `masks_target`: M mask sets each, [B, K] int64 or
        `Ragged`. `draws` hands in (timesteps [B], noise [B, Kt, P]) a mask set for the noised predictor. `collect`
        keeps predictions and targets: [B, Kt, E] a set, or [R, E] rows where lengths differ.
        Errors: ValueError where the numbers of mask sets differ.
        """
        if len(masks_context) != len(masks_target) or not masks_context:
            raise ValueError(
                f"context and target mask sets come in pairs, got {len(masks_context)} and {len(masks_target)}"
            )
        if draws is not None and len(draws) != len(masks_context):
            raise ValueError(f"draws come one a mask set, got {len(draws)} for {len(masks_context)} sets")
        targets = self.target_features(clips)
        errors, deviations, kept = [], [], []
        for number, pair in enumerate(zip(masks_context, masks_target)):
            error, deviation = clips.new_zeros(()), []
            draw = None if draws is None else draws[number]
            for prediction, target in self._pass(clips, targets, *pair, number, draw):
                share = len(prediction) / len(clips)
                error = error + share * self._error(_wide(prediction), target)
                if self.reg_coeff:
                    # Unbiased, as published; a single token has no spread, and no division by zero either.
                    variance = _wide(prediction).var(dim=1, correction=min(1, prediction.shape[1] - 1))
                    deviation.append((variance + 1e-4).sqrt())
                if collect:
                    kept.append((number, prediction.detach(), target))
            errors.append(error)
            if deviation:
                deviations.append(torch.cat(deviation))
        loss_jepa = torch.stack(errors).mean()
        loss_reg = torch.relu(1.0 - torch.stack(deviations).mean(dim=0)).mean() if self.reg_coeff else None
        loss = loss_jepa if loss_reg is None else loss_jepa + self.reg_coeff * loss_reg
        output = JEPAOutput(loss, loss_jepa, loss_reg)
        if collect:
            output.predictions = _by_set([(n, p) for n, p, _ in kept], masks_target)
            output.targets = _by_set([(n, t) for n, _, t in kept], masks_target)
        return output

    def _pass(
        self, clips: Tensor, targets: Tensor, context: TokenSet, target: TokenSet, number: int, draw: Draw | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(prediction, target) of one mask set, as the public code runs it; one dense pass a run of equal lengths."""
        first = 0
        for rows, (kept, wanted) in split_runs([context, target]):
            goal = apply_masks(targets[rows], wanted)
            seen = self.encoder(clips[rows], kept)
            timesteps, noise = (None, None) if draw is None else (draw[0][rows], draw[1][rows])
            yield self.predictor(seen, goal, kept, wanted, mask_index=number, timesteps=timesteps, noise=noise), goal
            first = rows.stop
        assert first == len(clips), "mask sets must describe every clip of the batch"

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        difference = (prediction - target).abs()
        if self.loss_exp != 1.0:
            difference = difference**self.loss_exp
        return difference.mean() / self.loss_exp

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
        # 1 - m in double precision: momenta come within 1e-5 of 1, where float32 would lose most of its digits.
        move = (1.0 - torch.as_tensor(momentum, dtype=torch.float64, device=pairs[0][0].device)).float()
        # In slices, so that the temporary differences stay small beside a large encoder.
        for start in range(0, len(pairs), 32):
            targets, onlines = ([p[side] for p in pairs[start : start + 32]] for side in (0, 1))
            differences = torch._foreach_sub(onlines, targets)
            torch._foreach_mul_(differences, move)
            torch._foreach_add_(targets, differences)


def _wide(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays, so that a float64 model is float64 throughout."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_set(kept: list[tuple[int, Tensor]], sets: Sequence[TokenSet]) -> list[Tensor]:
    collected = []
    for number, token_set in enumerate(sets):
        parts = [part for n, part in kept if n == number]
        dense = isinstance(token_set, Tensor)
        collected.append(torch.cat(parts) if dense else torch.cat([part.flatten(0, 1) for part in parts]))
    return collected
