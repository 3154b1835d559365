"""The V-JEPA objective: predict, in feature space, what the masked tokens of a clip would look like.

B clips, N tokens, M mask sets, Kc context and Kt target tokens, E encoder width. Source: arXiv 2404.08471, section 3.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastjepa.dense import context_token_weights
from fastjepa.masks.tokens import TokenSet, apply_masks, number_of_clips, split_runs
from fastjepa.masks.union import TargetUnion
from fastjepa.models import VisionTransformer, VisionTransformerPredictor, packing
from fastjepa.models.operations import LIBRARY, Operations, Targets, widened
from fastjepa.models.predictor import Draw, draw_of_run
from fastjepa.pixels import as_floats

Execution = Literal["packed", "reference"]
MaskTokens = Literal["set", "length"]
Nested = Sequence[TokenSet] | Sequence[Sequence[TokenSet]]


@dataclass
class JEPAOutput:
    """What one forward pass gives: `loss_reg` is None at weight 0, and so is what follows unless it is asked for.

    `loss_context` is the error at context tokens, before its weight, of a predictor that predicts them.

    `every_target` [B, N, E] are the target features of all tokens. Of clips of several lengths there is a list of each,
    a length each, and `losses_jepa` are the prediction errors, whose mean `loss_jepa` is by their shares.
    """

    loss: Tensor
    loss_jepa: Tensor
    loss_reg: Tensor | None = None
    predictions: list[Any] | None = None
    targets: list[Any] | None = None
    every_target: Any = None
    loss_context: Tensor | None = None
    losses_jepa: list[Tensor] | None = None


@dataclass
class Predicted:
    """What a pass predicts, by group and mask set, and what it is compared with.

    `at_context` is None unless the predictor predicts context tokens too; `every` are the target features of all
    tokens, where they were asked for.
    """

    at_targets: list[list[Tensor]]
    at_context: list[list[Tensor]] | None
    targets: list[Targets]
    every: list[Tensor] | None = None


@dataclass
class Group:
    """Clips of one length and their mask sets; `number` is its place among the lengths of the call."""

    number: int
    clips: Tensor
    context: Sequence[TokenSet]
    target: Sequence[TokenSet]
    draws: Sequence[Draw] | None
    union: TargetUnion | None


class JEPA(nn.Module):
    """Context encoder, predictor and the target encoder that follows the encoder as a moving average.

    The target encoder is a copy of `encoder` made here, without gradients. `loss_exp` q gives mean |p - t| ** q / q;
    `reg_coeff` weighs the variance regulariser. `execution` chooses how the same numbers are computed: "reference" runs
    one pass a mask set, the way the public code does, and takes any encoder and predictor with the same calls; "packed"
    does the work that the mathematics needs and takes this library's networks (`fastjepa.models.packing`), and runs
    its pieces through `operations`. `mask_token_by` says what chooses the learned mask token: the mask set, or, as the
    released V-JEPA 2 was trained, the place of the clips' length among those of the call.

    An encoder with levels is taught at each of them. A predictor with `predict_context` is taught at context tokens,
    too, where each counts the less the farther it lies from a target (`fastjepa.dense`), with `context_distance`.
    Source: V-JEPA 2.1 (arXiv 2603.14482).
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
        mask_token_by: MaskTokens = "set",
        context_distance: bool = True,
    ) -> None:
        super().__init__()
        if mask_token_by not in ("set", "length"):
            raise ValueError(f"mask_token_by must be 'set' or 'length', got {mask_token_by!r}")
        if execution not in ("packed", "reference"):
            raise ValueError(f"execution must be 'packed' or 'reference', got {execution!r}")
        ours = isinstance(encoder, VisionTransformer) and isinstance(predictor, VisionTransformerPredictor)
        if execution == "packed" and not ours:
            raise ValueError("packed execution takes a VisionTransformer and its predictor: use execution='reference'")
        if getattr(predictor, "return_all_tokens", False):
            raise ValueError(
                "the objective reads predictions at targets: build the predictor without return_all_tokens"
            )
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
        self.mask_token_by = mask_token_by
        self.context_distance = context_distance
        self.levels = encoder.number_of_levels if isinstance(encoder, VisionTransformer) else 1
        if isinstance(predictor, VisionTransformerPredictor) and predictor.levels != self.levels:
            raise ValueError(
                f"encoder and predictor must have equally many levels, got {self.levels} and {predictor.levels}"
            )
        self.dense = getattr(predictor, "predictor_proj_context", None) is not None
        if self.dense and context_distance and not isinstance(encoder, VisionTransformer):
            raise ValueError("distances to targets need the token grid of a VisionTransformer: context_distance=False")
        self.train(self.training)

    def train(self, mode: bool = True) -> "JEPA":
        """As ever, but for the target encoder, which leaves nothing out (dropout, stochastic depth)."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    @torch.no_grad()
    def target_features(self, clips: Tensor) -> Tensor:
        """Target features of every token, normalised without affine, at least float32: [B, C, T, H, W] -> [B, N, E].

        Of an encoder with levels those of all, [B, N, levels * E]. `clips` as for `forward`.
        """
        if self.execution == "reference":
            return Targets(self._encoded(self.target_encoder, self._floats(clips)), self.levels).every()
        encoder = self.target_encoder
        assert isinstance(encoder, VisionTransformer)
        patches = self.operations.cut(encoder, clips)
        features = packing.encode_all(encoder, [patches], self.operations)[0]
        return self.operations.targets(features, self.levels).every()

    def forward(
        self,
        clips: Tensor | Sequence[Tensor],
        masks_context: Nested,
        masks_target: Nested,
        draws: Sequence[Any] | None = None,
        collect: bool = False,
        union: TargetUnion | Sequence[TargetUnion] | None = None,
        look: bool = False,
        shares: Sequence[float] | None = None,
        context_weight: float = 1.0,
    ) -> JEPAOutput:
        """The loss of one batch: the mean over mask sets of the mean over clips of each clip's own mean.

        `clips` [B, C, T, H, W]: uint8, or floats that are normalised (`fastjepa.pixels`). `masks_context` and
        `masks_target`: M mask sets each, [B, K] int64 or `Ragged`. `draws` hands in (timesteps [B], noise [B, Kt, P]) a
        mask set for the noised predictor. `collect` keeps predictions and targets: [B, Kt, E] a set, or [R, E] rows
        where lengths differ. `union` is that of `masks_target` (see `target_union`): packed execution then finishes
        those tokens alone; the reference way needs none, nor does a predictor of context tokens, whose loss comes with
        `context_weight`. `look` keeps predictions and the target features of all tokens, for figures of health: it
        costs a block at most and changes no bit of the loss.

        Clips of several lengths T are a list of tensors, and masks, draws and unions lists of what belongs to each. The
        loss then is the mean of those of the lengths, or their sum weighed by `shares`. Source: V-JEPA 2 (arXiv
        2506.09985). Errors: ValueError where the numbers of mask sets, or of their clips, differ, and for clips of
        other integers.
        """
        single = isinstance(clips, Tensor)
        groups = _groups(*_as_lists(clips, masks_context, masks_target, draws, union))
        self._check_frames(groups)
        if shares is not None and len(shares) != len(groups):
            raise ValueError(f"shares come one a length, got {len(shares)} for {len(groups)} lengths")
        reference = self.execution == "reference"
        if self.dense:  # every token is compared
            groups = [replace(group, union=None) for group in groups]
        found = self._reference(groups) if reference else self._packed(groups, look)
        predictions, targets = found.at_targets, found.targets
        # Where the targets stand in what the target encoder has finished.
        asked = [g.target if g.union is None or reference else g.union.places for g in groups]
        losses, spreads = [], []
        for group, guesses, goals, places in zip(groups, predictions, targets, asked):
            losses.append(torch.stack([goals.error(p, s, self.loss_exp) for p, s in zip(guesses, places)]))
            if self.reg_coeff:
                spread = torch.stack([_spread(p, s) for p, s in zip(guesses, group.target)]).mean(dim=0)
                spreads.append(torch.relu(1.0 - spread).mean())
        of_each = [errors.mean() for errors in losses]
        loss_jepa = _weighed(of_each, shares)
        loss, loss_reg = loss_jepa, None
        if self.reg_coeff:
            loss_reg = _weighed(spreads, shares)
            loss = loss_jepa + self.reg_coeff * loss_reg
        loss_context = None
        if found.at_context is not None:
            loss_context = _weighed(
                [self._context_error(*one) for one in zip(groups, found.at_context, targets)], shares
            )
            loss = loss + context_weight * loss_context
        output = JEPAOutput(loss, loss_jepa, loss_reg, loss_context=loss_context)
        if look:
            seen = [goals.every() for goals in targets] if found.every is None else found.every
            output.every_target = seen[0] if single else seen
            output.losses_jepa = None if single else [loss.detach() for loss in of_each]
        if collect or look:
            kept = [[p.detach() for p in guesses] for guesses in predictions]
            output.predictions = kept[0] if single else kept
        if collect:
            rows = [[goals.rows(s) for s in places] for goals, places in zip(targets, asked)]
            output.targets = rows[0] if single else rows
        return output

    def _check_frames(self, groups: Sequence[Group]) -> None:
        """Token numbers mean one place to encoder and predictor: rotary ones count in frames of their own."""
        encoder, predictor = self.encoder, self.predictor
        if not (isinstance(encoder, VisionTransformer) and isinstance(predictor, VisionTransformerPredictor)):
            return
        for group in groups if predictor.predictor_pos_embed is None else ():
            given = encoder.token_grid(group.clips)[-2:]
            if given != predictor.grid[-2:]:
                raise ValueError(
                    f"the predictor was built for frames of {predictor.grid[-2:]} tokens, the clips have {given}"
                )

    def _number(self, group: Group, mask_set: int) -> int:
        """Which mask token stands for the targets of a set."""
        return mask_set if self.mask_token_by == "set" else group.number

    def _context_error(self, group: Group, guesses: Sequence[Tensor], goals: Targets) -> Tensor:
        """The error at the context tokens of a group, the mean over its mask sets."""
        weights: list[Tensor | None] = [None] * len(group.context)
        if self.context_distance:
            assert isinstance(self.encoder, VisionTransformer)
            grid = self.encoder.token_grid(group.clips)
            weights = [context_token_weights(c, t, grid) for c, t in zip(group.context, group.target)]
        parts = zip(guesses, group.context, weights)
        return torch.stack([goals.weighed_error(p, s, self.loss_exp, w) for p, s, w in parts]).mean()

    def _encoded(self, encoder: nn.Module, clips: Tensor, kept: Tensor | None = None) -> Tensor:
        """Features of every level, where there are several."""
        return encoder(clips, kept, every_level=True) if self.levels > 1 else encoder(clips, kept)

    def _reference(self, groups: Sequence[Group]) -> Predicted:
        """Predictions a mask set, and targets, the way the public code runs: every patch embedded in every pass."""
        found, seen_too, every_targets = [], [], []
        for group in groups:
            clips = self._floats(group.clips)
            with torch.no_grad():
                targets = Targets(self._encoded(self.target_encoder, clips), self.levels)
            predictions, at_context = [], []
            for number, (c_set, t_set) in enumerate(zip(group.context, group.target)):
                parts: list[Tensor] = []
                others: list[Tensor] = []
                start = 0
                token = self._number(group, number)
                for rows, (kept, wanted) in split_runs([c_set, t_set]):
                    goal = apply_masks(targets.every()[rows], wanted)
                    seen = self._encoded(self.encoder, clips[rows], kept)
                    draw: tuple[Any, Any] = (None, None)
                    if group.draws is not None:
                        draw = draw_of_run(group.draws[number], rows, start, wanted.shape)
                    guess = self.predictor(seen, goal, kept, wanted, token, *draw)
                    if self.dense:
                        guess, other = guess
                        others.append(other)
                    parts.append(guess)
                    start += wanted.numel()
                predictions.append(_set_of_runs(parts, t_set))
                if self.dense:
                    at_context.append(_set_of_runs(others, c_set))
            found.append(predictions)
            seen_too.append(at_context)
            every_targets.append(targets)
        return Predicted(found, seen_too if self.dense else None, every_targets)

    def _packed(self, groups: Sequence[Group], look: bool) -> Predicted:
        """The same numbers: patches cut once, all sets in one encoder pass and in one predictor pass.

        With `look` also the target features of all tokens.
        """
        encoder, target_encoder, predictor = self.encoder, self.target_encoder, self.predictor
        assert isinstance(encoder, VisionTransformer) and isinstance(target_encoder, VisionTransformer)  # noqa: PT018
        assert isinstance(predictor, VisionTransformerPredictor)
        operations = self.operations
        patches = [operations.cut(encoder, group.clips) for group in groups]
        unions = [group.union for group in groups if group.union is not None]
        index, asked = None, [group.target for group in groups]
        if unions:
            index, asked = [union.index for union in unions], [union.places for union in unions]
        with torch.no_grad():
            every = None
            if look:
                features, whole = packing.encode_both(target_encoder, patches, operations, index)
                every = [operations.targets(one, self.levels).every() for one in whole]
            else:
                features = packing.encode_all(target_encoder, patches, operations, index)
            targets = [operations.targets(one, self.levels) for one in features]
            goals = None
            if predictor.mask_tokens is None:
                goals = [goal.rows(token_set) for goal, places in zip(targets, asked) for token_set in places]
        context = [token_set for group in groups for token_set in group.context]
        target = [token_set for group in groups for token_set in group.target]
        draws = None if groups[0].draws is None else [draw for group in groups for draw in group.draws or ()]
        numbers = [self._number(group, number) for group in groups for number in range(len(group.target))]
        rows = packing.encode_sets(encoder, patches, [group.context for group in groups], operations)
        given = (predictor, rows, goals, context, target, draws, operations, numbers)
        if not self.dense:
            return Predicted(_by_group(packing.predict_sets(*given), groups), None, targets, every)
        found, seen = packing.predict_all_sets(*given)
        return Predicted(_by_group(found, groups), _by_group(seen, groups), targets, every)

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


def _as_lists(clips: Any, context: Any, target: Any, draws: Any, union: Any) -> tuple[Any, Any, Any, Any, Any]:
    """What belongs to clips of one length in lists of one, as if there were several."""
    if not isinstance(clips, Tensor):
        return clips, context, target, draws, union
    return [clips], [context], [target], None if draws is None else [draws], None if union is None else [union]


def _groups(
    clips: Sequence[Tensor],
    context: Sequence[Sequence[TokenSet]],
    target: Sequence[Sequence[TokenSet]],
    draws: Sequence[Sequence[Draw]] | None,
    unions: Sequence[TargetUnion] | None,
) -> list[Group]:
    """What belongs together, checked. Errors: as `forward`."""
    for name, parts in (("draws", draws), ("unions", unions)):
        if parts is not None and any(part is None for part in parts):
            raise ValueError(f"{name} come for every length or for none, got None among them")
    none: list[None] = [None] * len(clips)
    given = (clips, context, target, draws or none, unions or none)
    if not clips or len({len(part) for part in given}) > 1:
        raise ValueError(
            f"clips of several lengths come with masks of each, got {len(clips)} lengths and masks of "
            f"{len(context)} and {len(target)}"
        )
    groups = [Group(number, *parts) for number, parts in enumerate(zip(*given))]
    for group in groups:
        if len(group.context) != len(group.target) or not group.context:
            raise ValueError(
                f"context and target mask sets come in pairs, got {len(group.context)} and {len(group.target)}"
            )
        if group.draws is not None and len(group.draws) != len(group.context):
            raise ValueError(f"draws come one a mask set, got {len(group.draws)} for {len(group.context)} sets")
        for token_set in (*group.context, *group.target):
            described = number_of_clips(token_set)
            if described != len(group.clips):
                raise ValueError(f"a mask set describes {described} clips, the batch has {len(group.clips)}")
    return groups


def _by_group(sets: list[Tensor], groups: Sequence[Group]) -> list[list[Tensor]]:
    """One tensor a mask set, of all groups one after another, as a list for each group."""
    rest = iter(sets)
    return [[next(rest) for _ in group.target] for group in groups]


def _set_of_runs(parts: Sequence[Tensor], token_set: TokenSet) -> Tensor:
    """[b, K, D] of neighbouring clips as [B, K, D], or as [R, D] rows where lengths differ."""
    return torch.cat(list(parts) if isinstance(token_set, Tensor) else [part.flatten(0, 1) for part in parts])


def _weighed(losses: Sequence[Tensor], shares: Sequence[float] | None) -> Tensor:
    """The mean, or the sum weighed by host numbers: 0-dim."""
    if len(losses) == 1 and shares is None:
        return losses[0]
    shares = shares or [1.0 / len(losses)] * len(losses)
    return torch.stack([loss * share for loss, share in zip(losses, shares)]).sum()


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
