"""Subclasses made for swapping `module.__class__`: a forward of ours, and nothing else that is not the original's.

A class swap leaves parameters, buffers, hooks and state-dict keys where they are, `isinstance` goes on to hold, and a
deep copy runs its own weights (a forward that is assigned to an instance runs those of the original).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

_made: dict[tuple[Any, ...], type] = {}


@dataclass(frozen=True)
class Swap:
    """What becomes of a module: its new class, the kernel of each operation, and why some operations stay as they are.

    `interface` asks for transformers' attention interface as well.
    """

    becomes: type[nn.Module]
    runs: dict[str, str]
    stays: dict[str, str] = field(default_factory=dict)
    interface: bool = False


class Match(NamedTuple):
    """A module of a known kind: the operations in it, and `plan(module, operations wanted, out_dtype)`.

    The plan is a `Swap`, or the reason why there is none.
    """

    operations: tuple[str, ...]
    plan: Callable[[nn.Module, frozenset[str], str], Swap | str]


class Swapped:
    """Base of the classes made here: marks them, and pickles an instance as one of its original class to be swapped."""

    fastjepa_swapped = True
    fastjepa_recipe: tuple[type, type, tuple[tuple[str, Any], ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, self.fastjepa_recipe, self.__getstate__()


def subclass(forward: type, original: type, **fixed: Any) -> type[nn.Module]:
    """The subclass of `original` with the methods of `forward`, a subclass of `Swapped`, and class attributes `fixed`.

    The same arguments give the same class. Values of `fixed` are hashable and can be pickled.
    """
    key = (forward, original, tuple(sorted(fixed.items())))
    if key not in _made:
        names = {"__module__": original.__module__, "__doc__": original.__doc__, "fastjepa_recipe": key, **fixed}
        _made[key] = type(f"Fused{original.__name__}", (forward, original), names)
    return _made[key]


def _rebuild(forward: type, original: type, fixed: tuple[tuple[str, Any], ...]) -> nn.Module:
    made = subclass(forward, original, **dict(fixed))
    return made.__new__(made)
