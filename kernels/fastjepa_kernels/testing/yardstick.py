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
    return within(run(*inputs), reference(*inputs), exact)


def within(result: Tensor, eager: Tensor, exact: Tensor) -> tuple[float, float]:
    """(distance of `result`, distance of `eager`) to the float64 result.

    Errors: AssertionError where the first is above twice the second and a rounding of the result, or not finite.
    """
    ours, theirs = distance(result, exact), distance(eager, exact)
    limit = 2 * theirs + torch.finfo(result.dtype).eps
    # Raised by hand: under `python -O` too, nothing wrong may pass.
    if not result.isfinite().all():
        raise AssertionError("the result is not finite")
    if not ours <= limit:
        raise AssertionError(f"distance to float64 is {ours:.2e}, that of eager PyTorch {theirs:.2e}")
    return ours, theirs
