"""`patch`: the modules of a model that these kernels can stand for are given a class of ours, one by one.

Nothing global is touched: other models, and other objects of the same classes, stay as they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from fastjepa_kernels.integrations import layers, meta_jepa, refusals, timm
from fastjepa_kernels.integrations.swap import Match, Swap

OPERATIONS = ("attention", "layer_norm", "patch_dropout", "patch_embed", "rope")
NOT_ASKED = "not asked for"
OutDtype = Literal["same", "input"]


class Row(NamedTuple):
    """A line of the table: module name and class, operation, and the kernel or why there is none."""

    module: str
    class_name: str
    operation: str
    result: str


@dataclass
class Report:
    """What `patch` did to a model: rows of what was `replaced` and of what was `left` as before."""

    replaced: list[Row] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)
    _swaps: list[tuple[nn.Module, type, type]] = field(default_factory=list, repr=False)
    _configs: list[tuple[nn.Module, Any]] = field(default_factory=list, repr=False)

    def table(self) -> str:
        """Which submodule got which kernel, and which did not and why."""
        head = Row("module", "class", "operation", "runs")
        rows = [head, *self.replaced, *(row._replace(result=f"as before: {row.result}") for row in self.left)]
        widths = [max(len(row[n]) for row in rows) for n in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row.result]) for row in rows]
        return "\n".join([*lines, f"{len(self.replaced)} replaced, {len(self.left)} left as before"])

    def __str__(self) -> str:
        return self.table()

    def undo(self) -> None:
        """Give every module the class and the config object that it had before; a second call does nothing.

        Copies of the model stay patched. Errors: RuntimeError, with nothing undone, where a module was given another
        class since, as sharding does: undo that first.
        """
        for module, _, becomes in self._swaps:
            if type(module) is not becomes:
                raise RuntimeError(f"undo: a {becomes.__name__} has become a {type(module).__name__}: undo that first")
        for module, original, _ in self._swaps:
            module.__class__ = original
        for module, config in self._configs:
            module.config = config
        self._swaps.clear()
        self._configs.clear()


def patch(
    model: nn.Module,
    *,
    operations: Literal["auto"] | Iterable[str] = "auto",
    out_dtype: OutDtype = "same",
    strict: bool = False,
) -> Report:
    """Let the modules of `model` that are known here run through these operations, in place; nothing else changes.

    `operations` names some of "attention", "layer_norm", "patch_embed", "patch_dropout" and "rope"; "auto" is all.
    Known are torch's own `nn.LayerNorm` and the convolutions that cut patches (stride = kernel), timm's `LayerNorm`,
    `Attention` and `PatchDropout`, the attention of transformers' VJEPA2, VideoMAE, ViT and DINOv2 through its
    attention interface, and `Attention`, `CrossAttention` and `RoPEAttention` of the public jepa and vjepa2 code by
    their names (a probe on a few random tokens must give what the class itself gives).

    Parameters, buffers, hooks, state-dict keys and dtypes of results stay; `out_dtype="input"` lets layer norms keep
    the dtype of their input under autocast, where torch gives float32. A deep copy runs its own weights, and the model
    can be saved and compiled. Refused, with the reason in the table, are subclasses with a forward of their own,
    modules that are parametrised, quantised, compiled or sharded already, and what the kernels do not compute. Masks,
    causal attention and dropout in training run as before, inside a replaced attention too. Patch before compiling and
    sharding, undo after. Angles of rotary positions are float32, where those classes take the dtype of their tokens. A
    pass that asks for second derivatives needs the model as it was.

    Errors: ValueError for unknown operations, and under `strict=True` where something of a known kind is left as
    before that was asked for; the model is as before then.
    """
    if isinstance(operations, str) and operations != "auto":
        operations = (operations,)
    wanted = frozenset(OPERATIONS if operations == "auto" else operations)
    if unknown := wanted - set(OPERATIONS):
        raise ValueError(f"patch: operations must be some of {', '.join(OPERATIONS)}, got {sorted(unknown)[0]!r}")
    if out_dtype not in get_args(OutDtype):
        raise ValueError(f"patch: out_dtype must be one of {', '.join(get_args(OutDtype))}, got {out_dtype!r}")
    report, swaps = _plan(model, wanted, out_dtype)
    missed = [row for row in report.left if row.result != NOT_ASKED]
    if strict and missed:
        raise ValueError(f"patch: {len(missed)} left as before\n{report.table()}")
    interfaced = []
    for module, swap in swaps:
        report._swaps.append((module, type(module), swap.becomes))
        module.__class__ = swap.becomes
        if swap.interface:
            interfaced.append(module)
    if interfaced:
        report._configs = import_module("fastjepa_kernels.integrations.hf").set_interface(model, interfaced)
    return report


def _plan(model: nn.Module, wanted: frozenset[str], out_dtype: str) -> tuple[Report, list[tuple[nn.Module, Swap]]]:
    report, swaps = Report(), []
    blocked: dict[str, str] = {}
    for name, module in model.named_modules():
        above = next((blocked[path] for path in _paths(name) if path in blocked), "")
        if reason := above or refusals.of_subtree(module):
            blocked[name] = reason
        match = _find(module)
        if match is None:
            continue
        asked = wanted.intersection(match.operations)
        plan: Swap | str = reason or refusals.of_module(module)
        if not plan:
            plan = match.plan(module, asked, out_dtype) if asked else NOT_ASKED
        for operation in match.operations:
            row = Row(name or "(the model)", type(module).__name__, operation, "")
            if operation not in asked:
                report.left.append(row._replace(result=NOT_ASKED))
            elif isinstance(plan, str):
                report.left.append(row._replace(result=plan))
            elif operation in plan.runs:
                report.replaced.append(row._replace(result=plan.runs[operation]))
            else:
                report.left.append(row._replace(result=plan.stays[operation]))
        if isinstance(plan, Swap):
            swaps.append((module, plan))
    return report, swaps


def _paths(name: str) -> Iterable[str]:
    """The names of the modules around a module: "a.b.c" -> "", "a", "a.b"."""
    parts = name.split(".") if name else []
    return (".".join(parts[:n]) for n in range(len(parts)))


def _unknown(what: str) -> Match:
    return Match((what,), lambda module, wanted, out_dtype: "a class that is not known here")


def _find(module: nn.Module) -> Match | None:
    """The kind of a module; of a class that is not known here, as far as its bases or its name tell."""
    if type(module) is nn.LayerNorm:
        return Match(("layer_norm",), layers.plan_norm)
    if type(module) in (nn.Conv2d, nn.Conv3d) and layers.cuts_patches(module):
        return Match(("patch_embed",), layers.plan_patches)
    # A model from there has loaded it; without one, it need not be installed.
    if type(module).__module__.startswith("transformers.models."):
        match = import_module("fastjepa_kernels.integrations.hf").find(module)
    else:
        match = timm.find(module) or meta_jepa.find(module)
    if match is not None:
        return match
    if isinstance(module, nn.LayerNorm):
        return _unknown("layer_norm")
    if layers.cuts_patches(module):
        return _unknown("patch_embed")
    inside = any("Attention" in type(child).__name__ for child in module.modules() if child is not module)
    if "Attention" in type(module).__name__ and not inside:
        return _unknown("attention")
    return None
