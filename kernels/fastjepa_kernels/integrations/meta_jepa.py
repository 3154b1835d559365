"""The public jepa and vjepa2 code, which lives in its users' checkouts: classes by their names and attributes."""

from torch import nn

from fastjepa_kernels.integrations import attention
from fastjepa_kernels.integrations.swap import Match

# Name of the class -> attributes, operations and plan. Patch embeddings and norms are torch's own modules there.
KNOWN = {
    "Attention": (("qkv", "proj", "num_heads"), Match(("attention",), attention.plan_packed)),
    "RoPEAttention": (("qkv", "proj", "num_heads", "grid_size"), Match(("attention", "rope"), attention.plan_rope)),
    "CrossAttention": (("q", "kv", "num_heads"), Match(("attention",), attention.plan_cross)),
}


def find(module: nn.Module) -> Match | None:
    """A module whose class has such a name, and the attributes; what it computes is for the plan to see."""
    attributes, match = KNOWN.get(type(module).__name__, ((), None))
    if match is None or not all(hasattr(module, name) for name in attributes):
        return None
    drops = any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.modules())
    if drops:
        return match._replace(plan=lambda module, wanted, out_dtype: "it drops values inside, evaluating too")
    return match
