"""Attention modules that own their projections: qkv packed, the same with rotary positions, and across two inputs.

Their classes are known by name: a probe decides whether a forward of ours computes what a class does.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa_kernels.integrations import probe, seams
from fastjepa_kernels.integrations.swap import Swap, Swapped

PLACES = ("mask", "T", "H_patches", "W_patches")
_seen: dict[Any, type[nn.Module] | str] = {}


class _Attention(Swapped):
    """What `plan` sets for each class: names of the arguments after the tokens, and those that the class ignores."""

    fastjepa_names: tuple[str, ...] = ()
    fastjepa_ignored: tuple[str, ...] = ()
    fastjepa_pair = False


class Packed(_Attention):
    """`qkv` is one linear layer; queries, keys and the result may be normalised, the result gated."""

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Any:
        if _said(self, given, named) or _drops(self):
            return super().forward(x, *given, **named)  # type: ignore[misc]
        q, k, v = _heads(self, x)
        return _leave(self, seams.attend(q, k, v, _scale(self)), x)


class PackedRope(_Attention):
    """`Packed` with rotary positions, of the token numbers in `mask` or of all tokens in order."""

    fastjepa_compat = True

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Any:
        said = _said(self, given, named)
        if said.keys() - set(PLACES) or _drops(self):
            return super().forward(x, *given, **named)  # type: ignore[misc]
        module: Any = self
        ids = said["mask"] if "mask" in said else torch.arange(x.shape[1], device=x.device)
        grid = said.get("T", 1), said.get("H_patches", module.grid_size), said.get("W_patches", module.grid_size)
        q, k, v = _heads(self, x)
        q, k = (seams.rotate(rows, ids, grid, self.fastjepa_compat) for rows in (q, k))
        return _leave(self, seams.attend(q, k, v, _scale(self)), x)


class Cross(_Attention):
    """Queries of one input, keys and values of another; an output projection that is owned need not be applied."""

    fastjepa_project = False

    def forward(self, q: Tensor, x: Tensor, *given: Any, **named: Any) -> Any:
        if _said(self, given, named):
            return super().forward(q, x, *given, **named)  # type: ignore[misc]
        module: Any = self
        queries = module.q(q).unflatten(-1, (module.num_heads, -1))
        k, v = module.kv(x).unflatten(-1, (2, module.num_heads, -1)).unbind(-3)
        out = seams.attend(queries, k, v, _scale(self)).flatten(2)
        return module.proj(out) if self.fastjepa_project else out


def _said(module: _Attention, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments after the tokens that say something to the class."""
    both = {**dict(zip(module.fastjepa_names, given)), **named}
    silent = module.fastjepa_ignored
    return {
        name: value for name, value in both.items() if value is not None and value is not False and name not in silent
    }


def _drops(module: Any) -> bool:
    return module.training and getattr(module, "attn_drop", _SAME).p > 0


def _heads(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, N, D] -> q, k, v, [B, N, H, d] each."""
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).unbind(-3)
    return getattr(module, "q_norm", _SAME)(q), getattr(module, "k_norm", _SAME)(k), v


def _scale(module: Any) -> float | None:
    """The public classes ignore a scale of their own on the way through SDPA."""
    return None if getattr(module, "use_sdpa", False) else getattr(module, "scale", None)


def _leave(module: Any, out: Tensor, x: Tensor) -> Any:
    """Heads [B, N, H, d] -> what the class gives for its tokens x."""
    out = getattr(module, "norm", _SAME)(out.flatten(2))
    if getattr(module, "gate", None) is not None:
        out = out * module.gate(x).sigmoid()
    out = getattr(module, "proj_drop", _SAME)(module.proj(out))
    return (out, None) if module.fastjepa_pair else out


class _Same(nn.Identity):
    p = 0.0


_SAME = _Same()


def plan_packed(module: nn.Module, wanted: frozenset[str], out_dtype: str) -> Swap | str:
    """For a module with `qkv`, `proj` and `num_heads`."""
    return _plan(module, Packed, "attention")


def plan_rope(module: nn.Module, wanted: frozenset[str], out_dtype: str) -> Swap | str:
    """For one that has `grid_size` too."""
    if len(wanted) < 2:
        return "attention and rope are one here: ask for both"
    return _plan(module, PackedRope, "attention", "rope")


def plan_cross(module: nn.Module, wanted: frozenset[str], out_dtype: str) -> Swap | str:
    """For a module with `q`, `kv` and `num_heads`."""
    return _plan(module, Cross, "attention")


def _plan(module: nn.Module, forward: type, *operations: str) -> Swap | str:
    inside = [(type(child), *(tuple(p.shape) for p in child.parameters())) for child in module.modules()]
    plain = sorted((name, repr(value)) for name, value in vars(module).items() if isinstance(value, int | float | str))
    key = (*inside, *plain)
    if key not in _seen:
        _seen[key] = _probe(module, forward)
    becomes = _seen[key]
    if isinstance(becomes, str):
        return becomes
    names = {"attention": f"{seams.ATTENTION}; with a mask, dropout or causal order as before", "rope": seams.ROPE}
    return Swap(becomes, {operation: names[operation] for operation in operations})


def _probe(module: Any, forward: type) -> type[nn.Module] | str:
    tokens = probe.tokens
    names = tuple(inspect.signature(type(module).forward).parameters)
    if forward is Cross:
        width = module.q.in_features
        forms: list[dict[str, Any]] = [{"fastjepa_project": False, "fastjepa_names": names[3:]}]
        if hasattr(module, "proj"):
            forms.append({**forms[0], "fastjepa_project": True})
        return probe.first_that_agrees(module, forward, forms, [((tokens(2, 3, width), tokens(2, 5, width)), {})])
    x = tokens(2, 6, module.qkv.in_features)
    if forward is Packed:
        plain: list[probe.Call] = [((x,), {})]
        ignored = tuple(name for name in PLACES if name in names and probe.ignores(module, plain[0], name))
        forms = [{"fastjepa_names": names[2:], "fastjepa_ignored": ignored}]
        return probe.first_that_agrees(module, forward, forms, plain)
    ids = torch.tensor([[0, 1, 7, 2, 9, 5], [3, 8, 11, 4, 6, 10]], device="cpu") * max(module.grid_size**2 // 6, 1) + 1
    calls: list[probe.Call] = [((x,), {"mask": ids})]
    if set(PLACES) <= set(names):
        calls.append(((tokens(2, 12, x.shape[2]),), {"T": 2, "H_patches": 2, "W_patches": 3}))
    forms = [{"fastjepa_names": names[2:], "fastjepa_compat": compat} for compat in (True, False)]
    return probe.first_that_agrees(module, forward, forms, calls)
