"""Rotary positions: what turns and by how much, what is refused, autograd and torch.compile."""

import pytest
import torch
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from fastjepa_kernels import Rope, rope3d

GRID = (4, 3, 5)
SEGMENTS = {24: 8, 32: 10, 64: 20, 80: 26, 88: 28, 7: 2}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 60, shape, generator=torch.Generator().manual_seed(seed))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def by_complex_numbers(x: Tensor, ids: Tensor, segment: int) -> Tensor:
    """The rotation written as a product of complex numbers, axis by axis."""
    time, rest = ids // 15, ids % 15
    places = time, rest // 5, rest % 5
    pace = 10000.0 ** (-torch.arange(segment // 2, dtype=torch.float64) * 2 / segment)
    parts = []
    for axis, place in enumerate(places):
        pairs = torch.view_as_complex(
            x[..., axis * segment : (axis + 1) * segment].double().unflatten(-1, (-1, 2)).contiguous()
        )
        angle = (place.double().unsqueeze(-1) * pace).unsqueeze(-2)
        parts.append(torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2))
    return torch.cat([*parts, x[..., 3 * segment :].double()], -1)


@pytest.mark.parametrize(("head", "segment"), SEGMENTS.items())
def test_pairs_turn_by_the_place_of_the_token(head: int, segment: int) -> None:
    x, ids = normal(2, 9, 3, head), numbers(2, 9)
    out = rope3d(x, ids, Rope(GRID))
    torch.testing.assert_close(out.double(), by_complex_numbers(x, ids, segment), rtol=1e-5, atol=1e-5)
    assert out[..., 3 * segment :].equal(x[..., 3 * segment :])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_scores_depend_on_the_difference_of_places_and_the_compatible_ones_do_not() -> None:
    q, k = normal(1, 1, 1, 32), normal(1, 1, 1, 32, seed=1)

    def score(first: int, second: int, compat: bool) -> Tensor:
        rope = Rope(GRID, compat=compat)
        return (rope3d(q, torch.tensor([first]), rope) * rope3d(k, torch.tensor([second]), rope)).sum()

    # Each pair lies one step apart on every axis: 1 * 15 + 1 * 5 + 1.
    for compat in (False, True):
        apart = (score(0, 21, compat) - score(17, 38, compat)).abs()
        assert apart > 1e-2 if compat else apart < 1e-5


@pytest.mark.parametrize("head", [24, 32, 64, 80, 88])
def test_compatible_with_the_layer_of_transformers(head: int) -> None:
    vjepa2 = pytest.importorskip("transformers.models.vjepa2.modeling_vjepa2")
    config = vjepa2.VJEPA2Config(crop_size=48, patch_size=16, frames_per_clip=8, tubelet_size=2)
    layer = vjepa2.VJEPA2RopeAttention(config, hidden_size=2 * head, num_attention_heads=2)
    x, ids = normal(2, 2, 7, head), torch.randint(0, 36, (2, 7), generator=torch.Generator().manual_seed(3))
    expected = layer.apply_rotary_embeddings(x, layer.get_position_ids(x, masks=ids))
    out = rope3d(x.transpose(1, 2), ids, Rope((4, 3, 3), compat=True)).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compat", [False, True])
def test_the_gradient_is_the_transposed_map_and_the_inverse_rotation(compat: bool) -> None:
    rope = Rope(GRID, theta=100.0, compat=compat)
    x, ids = leaf(normal(2, 2, 1, 14, dtype=torch.float64)), numbers(2, 2)
    other = leaf(normal(2, 2, 2, 14, dtype=torch.float64, seed=1))
    assert torch.autograd.gradcheck(lambda q, k: rope3d((q, k), ids, rope), (x, other))
    assert torch.autograd.gradcheck(lambda q: rope3d(q, ids[0], rope), (x,))
    assert torch.autograd.gradgradcheck(lambda q: rope3d(q, ids, rope).sin(), (x,))
    (back,) = torch.autograd.grad(rope3d(x, ids, rope), x, rope3d(x, ids, rope))
    assert torch.allclose(back, x) is not compat


@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_of_a_pair_one_alone_may_be_used(used: tuple[bool, bool]) -> None:
    q, k, ids, rope = leaf(normal(2, 5, 2, 12)), leaf(normal(2, 5, 1, 12, seed=1)), numbers(2, 5), Rope(GRID)
    for out, x, wanted in zip(rope3d((q, k), ids, rope), (q, k), used):
        assert out.equal(rope3d(x, ids, rope))
        if wanted:
            out.sin().sum().backward()
    for x, wanted in zip((q, k), used):
        assert (x.grad is not None) is wanted
        if wanted:
            assert x.grad.equal(torch.autograd.grad(rope3d(x, ids, rope).sin().sum(), x)[0])


def test_strided_inputs_shared_numbers_dtypes_and_nothing() -> None:
    qkv, ids, rope = normal(2, 7, 3, 4, 32), numbers(2, 7), Rope(GRID, compat=True)
    whole = rope3d(qkv.flatten(2, 3), ids, rope).unflatten(2, (3, 4))
    q, k = rope3d((qkv[:, :, 0], qkv[:, :, 1]), ids.int(), rope)
    assert q.equal(whole[:, :, 0])
    assert k.equal(whole[:, :, 1])
    assert q.is_contiguous()
    heads_first = qkv[:, :, 0].transpose(1, 2).contiguous()
    assert rope3d(heads_first.transpose(1, 2), ids, rope).equal(q)
    assert rope3d(qkv[:, :, 0], ids[1], rope)[1].equal(q[1])
    assert rope3d(qkv[:, :, 0].transpose(2, 3).contiguous().transpose(2, 3), ids, rope).equal(q)
    low = qkv[:, :, 0].bfloat16()
    torch.testing.assert_close(rope3d(low, ids, rope), rope3d(low.float(), ids, rope).bfloat16(), rtol=0, atol=0)
    assert rope3d(qkv[:, :0, 0], ids[:, :0], rope).shape == (2, 0, 4, 32)


@pytest.mark.parametrize("name", ["rope3d", "rope3d_reference"])
def test_torch_accepts_the_operators(name: str) -> None:
    run = getattr(torch.ops.fastjepa, name).default
    q, k, ids = leaf(normal(2, 5, 3, 12)), leaf(normal(2, 5, 2, 12, seed=1)), numbers(2, 5)
    library.opcheck(run, (q, k, ids, 3, 5, 1e4, False, False))
    library.opcheck(run, (q, None, ids, 3, 5, 1e4, True, False))
    library.opcheck(run, (q.detach().transpose(0, 1), None, ids.T, 3, 5, 1e4, True, True))
    library.opcheck(run, (q.detach()[:, :0], None, ids[:, :0], 3, 5, 1e4, True, True))


def test_compiles_whole_with_few_recompiles_over_many_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    rope = Rope(GRID, compat=True)

    def step(q: Tensor, k: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return rope3d((q, k), ids, rope, impl="reference")

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in range(2, 22):
        ours, theirs = ([leaf(normal(2, length, 2, 24, seed=n)) for n in range(2)] for _ in range(2))
        ids = numbers(2, length)
        results, expected = compiled(*ours, ids), step(*theirs, ids)
        sum((result * result.cos()).sum() for result in results).backward()
        sum((result * result.cos()).sum() for result in expected).backward()
        for mine, other in zip((*results, *(x.grad for x in ours)), (*expected, *(x.grad for x in theirs))):
            torch.testing.assert_close(mine, other)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, i: rope3d(x[0], i, Rope(GRID)), r"expected \[B, K, H, d\]"),
        (lambda x, i: rope3d(x[..., :5], i, Rope(GRID)), "d of at least 6"),
        (lambda x, i: rope3d((x, x[:, :4]), i, Rope(GRID)), "of one B, K and d"),
        (lambda x, i: rope3d((x, x[..., :6]), i, Rope(GRID)), "of one B, K and d"),
        (lambda x, i: rope3d((x, x.double()), i, Rope(GRID)), "of one dtype"),
        (lambda x, i: rope3d(x.long(), i, Rope(GRID)), "floating dtype"),
        (lambda x, i: rope3d(x, i.float(), Rope(GRID)), "int32 or int64"),
        (lambda x, i: rope3d(x, i[:, :4], Rope(GRID)), r"expected ids \[2, 5\] or \[5\]"),
        (lambda x, i: rope3d(x, i.to("meta"), Rope(GRID)), "index on meta"),
        (lambda x, i: rope3d(x, i, Rope(GRID), impl="triton"), "CUDA device"),
        (lambda x, i: Rope((4, 0, 5)), "three positive numbers"),
        (lambda x, i: Rope((4, 5)), "three positive numbers"),
        (lambda x, i: Rope(GRID, theta=0.0), "theta must be positive"),
    ],
)
def test_mistakes_are_sentences(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(normal(2, 5, 3, 8), numbers(2, 5))


def test_flops_are_none() -> None:
    with FlopCounterMode(display=False) as counter:
        rope3d(leaf(normal(2, 5, 3, 8)), numbers(2, 5), Rope(GRID)).sum().backward()
    assert counter.get_total_flops() == 0
