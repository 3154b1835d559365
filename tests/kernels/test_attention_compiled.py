"""What the attention kernels need of a GPU: matrix instructions of a warp group on sm_90, and no spills anywhere."""

import importlib.util

import pytest

from fastjepa_kernels.testing.compile_only import compile_for

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is absent: there is none for this system"
)


def entries():
    from fastjepa_kernels._triton import attention, attention_backward

    return {entry.name: entry for module in (attention, attention_backward) for entry in module.shipped()}


def needs_of(entry, target):
    return compile_for(target, entry.kernel, entry.signature, entry.constants, warps=entry.warps, stages=entry.stages)


@pytest.mark.parametrize("side", ["attention", "attention query", "attention key"])
@pytest.mark.parametrize("head", [24, 104])
def test_bfloat16_multiplies_with_warp_groups_on_sm_90(side, head, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    needs = needs_of(entries()[f"{side} bf16 {head}"], "sm_90")
    assert needs.wgmma > 0
    assert needs.tensor_core == needs.wgmma
    assert needs.spilled == 0


def test_the_count_of_warp_group_instructions_is_real(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    older = needs_of(entries()["attention bf16 32"], "sm_80")
    assert older.tensor_core > 0
    assert older.wgmma == 0


def test_every_head_size_is_shipped_in_every_kernel():
    names = entries()
    for side in ("attention", "attention query", "attention key"):
        assert all(f"{side} {dtype} {head}" in names for dtype in ("bf16", "fp32") for head in range(16, 129, 8))
