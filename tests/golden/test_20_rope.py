"""Rotary attention of the second generation around `rope3d` with its compatible layout of angles."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa_kernels import Rope, rope3d

CASES = ["20_v2_rope_attention_hd16", "20_v2_rope_attention_hd32"]


class RotaryAttention(nn.Module):
    """Parameters as published; the grid and the token numbers are given to the call."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, ids: Tensor, rope: Rope) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k = rope3d((qkv[:, :, 0], qkv[:, :, 1]), ids, rope)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, qkv[:, :, 2])))
        return self.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("call", ["grid", "thw", "ids", "ids_thw"])
def test_rotary_attention(case, check_gradients, name: str, call: str) -> None:
    recorded = case(name)
    settings = recorded.info["constructor"]
    module = RotaryAttention(settings["dim"], settings["num_heads"])
    module.load_state_dict(recorded.params())
    side = settings["grid_size"]
    number = "2" if call == "ids_thw" else ""
    x = recorded.tensors[f"in.x_ids{number}" if "ids" in call else f"in.x_{call}"].requires_grad_("thw" not in call)
    grid = tuple(recorded.info["thw"]) if "thw" in call else (8, side, side)
    ids = recorded.tensors[f"in.ids{number}"] if "ids" in call else torch.arange(x.shape[1])
    out = module(x, ids, Rope(grid, compat=True))
    recorded.assert_max(out, f"{call}.out.y", "out")
    if "thw" not in call:
        check_gradients(recorded, module, f"{call}.", {"y": out}, {f"x_{call}": x})
