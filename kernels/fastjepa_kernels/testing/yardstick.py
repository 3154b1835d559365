"""How exact a kernel must be: as near to the truth as PyTorch itself, within a factor of two.

Source: the test policy of flash-attention: a float64 reference, the same mathematics in eager PyTorch at the precision
in question, and the kernel's distance to the first at most twice that of the second.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def distance(result: Tensor, exact: Tensor) -> float:
    """The largest absolute difference to the float64 result, relative to its largest value."""
    return (
        ((result.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)).item() if exact.numel() else 0.0
    )


def check(run: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> tuple[float, float]:
    """(distance of `run`, distance of `reference`) to `reference` in float64, for these inputs in their precision.

    Errors: AssertionError where the first is above twice the second and a rounding of the result.
    """
    exact = reference(*(x.double() if x.dtype.is_floating_point else x for x in inputs))
    result = run(*inputs)
    ours, eager = distance(result, exact), distance(reference(*inputs), exact)
    assert result.isfinite().all(), "the result is not finite"
    limit = 2 * eager + torch.finfo(result.dtype).eps
    assert ours <= limit, f"distance to float64 is {ours:.2e}, that of eager PyTorch {eager:.2e}"
    return ours, eager
