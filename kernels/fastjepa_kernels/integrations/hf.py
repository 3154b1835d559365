"""transformers: its attention interface, and the rotary positions of V-JEPA 2. Imported where a model is from there.

A model's attention modules ask their config which attention function to call. The configs of a patched model are copies
that name ours, so another model that shares a config stays as it is.
"""

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from fastjepa_kernels.integrations import seams
from fastjepa_kernels.integrations.swap import Match, Swap, Swapped, subclass

NAME = "fastjepa"
FAMILIES = ("vjepa2", "videomae", "vit", "dinov2")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: q [B, H, M, d], k and v [B, H, N, d] -> [B, M, H, d], no weights.

    With a mask, dropout, causal order, or what else has no part in a plain attention, it is transformers' own for SDPA.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    more = any(named.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "sliding_window"))
    if attention_mask is not None or dropout or causal or more or query.shape[1] != key.shape[1]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **named
        )
    return seams.attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scaling), None


AttentionInterface.register(NAME, attention)
try:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
except ImportError:  # before 4.53 masks did not depend on the attention function
    pass
else:
    # Without this, transformers takes a function that it does not know for one without masks, and leaves them out.
    AttentionMaskInterface.register(NAME, sdpa_mask)


class Interfaced(Swapped):
    """Its attention is chosen by its config. A class of its own so that a saved model finds this file, and its name."""


class Rotated(Interfaced):
    """V-JEPA 2 attention: positions go to the rotation as token numbers."""

    grid_depth: int
    grid_size: int
    fastjepa_compat = True

    def get_position_ids(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        return torch.arange(x.shape[1], device=x.device) if masks is None else masks

    def apply_rotary_embeddings(self, qk: Tensor, pos_ids: Tensor) -> Tensor:
        grid = (self.grid_depth, self.grid_size, self.grid_size)
        return seams.rotate(qk.transpose(1, 2), pos_ids, grid, self.fastjepa_compat).transpose(1, 2)


def find(module: nn.Module) -> Match | None:
    """The attention modules of `FAMILIES` that ask the attention interface."""
    parts = type(module).__module__.split(".")
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names or parts[2] not in FAMILIES:
        return None
    rotates = hasattr(module, "apply_rotary_embeddings")
    return Match(("attention", "rope") if rotates else ("attention",), _plan)


def _plan(module: nn.Module, wanted: frozenset[str], out_dtype: str) -> Swap | str:
    original, runs, stays = type(module), {}, {}
    becomes: type[nn.Module] | None = None
    if "attention" in wanted:
        chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if chosen == "sdpa":
            runs["attention"] = f"{seams.ATTENTION}; with a mask, dropout or causal order as before"
            becomes = subclass(Interfaced, original)
        else:
            stays["attention"] = f"its config asks for {chosen!r}, not 'sdpa'"
    if "rope" in wanted:
        compat = next((form for form in (True, False) if _rotates_alike(module, form)), None)
        if compat is None:
            stays["rope"] = "rotates otherwise than the published V-JEPA 2"
        else:
            runs["rope"] = seams.ROPE
            becomes = subclass(Rotated, original, fastjepa_compat=compat)
    if becomes is None:
        return "; ".join(dict.fromkeys(stays.values()))
    return Swap(becomes, runs, stays, interface="attention" in runs)


@torch.no_grad()
def _rotates_alike(module: Any, compat: bool) -> bool:
    """Whether the rotation of this class is ours, on a few random tokens at places all over the grid."""
    tokens = module.grid_depth * module.grid_size**2
    draw = torch.Generator().manual_seed(0)
    width = module.num_attention_heads * module.attention_head_size
    x = torch.randn(1, 7, width, generator=draw, device="cpu")
    heads = x.view(1, 7, module.num_attention_heads, -1).transpose(1, 2)
    masks = torch.randint(tokens, (1, 7), generator=draw, device="cpu")
    theirs = module.apply_rotary_embeddings(heads, module.get_position_ids(x, masks))
    ours = seams.rotate(heads.transpose(1, 2), masks, (module.grid_depth, *2 * [module.grid_size]), compat)
    return torch.allclose(theirs.transpose(1, 2), ours, rtol=1e-3, atol=1e-3)


def set_interface(model: nn.Module, attentions: Iterable[nn.Module]) -> list[tuple[nn.Module, Any]]:
    """Give all modules copies of their configs, those of `attentions` with our attention; returns what they had."""
    asked = {id(module.config) for module in attentions}
    before = [
        (module, module.config)
        for module in model.modules()
        if hasattr(vars(module).get("config"), "_attn_implementation")
    ]
    # One memory for all copies: what was one object, a part of another config for instance, is one afterwards.
    copies: dict[int, Any] = {}
    for module, config in before:
        own: Any = copy.deepcopy(config, copies)
        module.config = own
        if id(config) in asked:
            own._attn_implementation_internal = NAME
    return before
