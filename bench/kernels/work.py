"""What one pass of an operation is counted for: FLOPs of the mathematics, or the bytes that its Triton form declares.

Whoever computes it, the count is the same: who moves more, or computes twice, has a lower figure.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.measure import attention_backward_flops, attention_forward_flops, gemm_flops
from fastjepa_kernels.testing.case import Case, Part, Shape
from fastjepa_kernels.traffic import traffic

VALUES_OF_A_PIXEL = 3 * 2  # colours, and frames of a tubelet


def _attention(shape: Shape, which: Part) -> int:
    """Scores that a backward kernel computes again are not counted."""
    count = attention_forward_flops if which == "forward" else attention_backward_flops
    lengths = (shape["first"], shape["second"]) if "first" in shape else (shape["kept"],)
    return sum(count(shape["clips"], shape["heads"], length, shape["width"]) for length in lengths)


def _linear_gelu(shape: Shape, which: Part) -> int:
    return (1 if which == "forward" else 2) * gemm_flops(shape["rows"], shape["hidden"], shape["width"])


def _mlp(shape: Shape, which: Part) -> int:
    return 2 * _linear_gelu(shape, which)


def _patch_embed(shape: Shape, which: Part) -> int:
    """Of the kept patches; pixels get no gradient, so that both passes are one product."""
    return gemm_flops(shape["clips"] * shape["kept"], shape["width"], VALUES_OF_A_PIXEL * shape["patch"] ** 2)


FLOPS: dict[str, Callable[[Shape, Part], int]] = {
    "indexed_attention": _attention,
    "linear_gelu": _linear_gelu,
    "mlp": _mlp,
    "patch_embed_gather": _patch_embed,
}


class _Declared(TorchDispatchMode):
    """Adds up the bytes that our operations declare."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the call, count it."""
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fastjepa":
            # The reference has the arguments of the Triton form, whose bytes they are.
            name = func._schema.name.partition("::")[2].removesuffix("_reference")
            self.bytes += traffic(name, args, [x for x in tree_leaves(out) if isinstance(x, Tensor)]).bytes
        return out


def declared_bytes(case: Case, shape: Shape, which: Part, dtype: torch.dtype) -> int:
    """In and out of device memory in one pass; nothing is computed and no memory taken."""
    with FakeTensorMode(), _Declared() as declared:
        inputs = case.make(shape, torch.device("cpu"), dtype)
        leaves = [inputs[n].requires_grad_() for n in case.gradients]
        outputs = case.ours("reference")(*inputs)
        if which == "backward":
            declared.bytes = 0
            torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs])
    return declared.bytes


def work_of(case: Case, shape: Shape, which: Part, dtype: torch.dtype) -> tuple[int, str]:
    """(FLOPs, "TFLOP/s") where matrix products are what it costs, (bytes, "GB/s") of all others."""
    count = FLOPS.get(case.name.split()[0])
    if count is None:
        return declared_bytes(case, shape, which, dtype), "GB/s"
    return count(shape, which), "TFLOP/s"
