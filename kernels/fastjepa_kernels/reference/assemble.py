"""A predictor's input in plain PyTorch: context rows and target rows of a clip one after another, positions added.

B clips, Kc context tokens, Kt target tokens, N tokens, P width; Rc and Rt rows where lengths differ.
"""

import torch
from torch import Tensor

from fastjepa_kernels.reference.gather import gather
from fastjepa_kernels.reference.noise import layer_norm_noise


def rows_of_clips(lengths: Tensor, other: Tensor, rows: int, after: bool) -> tuple[Tensor, Tensor]:
    """Clip of each row and its place in the packed result, int64 [R] each, from two cumulative lengths [B + 1].

    `lengths` are those of the rows, `other` those of the rows they are packed with, which stand before them in each
    clip where `after` is true.
    """
    row = torch.arange(rows, device=lengths.device)
    clip = torch.searchsorted(lengths[1:].contiguous(), row.to(lengths.dtype), right=True)
    return clip, row + other.long()[clip + 1 if after else clip]


def assemble_tokens(
    context: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    table: Tensor | None,
    mask_token: Tensor | None,
    targets: Tensor | None,
    alpha: Tensor | None,
    row_key: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    context_lengths: Tensor | None,
    target_lengths: Tensor | None,
    eps: float,
    gather_targets: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, Kc, P] -> [B, Kc + Kt, P], or [Rc, P] -> [Rc + Rt, P]; mean and 1 / deviation of noised rows, or [0]."""
    wide = torch.promote_types(context.dtype, torch.float32)
    clip_of_target = None
    if context_lengths is not None and target_lengths is not None:
        _, context_place = rows_of_clips(context_lengths, target_lengths, len(context), after=False)
        clip_of_target, target_place = rows_of_clips(target_lengths, context_lengths, len(target_index), after=True)
    mean, rstd = (context.new_empty(0, dtype=wide) for _ in range(2))
    if mask_token is not None:
        row = mask_token.to(wide)
        if mask_token.ndim == 2:
            row = row.unsqueeze(1) if clip_of_target is None else row[clip_of_target]
        asked = row.expand(*target_index.shape, -1)
    else:
        assert targets is not None, "there is a mask token, or targets"
        rows = gather(targets, target_index.unsqueeze(0)) if gather_targets else targets
        if alpha is None:
            asked = rows.to(wide)
        else:
            if clip_of_target is not None:
                alpha = alpha[clip_of_target]
            asked, mean, rstd = layer_norm_noise(rows, alpha, row_key, seed, noise, None, eps, wide)
    seen = context.to(wide)
    if table is not None:
        positions = table.to(wide)
        seen, asked = seen + positions[context_index.long()], asked + positions[target_index.long()]
    seen, asked = seen.to(out_dtype), asked.to(out_dtype)
    if context_lengths is None:
        return torch.cat((seen, asked), dim=1), mean, rstd
    out = seen.new_empty(len(seen) + len(asked), seen.shape[1])
    out[context_place], out[target_place] = seen, asked
    return out, mean, rstd


def sum_of_targets(
    gradient: Tensor, context: int, clips: int, context_lengths: Tensor | None, target_lengths: Tensor | None
) -> Tensor:
    """Sums over the target rows of each clip: gradient of the packed rows -> [B, P], float32 at least."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if context_lengths is None or target_lengths is None:
        return gradient[:, context:].sum(dim=1, dtype=wide)
    clip, place = rows_of_clips(target_lengths, context_lengths, len(gradient) - context, after=True)
    total = torch.zeros(clips, gradient.shape[1], dtype=wide, device=gradient.device)
    return total.index_add_(0, clip, gradient[place].to(wide))
