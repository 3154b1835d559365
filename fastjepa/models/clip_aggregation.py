"""Frozen encoders over several clips and several views of a video, and the prediction from all of them.

B videos, V views, S segments (clips of one view, in time order), C channels, T frames, N tokens of one clip or frame, E
width. The input is a nested list `clips[segment][view]` of [B, C, T, H, W], which all have one shape.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

Clips = Sequence[Sequence[Tensor]]


def _stacked(clips: Clips) -> Tensor:
    """[S][V] of [B, C, T, H, W] -> [S, V, B, C, T, H, W]. Errors: ValueError where views or shapes differ."""
    views = {len(segment) for segment in clips}
    shapes = {tuple(clip.shape) for segment in clips for clip in segment}
    if len(views) != 1 or len(shapes) != 1:
        raise ValueError(
            "expected clips[segment][view] with the same views in every segment and one shape, got "
            f"{[len(segment) for segment in clips]} views and the shapes {sorted(shapes)}"
        )
    return torch.stack([torch.stack(list(segment)) for segment in clips])


class ClipAggregation(nn.Module):
    """A video encoder on every clip of every view, in one pass.

    With `attend_across_segments` a view becomes one sequence, its clips one after another, so that one classifier call
    sees all of them. Source: V-JEPA (arXiv 2404.08471, appendix on frozen evaluation).
    """

    def __init__(self, encoder: nn.Module, attend_across_segments: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.attend_across_segments = attend_across_segments

    def forward(self, clips: Clips) -> list[Tensor] | list[list[Tensor]]:
        """[segment][view] of clips -> [view] of [B, S*N, E], or [view][segment] of [B, N, E] where they stay apart.

        Errors: ValueError where views or shapes differ.
        """
        stacked = _stacked(clips)
        segments, views, videos = stacked.shape[:3]
        tokens = self.encoder(stacked.flatten(0, 2))
        if self.attend_across_segments:
            joined = rearrange(tokens, "(s v b) n e -> v b (s n) e", s=segments, v=views, b=videos)
            return list(joined)
        apart = rearrange(tokens, "(s v b) n e -> v s b n e", s=segments, v=views, b=videos)
        return [list(view) for view in apart]


class FrameAggregation(nn.Module):
    """An image encoder on every frame of every clip, in one pass; a view becomes one sequence in time order.

    Source: V-JEPA (arXiv 2404.08471), how image models are evaluated on video.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, clips: Clips) -> list[Tensor]:
        """[segment][view] of clips -> [view] of [B, S*T*N, E]. Errors: ValueError where views or shapes differ."""
        stacked = _stacked(clips)
        segments, views, videos, _, frames = stacked.shape[:5]
        tokens = self.encoder(rearrange(stacked, "s v b c t h w -> (s v b t) c h w"))
        return list(rearrange(tokens, "(s v b t) n e -> v b (s t n) e", s=segments, v=views, b=videos, t=frames))


def mean_probabilities(logits: Sequence[Tensor] | Sequence[Sequence[Tensor]]) -> Tensor:
    """The published prediction: softmax of each logits [B, K], averaged over views (and segments): float32 [B, K].

    `logits` are those of one classifier call each, [view] or [view][segment]. Errors: ValueError without any.
    """
    flat = [part for view in logits for part in ([view] if isinstance(view, Tensor) else view)]
    if not flat:
        raise ValueError("expected the logits of at least one view, got none")
    return torch.stack([part.float().softmax(dim=-1) for part in flat]).mean(dim=0)
