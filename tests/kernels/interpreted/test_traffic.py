"""Declared launches are those that happen: kernels of Triton, and calls of the library around them."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastjepa_kernels as kernels
from bench.census.counting import aten_traffic
from fastjepa_kernels._triton.rope import _paces
from fastjepa_kernels.registry import LAUNCHERS
from fastjepa_kernels.testing.case import results
from fastjepa_kernels.testing.cases import CASES
from fastjepa_kernels.traffic import traffic

# Attention is one launch in each direction by the rule that counts the library's so; its gradient here takes two.
MORE = {"indexed_attention_backward": 1}
# Their calls of the library make tables on the host.
TABLES = {"ema_update_", "adamw_ema_"}


class Library(TorchDispatchMode):
    """Counts the library's launches; what the interpreter does with tensors is none."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.launches += aten_traffic(func, args, kwargs or {}, out).launches
        return out


class Compared(TorchDispatchMode):
    """Runs our operations by their launchers, and keeps (declared, counted) launches by name."""

    def __init__(self, launched: Counter[str]) -> None:
        super().__init__()
        self.launched = launched
        self.found: dict[str, set[tuple[int, int]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "fastjepa":
            return func(*args, **(kwargs or {}))
        name, before = func._schema.name.partition("::")[2], self.launched.total()
        with Library() as library:
            out = LAUNCHERS[name](*args)
        declared = traffic(name, args, [x for x in tree_leaves(out) if isinstance(x, Tensor)]).launches
        happened = (0 if name in TABLES else library.launches) + self.launched.total() - before - MORE.get(name, 0)
        self.found.setdefault(name, set()).add((declared, happened))
        return out


@pytest.fixture
def launched(launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches by name, and none of the interpreter's own calls of torch."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def unseen(self, *given, **named):
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *given, **named)

    monkeypatch.setattr(InterpretedFunction, "run", unseen)
    _paces(1e4, 32, torch.device("cpu"))  # made once, not in every call
    return launches


def checked(compared: Compared) -> None:
    assert compared.found
    for name, pairs in compared.found.items():
        for declared, happened in pairs:
            assert declared == happened, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case, launched: Counter[str]):
    inputs = case.make(case.shapes["small"], torch.device("cpu"), torch.float32)
    for n in case.gradients:
        inputs[n].requires_grad_()
    with Compared(launched) as compared:
        results(case, case.ours("triton"), inputs, torch.float32)
    checked(compared)


def test_rows_of_different_lengths(launched: Counter[str]):
    context, table = torch.randn(5, 24, requires_grad=True), torch.randn(9, 24)
    token, qkv = torch.randn(2, 24, requires_grad=True), torch.randn(9, 3, 2, 16, requires_grad=True)
    bias = torch.randn(3, 2, 16, requires_grad=True)
    index, starts = torch.arange(5), [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 4, 9])]
    with Compared(launched) as compared:
        kernels.assemble_tokens(context, index, torch.arange(9), table, token, context_lengths=starts[0],
                                target_lengths=starts[1], impl="triton").sum().backward()  # fmt: skip
        clips = {"cu_seqlens": starts[1], "max_length": 5, "impl": "triton"}
        kernels.indexed_attention(qkv, **clips).sum().backward()
        for rope in (None, kernels.Rope((1, 2, 3))):
            kernels.indexed_attention(qkv, qkv_bias=bias, rope=rope, **clips).sum().backward()
    checked(compared)
    assert {"assemble_tokens", "sum_of_targets", "indexed_attention_backward"} <= set(compared.found)
