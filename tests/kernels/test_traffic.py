"""Declared launches and bytes: every operation has them, and none declares less than it must read and write."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastjepa_kernels as kernels
from fastjepa_kernels.config import lookup
from fastjepa_kernels.registry import LAUNCHERS
from fastjepa_kernels.testing.case import random, results
from fastjepa_kernels.testing.cases import CASES
from fastjepa_kernels.traffic import TABLE, real_bytes, traffic

# What an operation may leave out of its declared bytes, and why: arguments by name, results by number.
ROWS = "only the rows that an index names are read"
RULE = "8 bytes a token and channel, as for the library's kernels: statistics are left out"
PIXELS = "only the pixels of kept patches are read"
EXCEPTIONS = {
    "assemble_tokens": (("table", "targets"), ROWS),
    "gather_norm_noise": (("x", "position"), ROWS),
    "gather_tokens": (("x",), ROWS),
    "indexed_attention": (("q", "k", "v", 1), f"{ROWS}; {RULE}"),
    "indexed_attention_backward": (("q", "k", "v"), ROWS),
    "noise_backward": (("x",), ROWS),
    "patch_embed_gather": (("video", "position"), PIXELS),
    "patch_embed_gather_backward": (("video",), PIXELS),
    "sum_of_targets": (("gradient",), "only the gradient of target rows is read"),
    "target_loss": (("target",), ROWS),
    "target_loss_backward": (("target",), ROWS),
}
LIKE = (torch.device("cpu"), torch.bfloat16)


class Calls(TorchDispatchMode):
    """The calls of our operations inside: (arguments, results) by name."""

    def __init__(self):
        super().__init__()
        self.found = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fastjepa":
            name = func._schema.name.partition("::")[2].removesuffix("_reference")
            self.found[name].append((args, [x for x in tree_leaves(out) if isinstance(x, Tensor)], func._schema))
        return out


@pytest.fixture(scope="module")
def calls():
    """Every case forward and backward on small shapes, and what no case reaches."""
    with Calls() as seen:
        for case in CASES:
            for name in ("small", "odd"):
                for dtype in (torch.float32, torch.bfloat16):
                    inputs = case.make(case.shapes[name], LIKE[0], dtype)
                    for n in case.gradients:
                        inputs[n].requires_grad_()
                    results(case, case.ours("reference"), inputs, dtype)
        _others()
    return seen.found


def _others():
    qkv = random(2, 9, 3, 2, 24, like=LIKE, seed=1).requires_grad_()
    bias = torch.zeros(3, 2, 24, requires_grad=True)
    for rope in (None, kernels.Rope((1, 3, 3))):
        kernels.indexed_attention(qkv, qkv_bias=bias, rope=rope, impl="reference").sum().backward()
    kernels.indexed_attention(qkv, rope=kernels.Rope((1, 3, 3)), impl="reference").sum().backward()
    starts = torch.tensor([0, 4, 18], dtype=torch.int32)
    kernels.indexed_attention(qkv.flatten(0, 1), cu_seqlens=starts, max_length=14, impl="reference").sum().backward()
    few = torch.tensor([[3, 1], [0, 8]])
    kernels.indexed_attention(qkv, q_index=few, kv_index=few, impl="reference").sum().backward()
    x = random(6, 24, like=LIKE, seed=2)
    kernels.assemble_tokens(x[None], few[:, :1].expand(2, 3).reshape(1, 6), few[:1], torch.zeros(99, 24), x[0],
                            impl="reference")  # fmt: skip
    kernels.linear_gelu(x, random(48, 24, like=LIKE, seed=3), impl="reference", form="fused")
    video = torch.zeros(2, 3, 2, 16, 16, dtype=torch.uint8)
    weight = random(24, 3 * 2 * 8 * 8, like=LIKE, seed=4).requires_grad_()
    kernels.patch_embed_gather(video, weight, tubelet=2, patch=8, impl="reference").sum().backward()
    clip = torch.zeros(1, 3, 8, 64, 64)
    kernels.patch_embed_gather(clip, weight, index=few[:1], tubelet=2, patch=8, impl="reference").sum().backward()
    kernels.philox_normal(torch.arange(5), 24, 3, impl="reference")
    one = [torch.zeros(33), torch.zeros(16)]
    state = [[torch.zeros_like(x) for x in one] for _ in range(4)]
    steps = [torch.zeros(()) for _ in one]
    copies, averages = ([x.bfloat16() for x in one] for _ in range(2))
    kernels.adamw_ema_(one, *state[:3], steps, lr=0.1, targets=state[3], momentum=0.9, copies=copies,
                       target_copies=[averages[0], None], impl="reference")  # fmt: skip


def touched(arguments, results, schema, left_out=()) -> int:
    """Bytes of the storage of all tensors in and out, each stretch once, twice where it is read and written."""
    total, seen = 0, set()
    named = [(one.name, one.alias_info, given) for one, given in zip(schema.arguments, arguments)]
    for name, alias, given in [*named, *((number, None, x) for number, x in enumerate(results))]:
        for x in tree_leaves(given):
            if not isinstance(x, Tensor) or name in left_out:
                continue
            key = x.untyped_storage()._cdata, x.storage_offset(), x.shape
            if key not in seen:
                # What is changed in place is read and written; copies are only written.
                total += real_bytes(x) * (2 if alias is not None and "copies" not in name else 1)
                seen.add(key)
    return total


def test_every_operation_is_in_the_table():
    assert sorted(TABLE) == sorted(LAUNCHERS)
    assert set(EXCEPTIONS) <= set(TABLE)
    with pytest.raises(ValueError, match="layer_norm_reference: no declared"):
        traffic("layer_norm_reference", [], [])


def test_every_operation_was_called(calls):
    assert set(calls) == set(LAUNCHERS)


@pytest.mark.parametrize("name", sorted(LAUNCHERS))
def test_declared_bytes_are_at_least_what_goes_in_and_out(calls, name):
    left_out, reason = EXCEPTIONS.get(name, ((), ""))
    less = False
    for arguments, found, schema in calls[name]:
        declared = traffic(name, arguments, found)
        assert declared.launches >= 1
        assert declared.bytes >= touched(arguments, found, schema, left_out)
        less |= declared.bytes < touched(arguments, found, schema)
    assert less == (name in EXCEPTIONS), f"no exception is needed any more: {reason}"


def test_a_bias_costs_attention_a_launch_and_rows_of_sums_but_no_copy():
    clips = {"cu_seqlens": torch.tensor([0, 300, 400], dtype=torch.int32), "max_length": 300, "impl": "reference"}
    qkv = random(400, 3, 2, 64, like=LIKE, seed=1).requires_grad_()
    bias = torch.zeros(3, 2, 64, requires_grad=True)
    with Calls() as seen:
        for one in (None, bias):
            kernels.indexed_attention(qkv, qkv_bias=one, **clips).sum().backward()
    (plain, biased), (plain_back, biased_back) = (
        [traffic(name, arguments, found) for arguments, found, _ in seen.found[name]]
        for name in ("indexed_attention", "indexed_attention_backward")
    )
    assert biased == (plain.launches, plain.bytes + real_bytes(bias))
    # Of two clips, of queries, keys and values: so many rows in float32, written and read.
    blocks = [-(-300 // lookup(f"indexed_attention_{side}_biased", dtype="bf16", width=64)[size])
              for side, size in (("query", "BLOCK_M"), ("key", "BLOCK_N"), ("key", "BLOCK_N"))]  # fmt: skip
    sums = 2 * 2 * sum(blocks) * real_bytes(bias) // 3
    assert biased_back == (plain_back.launches + 1, plain_back.bytes + sums + 2 * real_bytes(bias))
    # Far below one pass over the gradient of the rows.
    assert 4 * sums < real_bytes(qkv)
