"""Reading the parity cases: committed here, or beside the repository where they are too large to commit."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
BESIDE = HERE.parents[2] / "shared" / "golden" / "cases"


@dataclass
class Case:
    """One parity case: its description, its tensors, and the comparison within its stated tolerances."""

    info: dict
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def params(self) -> dict[str, Tensor]:
        return self.group("param.")

    def assert_max(self, got: Tensor, want: Tensor | str, group: str) -> None:
        name = want if isinstance(want, str) else group
        want = self.tensors[want] if isinstance(want, str) else want
        limit = self.info["tolerance"][group]["max_error_over_tensor_max"]
        assert got.shape == want.shape, name
        error = ((got - want).abs().max() / want.abs().max()).item()
        assert error <= limit, f"{name}: error {error:.2e} of the largest entry, allowed {limit:.2e}"


@pytest.fixture(scope="session")
def case():
    def read(name: str) -> Case:
        for folder in (HERE, BESIDE):
            if (folder / f"{name}.json").is_file():
                return Case(
                    json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")
                )
        pytest.skip(f"the parity case {name} is not committed and the shared folder beside the repository is absent")

    return read


@pytest.fixture(scope="session")
def check_gradients():
    """Backpropagate the recorded upstream gradients and compare every input and parameter gradient."""

    def check(case: Case, module, prefix: str, outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        scalar = sum((out * case.tensors[f"{prefix}cot.{name}"]).sum() for name, out in outputs.items())
        module.zero_grad()
        scalar.backward()
        wanted = case.group(f"{prefix}grad.param.")
        got = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        assert set(got) == set(wanted)
        for name, gradient in wanted.items():
            if name.endswith("qkv.bias"):
                # The key third is zero in exact arithmetic: compare against the whole tensor's largest entry.
                assert gradient.abs().max() > 0
            case.assert_max(got[name], gradient, "grad.param")
        for name, value in inputs.items():
            if f"{prefix}grad.in.{name}" in case.tensors:
                case.assert_max(value.grad, f"{prefix}grad.in.{name}", "grad.in")

    return check


@pytest.fixture(scope="session")
def leaf():
    return lambda tensor: tensor.clone().requires_grad_(tensor.is_floating_point())
