"""Every kernel and setting that is launched, in one list."""

from collections.abc import Iterator

from fastjepa_kernels._triton import (
    assemble,
    attention,
    attention_backward,
    attention_bias,
    attention_ready,
    gather,
    gelu_product,
    linear_gelu,
    mlp,
    noise,
    norms,
    patch_embed,
    philox,
    rope,
    target_loss,
    updates,
)
from fastjepa_kernels._triton.launch import Shipped

MODULES = (
    assemble, attention, attention_backward, attention_bias, attention_ready, gather, gelu_product, linear_gelu, mlp,
    noise, norms, patch_embed, philox, rope, target_loss, updates,
)  # fmt: skip


def shipped(architecture: str = "any") -> Iterator[Shipped]:
    """All of them, module by module, with the settings that `config.lookup` gives for "sm_90" and the like."""
    for module in MODULES:
        yield from module.shipped(architecture)


def candidates(operation: str, width: int) -> list[dict[str, int]]:
    """The settings that `tune` tries for an operation at a width. Errors: ValueError where a module names none."""
    for module in MODULES:
        found = module.candidates(width).get(operation)
        if found:
            return found
    raise ValueError(f"{operation}: no candidates for width {width} in any module of kernels")
