"""These run Triton kernels on a CPU, in a process of their own: Triton reads the variable when it loads."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastjepa_kernels.testing.poison import guarded, intact

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]


@pytest.fixture
def results_are_poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results hold NaN before the kernel writes them and lie between NaN: what it forgets or overruns is seen."""
    empty, made, places = torch.Tensor.new_empty, [], []

    def filled(self: Tensor, *size, **named) -> Tensor:
        result = empty(self, *size, **named)
        if not result.dtype.is_floating_point:
            return result
        made.append(result := guarded(result.fill_(float("nan"))))
        places.append(result.data_ptr())
        return result

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    yield
    # The interpreter makes empty tensors too, and lets them point elsewhere.
    assert all(intact(t) for t, place in zip(made, places) if t.data_ptr() == place)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The launches of every Triton kernel, by name."""
    from triton.runtime.interpreter import InterpretedFunction

    counted: Counter[str] = Counter()
    run = InterpretedFunction.run

    def count(self, *given, **named):
        counted[self.fn.__name__] += 1
        return run(self, *given, **named)

    monkeypatch.setattr(InterpretedFunction, "run", count)
    return counted
