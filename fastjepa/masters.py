"""float32 masters of the weight matrices, for networks that compute with half-precision copies of them.

Autocast rounds every matrix anew in each pass and widens its gradient; a module that holds the rounded matrix gives the
same numbers without either. What the optimizer moves are the masters.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastjepa.jepa import JEPA

# The modules whose weights autocast rounds for a matrix product. Biases and norms stay float32.
PRODUCTS = (nn.Linear, nn.Conv2d, nn.Conv3d)


class Masters:
    """Takes over the matrices of encoder, predictor and target encoder: the modules keep copies of `dtype`.

    With `dtype` None there are none: the modules' own weights are what the optimizer moves.
    """

    def __init__(self, jepa: JEPA, dtype: torch.dtype | None) -> None:
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in jepa.named_modules() if dtype is not None else ():
            if isinstance(module, PRODUCTS):
                weight = module.weight
                self._pairs[f"{name}.weight"] = (weight, weight.data)
                weight.data = weight.data.to(dtype)

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, name: str) -> bool:
        return name in self._pairs

    def tensors(self) -> dict[str, Tensor]:
        """The masters by the names that their copies have in the state dict: live ones, float32."""
        return {name: master for name, (_, master) in self._pairs.items()}

    @torch.no_grad()
    def refresh(self, names: list[str] | None = None) -> None:
        """Round the masters (all, or these) into the modules again."""
        pairs = list(self._pairs.values()) if names is None else [self._pairs[name] for name in names]
        if pairs:
            torch._foreach_copy_([copy.data for copy, _ in pairs], [master for _, master in pairs])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The modules compute with the masters themselves while this lasts: for evaluation in float32."""
        copies = [weight.data for weight, _ in self._pairs.values()]
        for weight, master in self._pairs.values():
            weight.data = master
        try:
            yield
        finally:
            for (weight, _), copy in zip(self._pairs.values(), copies):
                weight.data = copy
