"""`attention`: mistakes are sentences."""

import pytest
import torch

from fastjepa_kernels import attention
from tests.kernels.test_attention_dispatch import dense, normal, starts

CU = starts((2, 3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": normal(5, 3, 16)}, r"q \[B, M, H, d\] without cu_seqlens"),
        ({"cu_seqlens": CU, "max_length": 3}, r"q \[R, H, d\] beside cu_seqlens"),
        ({"q": normal(2, 5, 3, 16).long()}, "floating dtype"),
        ({"k": normal(2, 7, 2, 16)}, r"expected k \[B, N, 3, 16\]"),
        ({"v": normal(2, 7, 3, 16).half()}, r"expected v \[B, N, 3, 16\] of torch.float32"),
        ({"k": normal(2, 7, 3, 16).to("meta")}, "on meta"),
        ({"v": normal(2, 6, 3, 16)}, "do not go together"),
        ({"k": normal(1, 7, 3, 16), "v": normal(1, 7, 3, 16)}, "do not go together"),
        ({"k": normal(2, 0, 3, 16), "v": normal(2, 0, 3, 16)}, "there are no keys"),
        ({"max_length": 3}, "go with cu_seqlens"),
        ({"kv_cu_seqlens": CU}, "go with cu_seqlens"),
        ({"backend": "fast"}, "backend must be one of auto, sdpa"),
    ],
)
def test_mistakes_with_dense_clips_are_sentences(change, words):
    q, k, v = dense()
    with pytest.raises(ValueError, match=f"attention: .*{words}"):
        attention(**{"q": q, "k": k, "v": v, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cu_seqlens": CU.long()}, r"cu_seqlens must be int32 \[B \+ 1\]"),
        ({"cu_seqlens": CU[:1]}, "cu_seqlens must be int32"),
        ({"cu_seqlens": CU.to("meta")}, "on meta"),
        ({"max_length": None}, "needs max_length"),
        ({"max_length": torch.tensor(3)}, "a number of the host"),
        ({"max_length": 0}, "from 1 on, got 0"),
        ({"k": normal(4, 3, 16), "v": normal(4, 3, 16)}, "without kv_cu_seqlens k is split as q is"),
        ({"kv_cu_seqlens": CU}, "together or not at all"),
        ({"kv_cu_seqlens": starts((5,)), "kv_max_length": 5}, "different numbers of clips"),
        ({"lengths": (2, 2)}, "expected 2 lengths beside cu_seqlens with 5 rows"),
        ({"lengths": (2, 3), "kv_lengths": (2, 3)}, "and kv_lengths"),
    ],
)
def test_mistakes_with_ragged_clips_are_sentences(change, words):
    q, k, v = (normal(5, 3, 16, seed=n) for n in range(3))
    with pytest.raises(ValueError, match=f"attention: .*{words}"):
        attention(**{"q": q, "k": k, "v": v, "cu_seqlens": CU, "max_length": 3, **change})
