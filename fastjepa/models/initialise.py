"""Initial weights of encoder and predictor as published, with the defects of the public code as switches."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastjepa.models.layers import Block


def normal_(weight: Tensor, std: float) -> Tensor:
    """Fill with N(0, std) cut at +-2, in place.

    The published sampler, as torch's own up to 2.11, returns exactly -2.0 (a -100 sigma weight) once in 26 million
    draws, because its inverse error function meets -1. Such a weight becomes 0.
    """
    nn.init.trunc_normal_(weight, mean=0.0, std=std, a=-2.0, b=2.0)
    with torch.no_grad():
        return weight.masked_fill_(weight == -2.0, 0.0)


@torch.no_grad()
def initialise(module: nn.Module, std: float) -> None:
    """Draw every Linear and convolution weight from N(0, std), zero the biases, reset the norms.

    Parameters are first filled with NaN, so that one that nobody draws cannot hide; position tables, mask tokens and
    other bare parameters are set by the networks themselves.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d):
            part.weight.fill_(float("nan"))
            normal_(part.weight, std)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            part.weight.fill_(1.0)
            part.bias.zero_()


@torch.no_grad()
def rescale_blocks(blocks: Iterable[nn.Module]) -> None:
    """Divide the output projections of block l = 1, 2, ... by sqrt(2 l), so that the residual stream keeps its size.

    Of a gated feed-forward layer the public code divides `fc2`, which is no output projection; here it is `fc3`.
    """
    for number, block in enumerate(blocks, start=1):
        assert isinstance(block, Block)
        block.attn.proj.weight.div_((2.0 * number) ** 0.5)
        block.mlp.last.weight.div_((2.0 * number) ** 0.5)


@torch.no_grad()
def redraw_linears(network: nn.Module, std: float = 0.02) -> None:
    """What the public training helper does after construction: every Linear drawn again, the block rescale undone.

    Convolutions and tables stay. Only for `compat.reinit`.
    """
    for part in network.modules():
        if isinstance(part, nn.Linear):
            normal_(part.weight, std)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            part.weight.fill_(1.0)
            part.bias.zero_()
