"""Modules that must not be swapped, each reason a few words of the report."""

from torch import nn
from torch.nn.utils import parametrize


def of_subtree(module: nn.Module) -> str:
    """Why neither this module nor one inside it can be swapped; empty where they can."""
    # By name: these classes come with the compiler and with torch.distributed, and neither need be there.
    bases = {base.__name__ for base in type(module).__mro__}
    if "OptimizedModule" in bases or getattr(module, "_compiled_call_impl", None) is not None:
        return "compiled already: patch first, then compile"
    if bases & {"FullyShardedDataParallel", "FSDPModule"}:
        return "sharded already: patch first, then shard"
    return ""


def of_module(module: nn.Module) -> str:
    """Why this module alone cannot be swapped; empty where it can."""
    if getattr(module, "fastjepa_swapped", False):
        return "patched already"
    if parametrize.is_parametrized(module):
        return "parametrised"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    for parameter in module.parameters():
        if type(parameter) is not nn.Parameter:
            kind = type(parameter).__name__
            return "sharded already: patch first, then shard" if kind == "DTensor" else f"its parameters are of {kind}"
        if not parameter.dtype.is_floating_point:
            return f"its parameters are quantised, {parameter.dtype}"
        if parameter.device.type not in ("cpu", "cuda", "meta"):
            return f"its parameters are on {parameter.device.type}, the operators run on CPU and CUDA"
    return ""
