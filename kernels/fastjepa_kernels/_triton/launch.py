"""What every launcher needs: the right current device, and block sizes."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shipped:
    """A kernel with one of its launch settings: what `python -m fastjepa_kernels compile` compiles."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3


def pinned(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> Shipped:
    """`constants` may hold num_warps and num_stages, as a launch takes them and `config.lookup` gives them."""
    fixed = dict(constants)
    return Shipped(
        name, kernel, signature, warps=fixed.pop("num_warps", 4), stages=fixed.pop("num_stages", 3), constants=fixed
    )


def combinations(**choices: Iterable[int]) -> list[dict[str, int]]:
    """Candidates of `tune`: every combination of the values of each setting."""
    return [dict(zip(choices, values)) for values in product(*choices.values())]


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of the tensor, where it is another."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def rows_in_place(x: Tensor) -> Tensor:
    """Neighbouring channels are all that is asked of a layout; any strides of clips and tokens are read in place."""
    return x if x.stride(-1) == 1 else x.contiguous()


def folded(x: Tensor) -> Tensor:
    """x [..., D] -> [outer, inner, D]: two strides are read in place, of more dims where they fold into two."""
    x = rows_in_place(x)
    return x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3)


def pointer(given: Tensor | None, other: Tensor) -> Tensor:
    """A tensor that is not there is never read; another stands in for its pointer."""
    return other if given is None else given.contiguous()


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
